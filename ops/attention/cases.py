"""Shapes of attention in real models, by name: tests take `TINY`, benchmarks `REAL`."""

from dataclasses import dataclass

from lissom.ops.attention.masks import Causal, Full, Mask, Window


@dataclass(frozen=True)
class Case:
    """One problem: lengths, heads, head sizes and a static mask."""

    batch: int
    q_len: int
    kv_len: int
    heads: int
    kv_heads: int
    head_dim: int
    v_dim: int
    mask: Mask
    origin: str


REAL = {
    "vit_b16": Case(8, 197, 197, 12, 12, 64, 64, Full(), "ViT-B/16 at 224 pixels"),
    "gpt2_small": Case(1, 1024, 1024, 12, 12, 64, 64, Causal(), "GPT-2 small"),
    "causal_4k": Case(1, 4096, 4096, 8, 8, 64, 64, Causal(), "the CPU target of docs: B1 H8 T4096 D64"),
    "smollm2_135m": Case(1, 2048, 2048, 9, 3, 64, 64, Causal(), "SmolLM2-135M, grouped-query"),
    "llama3_8b": Case(1, 8192, 8192, 32, 8, 128, 128, Causal(), "Llama 3 8B, grouped-query"),
    "mistral_7b": Case(1, 8192, 8192, 32, 8, 128, 128, Window(4095, 0), "Mistral 7B, sliding window 4096"),
    "window_4k": Case(1, 4096, 4096, 8, 8, 64, 64, Window(255, 0), "sliding window of 256"),
    "deepseek_v2_lite": Case(1, 4096, 4096, 16, 16, 192, 128, Causal(), "DeepSeek-V2-Lite MLA, expanded"),
    "decode_4k": Case(8, 1, 4096, 8, 8, 64, 64, Causal(4095), "one new token against a cache of 4096"),
}

TINY = {
    "full": Case(2, 9, 9, 2, 2, 8, 8, Full(), "vit_b16"),
    "causal_odd": Case(2, 13, 13, 4, 2, 8, 8, Causal(), "smollm2_135m"),
    "window_odd": Case(1, 17, 17, 2, 1, 8, 8, Window(5, 0), "mistral_7b"),
    "two_head_sizes": Case(1, 7, 11, 2, 2, 12, 8, Causal(4), "deepseek_v2_lite"),
    "decode": Case(2, 1, 19, 4, 2, 8, 8, Causal(18), "decode_4k"),
}
