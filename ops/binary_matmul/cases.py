"""Shapes of binary matmuls in real models, by name: tests take `TINY`, benchmarks `REAL`."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Case:
    """x [m, k] and w [n, k], before they are packed."""

    m: int
    k: int
    n: int
    origin: str


REAL = {
    "gemv": Case(1, 4096, 4096, "a token in an attention projection of Llama 7B"),
    "m64_1024": Case(64, 1024, 1024, "a small batch, a layer of 1024 units"),
    "square_2048": Case(2048, 2048, 2048, "the CPU's yardstick"),
    "conv_3x3_256": Case(8 * 14 * 14, 9 * 256, 256, "XNOR-Net's ResNet-18, 8 pictures of 14 x 14 as patches"),
    "square_8192": Case(8192, 8192, 8192, "the GPU's yardstick"),
    "conv_3x3_256_batch": Case(256 * 14 * 14, 9 * 256, 256, "the convolution, 256 pictures"),
}

TINY = {
    "one": Case(1, 1, 1, "no model"),
    "short": Case(3, 31, 5, "conv_3x3_256"),
    "word": Case(4, 32, 7, "conv_3x3_256"),
    "two_words": Case(9, 33, 6, "conv_3x3_256"),
    "vector": Case(1, 1000, 70, "gemv"),
    "square": Case(30, 1000, 40, "square_2048"),
}
