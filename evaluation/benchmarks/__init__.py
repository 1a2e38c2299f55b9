"""Benchmarks of ops: one module an op, each with `OP` and `problems(platform, tiny)`; see `harness`."""

ENTRIES = {
    "attention": "lissom.evaluation.benchmarks.attention",
}
"""Op -> the module of its problems."""
