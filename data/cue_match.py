"""`cue_match`: classification that only a content-addressed far link solves.

Items lie at random places on a line of L positions or a grid of H x W: each holds a key (random bits, fresh
in every example) and a value. One more place, the cue, holds the key of exactly one item. The class is that
item's value.

Why nothing simpler works: every value occurs equally often in every example, so counting says nothing; keys
are fresh, so no key is tied to a class; the matching item is at least `gap` positions away from the cue, so a
window that is narrower sees one or the other. A model that mixes only locally and then pools stays at chance,
1 / classes. The oracle (`solve`: compare the cue's key with every item's) scores 1.

Channels of one position: key bits as -1 / +1 (zero where nothing lies), value one-hot (zero at the cue), one
flag for items, one for the cue; normal noise of standard deviation `noise` on all of them.
"""

import numpy as np

from lissom.data.content import Content
from lissom.data.errors import require


def cue_match(
    *,
    dims: int = 1,
    length: int = 64,
    classes: int = 4,
    items: int = 8,
    key_bits: int = 12,
    gap: int | None = None,
    noise: float = 0.1,
    train_size: int = 20000,
    test_size: int = 5000,
    seed: int = 0,
) -> Content:
    """Signals [length, C] (dims=1) or images [side, side, C] with side^2 = length (dims=2); C = key_bits +
    classes + 2.

    classes: values; items: a multiple of it. gap: least distance between cue and matching item, on the grid
    the larger of the two axes' distances; default a quarter of the line or of the side.
    """
    side = round(length**0.5)
    require(dims in (1, 2), f"cue_match: dims must be 1 or 2, got {dims}")
    require(dims == 1 or side**2 == length, f"cue_match: length must be a square for dims=2, got {length}")
    gap = (length if dims == 1 else side) // 4 if gap is None else gap
    require(classes >= 2, f"cue_match: classes must be at least 2, got {classes}")
    require(
        items >= classes and items % classes == 0,
        f"cue_match: items must be a multiple of classes={classes}, got {items}",
    )
    require(items < length, f"cue_match: length must be above items={items}, got {length}")
    require(
        items <= 2**key_bits and key_bits <= 30,
        f"cue_match: key_bits must be in {int(np.ceil(np.log2(items)))}..30 for {items} items, got {key_bits}",
    )
    half = (length if dims == 1 else side) // 2
    require(1 <= gap <= half, f"cue_match: gap must be in 1..{half} so that every cue has far places, got {gap}")
    require(train_size > 0 and test_size > 0, "cue_match: train_size and test_size must be above 0")
    shape = (length,) if dims == 1 else (side, side)
    splits = [
        _draw(np.random.default_rng([seed, split]), size, shape, classes, items, key_bits, gap, noise)
        for split, size in enumerate((train_size, test_size))
    ]
    info = {"classes": classes, "chance": 1 / classes, "anchors": {"oracle": 1.0}, "gap": gap}
    return Content(kind="signal" if dims == 1 else "image", train=splits[0], test=splits[1], info=info)


def solve(inputs: np.ndarray, *, classes: int) -> np.ndarray:
    """The oracle: labels [N] of inputs [N, L, C] or [N, H, W, C], by comparing keys."""
    flat = inputs.reshape(len(inputs), -1, inputs.shape[-1])
    keys, values = flat[..., : -classes - 2], flat[..., -classes - 2 : -2]
    rows = np.arange(len(flat))
    cue = keys[rows, flat[..., -1].argmax(axis=1)]
    likeness = np.where(flat[..., -2] > 0.5, np.einsum("nlk,nk->nl", keys, cue), -np.inf)
    return values[rows, likeness.argmax(axis=1)].argmax(axis=1)


def _draw(rng, count: int, shape, classes: int, items: int, key_bits: int, gap: int, noise: float):
    """`count` examples; see the top of this file."""
    length, rows = int(np.prod(shape)), np.arange(count)
    places = np.stack(np.unravel_index(np.arange(length), shape), axis=1)
    cue = rng.integers(0, length, count)
    distance = np.abs(places[None] - places[cue][:, None]).max(axis=2)
    scores = rng.random((count, length))
    match = np.where(distance >= gap, scores, -1).argmax(axis=1)
    scores[rows, cue] = scores[rows, match] = -1
    others = np.argsort(-scores, axis=1)[:, : items - 1]
    where = np.concatenate([match[:, None], others], axis=1)  # item 0 is the one that the cue asks for
    values = rng.permuted(np.tile(np.arange(items) % classes, (count, 1)), axis=1)
    bits = (_distinct_codes(rng, count, items, key_bits)[..., None] >> np.arange(key_bits)) & 1
    inputs = np.zeros((count, length, key_bits + classes + 2), np.float32)
    column = rows[:, None]
    inputs[column, where, :key_bits] = 2 * bits - 1
    inputs[column, where, key_bits + values] = 1
    inputs[column, where, -2] = 1
    inputs[rows, cue, :key_bits] = 2 * bits[:, 0] - 1
    inputs[rows, cue, -1] = 1
    inputs += noise * rng.standard_normal(inputs.shape, dtype=np.float32)
    return {"inputs": inputs.reshape(count, *shape, -1), "labels": values[:, 0].astype(np.int32)}


def _distinct_codes(rng, count: int, items: int, key_bits: int) -> np.ndarray:
    """[count, items] of 0 .. 2^key_bits - 1, distinct within a row: rows with a repetition are drawn
    again."""
    if 2**key_bits <= 4 * items:
        return rng.permuted(np.tile(np.arange(2**key_bits), (count, 1)), axis=1)[:, :items]
    codes = rng.integers(0, 2**key_bits, (count, items))
    while True:
        ordered = np.sort(codes, axis=1)
        again = (ordered[:, 1:] == ordered[:, :-1]).any(axis=1)
        if not again.any():
            return codes
        codes[again] = rng.integers(0, 2**key_bits, (int(again.sum()), items))
