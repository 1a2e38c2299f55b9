"""Shapes of softmax in real models, by name: tests take `TINY`, benchmarks `REAL`."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Case:
    """One problem: the array's shape; softmax is over its last axis."""

    shape: tuple[int, ...]
    origin: str


REAL = {
    "square_4k": Case((4096, 4096), "the CPU target: 64 MB in float32, out of cache"),
    "rows_32k": Case((32768, 8192), "the GPU target"),
    "vit_b16": Case((8, 12, 197, 197), "attention scores of ViT-B/16 at 224 pixels"),
    "gpt2_vocabulary": Case((1024, 50257), "GPT-2's next-token distribution over one context"),
    "router_64": Case((16384, 64), "router of a mixture of 64 experts"),
    "imagenet": Case((256, 1000), "ImageNet classes"),
    "long_row": Case((2, 2**22 + 3), "rows longer than a cache"),
}

TINY = {
    "square": Case((16, 16), "square_4k"),
    "odd": Case((3, 2, 5, 13), "vit_b16"),
    "long": Case((2, 1027), "gpt2_vocabulary"),
    "many_rows": Case((37, 4), "router_64"),
    "one_element_rows": Case((7, 1), "no model: every output is 1"),
    "vector": Case((9,), "imagenet"),
}
