"""Benchmarks of ops: one module an op, each with `OP` and `problems(platform, tiny)`; see `harness`."""

ENTRIES = {
    "attention": "lissom.evaluation.benchmarks.attention",
    "binary_matmul": "lissom.evaluation.benchmarks.binary_matmul",
    "decode_attention": "lissom.evaluation.benchmarks.decode_attention",
    "grouped_matmul": "lissom.evaluation.benchmarks.grouped_matmul",
    "quantized_matmul": "lissom.evaluation.benchmarks.quantized_matmul",
    "softmax": "lissom.evaluation.benchmarks.softmax",
    "spiking": "lissom.evaluation.benchmarks.spiking",
}
"""Op -> the module of its problems."""
