"""The offline search: which selector for which head, at no more than a given share of the scores."""

from collections.abc import Mapping, Sequence

import jax
import numpy as np

from lissom.models.registry import construct
from lissom.models.selectors import SELECTORS
from lissom.models.selectors.quality import judged_by_program, whole_of

Space = Mapping[str, Sequence[Mapping]]


def space(length: int, block: int) -> dict[str, list[dict]]:
    """Settings of the three patterns of MInference for a length, from few scores to all: the paper gives its own for
    its lengths only, so doubling steps are a choice made here."""
    blocks = -(-length // block)
    steps = [2**n for n in range(blocks.bit_length())]
    keys = [2**n for n in range(length.bit_length())]
    return {
        "a_shape": [{"sink": 1, "window": n} for n in (*steps, blocks)],
        "vertical_slash": [{"verticals": a, "slashes": b, "first": min(30, a), "recent": min(block, b)}
                           for a in keys[::2] for b in keys[::2]],
        "pooled": [{"density": n / 16} for n in range(1, 17)],
    }  # fmt: skip


def search(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    density: float,
    block: int = 64,
    candidates: Space | None = None,
) -> tuple[tuple[tuple[str, dict], ...], list[dict]]:
    """(assignment, report): for each query head the selector and settings with the least error of the output among
    those whose measured density on q, k, v is at most `density` (MInference's kernel-aware search, arXiv:2407.02490:
    patterns compared at equal computed scores).

    q [B, T, H, D], k, v [B, T, K, D] of one layer, a batch of calibration sequences. `assignment` is what `per_head`
    takes; `report` says for each head {"selector", "settings", "density", "recall", "error"}. Ties go to the fewer
    scores. ValueError where no candidate is sparse enough for a head. Every candidate runs once, for all heads.
    """
    candidates = space(q.shape[1], block) if candidates is None else candidates
    found: list[list[dict]] = [[] for _ in range(q.shape[2])]
    facts = {"heads": q.shape[2], "kv_heads": k.shape[2], "head_dim": q.shape[3], "block": block}
    whole = jax.jit(whole_of)(q, k, v)
    for name, choices in candidates.items():
        for settings in choices:
            selector = construct(SELECTORS, name, {name: settings}, "selector", is_field=False, **facts)
            values = jax.device_get(judged_by_program(selector, q, k, v, whole=whole))
            for head, entries in enumerate(found):
                numbers = {measure: float(of[head]) for measure, of in values.items()}
                entries.append({"selector": name, "settings": dict(settings), **numbers})
    report = []
    for head, entries in enumerate(found):
        allowed = [entry for entry in entries if entry["density"] <= density + 1e-6]
        if not allowed:
            least = min(entry["density"] for entry in entries)
            raise ValueError(f"density={density} is below the sparsest candidate of head {head}, which has {least:.3f}")
        report.append(min(allowed, key=lambda entry: (entry["error"], entry["density"])))
    return tuple((entry["selector"], entry["settings"]) for entry in report), report


def streaming_heads(
    q: jax.Array, k: jax.Array, v: jax.Array, *, share: float = 0.5, sink: int = 1, window: int = 2, block: int = 64
) -> tuple[int, ...]:
    """The `share` of the key-value heads, rounded down, whose output suffers least from sink and window alone, for
    `page_bounds.streaming`. LServe (arXiv:2502.14866) takes half, by DuoAttention's trained gates; the error of the
    output, mean over the heads of a group, stands in for them here."""
    facts = {"heads": q.shape[2], "kv_heads": k.shape[2], "head_dim": q.shape[3], "block": block}
    selector = construct(
        SELECTORS, "a_shape", {"a_shape": {"sink": sink, "window": window}}, "selector", is_field=False, **facts
    )
    error = np.asarray(judged_by_program(selector, q, k, v)["error"]).reshape(k.shape[2], -1).mean(1)
    return tuple(sorted(int(head) for head in np.argsort(error, kind="stable")[: int(share * k.shape[2] + 1e-6)]))
