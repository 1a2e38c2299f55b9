"""Masks of attention as small objects: which key may a query see.

A mask is a frozen pytree: what is a Python number is static (part of the compiled program), what is an array
is an operand that passes through `jit`, `vmap` and `shard_map`. Positions are counted from 0 in `q` and in
`k`; query i of a chunk stands at position i + offset among the keys.

Every mask answers four questions:

* `block(q, k)`: the boolean square of the queries and keys in two `Span`s, or None where everything in it is
  seen;
* `key_range(start, stop, kv_len)`: static bounds on the keys that queries start..stop-1 can see, to skip the
  rest;
* `valid_keys(kv_len)`, `valid_queries(q_len)`: what is padding, hidden from everybody. Padding may hold
  anything, NaN too. A key that is hidden from some queries only has to be finite: its weight is an exact 0,
  and 0 * NaN is NaN;
* `dense(q_len, kv_len)`: the whole square. This is the definition that all implementations are tested
  against.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Index = int | jax.Array


class Span(NamedTuple):
    """`size` consecutive positions; `start` may be traced."""

    start: Index
    size: int

    def positions(self) -> jax.Array | np.ndarray:
        # numpy while it can: constants fold, and a static mask can be seen to hide nothing.
        return self.start + np.arange(self.size, dtype=np.int32)


@dataclass(frozen=True)
class Mask:
    """Base of all masks; `a & b` is seen where both see."""

    def __and__(self, other: "Mask") -> "Mask":
        if not isinstance(other, Mask):
            return NotImplemented
        parts = tuple(p for m in (self, other) for p in (m.parts if isinstance(m, And) else (m,)))
        parts = tuple(p for p in parts if not isinstance(p, Full))
        return And(parts) if len(parts) > 1 else parts[0] if parts else Full()

    def block(self, q: Span, k: Span) -> jax.Array | np.ndarray | None:
        """Bool [1 or batch, 1, q.size, k.size], True where seen; None where all is seen, known without
        running."""
        return None

    def key_range(self, start: int, stop: int, kv_len: int) -> tuple[int, int]:
        """Static (low, high): no query in start..stop-1 sees a key outside low..high-1."""
        return 0, kv_len

    def valid_keys(self, kv_len: int) -> jax.Array | None:
        """Bool [batch, kv_len], False at padding; None where nothing is padding."""
        return None

    def valid_queries(self, q_len: int) -> jax.Array | None:
        """Bool [batch, q_len], False at padding; None where nothing is padding."""
        return None

    def check(self, batch: int, q_len: int, kv_len: int) -> None:
        """ValueError where the arrays inside do not fit."""

    def dense(self, q_len: int, kv_len: int) -> jax.Array:
        """Bool [1 or batch, 1, q_len, kv_len]."""
        seen = self.block(Span(0, q_len), Span(0, kv_len))
        return jnp.ones((1, 1, q_len, kv_len), bool) if seen is None else jnp.asarray(seen)

    def at(self, index: Index) -> "Mask":
        """The mask of one batch entry, as a mask with batch 1."""

        def take(leaf):
            if leaf.ndim == 0:
                return leaf
            return jax.lax.dynamic_slice_in_dim(leaf, index if leaf.shape[0] > 1 else 0, 1)

        return jax.tree.map(take, self)


def _is_static(value) -> bool:
    return isinstance(value, int | np.integer)


def _check_offset(name: str, offset, batch: int) -> None:
    if not _is_static(offset) and (not _is_integer(offset) or offset.shape not in ((), (1,), (batch,))):
        raise ValueError(f"mask: the offset of {name} is an integer scalar or [batch={batch}], got {_of(offset)}.")


def _is_integer(array) -> bool:
    return hasattr(array, "dtype") and jnp.issubdtype(array.dtype, jnp.integer)


def _of(array) -> str:
    return f"{array.dtype}{list(array.shape)}" if hasattr(array, "dtype") else repr(array)


@jax.tree_util.register_static
@dataclass(frozen=True)
class Full(Mask):
    """Every query sees every key."""


class _Band(Mask):
    """Query i sees key j where -left <= j - (i + offset) <= right; None is unbounded."""

    def _bounds(self) -> tuple[int | None, int | None, Index]:
        raise NotImplementedError

    def block(self, q: Span, k: Span):
        left, right, offset = self._bounds()
        offset = offset if _is_static(offset) or offset.ndim == 0 else offset[:, None, None, None]
        distance = k.positions()[None, None, None, :] - (q.positions()[None, None, :, None] + offset)
        seen = (distance <= right) if right is not None else None
        if left is not None:
            seen = (distance >= -left) if seen is None else seen & (distance >= -left)
        return None if seen is None or (isinstance(seen, np.ndarray) and seen.all()) else seen

    def key_range(self, start: int, stop: int, kv_len: int) -> tuple[int, int]:
        left, right, offset = self._bounds()
        if not _is_static(offset):
            return 0, kv_len
        low = 0 if left is None else min(max(start + offset - left, 0), kv_len)
        high = kv_len if right is None else max(min(stop - 1 + offset + right + 1, kv_len), 0)
        return low, max(low, high)

    def check(self, batch: int, q_len: int, kv_len: int) -> None:
        _check_offset(type(self).__name__, self._bounds()[2], batch)


@dataclass(frozen=True)
class Causal(_Band):
    """Query i sees keys 0..i+offset. The offset is the number of keys before the first query: a Python int,
    or a traced scalar or [batch] array (chunked prefill, cached decode)."""

    offset: Index = 0

    def _bounds(self):
        return None, 0, self.offset


@dataclass(frozen=True)
class Window(_Band):
    """Query i sees keys i+offset-left .. i+offset+right, both ends included, cut at the ends of the sequence;
    None is unbounded. `left` and `right` are Python ints of at least 0; `offset` as in `Causal`."""

    left: int | None
    right: int | None
    offset: Index = 0

    def __post_init__(self):
        for name, bound in (("left", self.left), ("right", self.right)):
            if bound is not None and (not _is_static(bound) or bound < 0):
                raise ValueError(f"mask: Window {name} is an int of at least 0, or None, got {bound!r}.")

    def _bounds(self):
        return self.left, self.right, self.offset


@dataclass(frozen=True)
class Segments(Mask):
    """Packed documents: a query sees the keys that carry its own number. Negative numbers are padding: they
    see nothing and nobody sees them. `q_ids` [batch, q_len], `kv_ids` [batch, kv_len] (None: the same as
    `q_ids`), integers."""

    q_ids: jax.Array
    kv_ids: jax.Array | None = None

    def _keys(self) -> jax.Array:
        return self.q_ids if self.kv_ids is None else self.kv_ids

    def block(self, q: Span, k: Span):
        rows = jax.lax.dynamic_slice_in_dim(self.q_ids, q.start, q.size, axis=1)[:, None, :, None]
        keys = jax.lax.dynamic_slice_in_dim(self._keys(), k.start, k.size, axis=1)[:, None, None, :]
        return (rows == keys) & (rows >= 0)

    def valid_keys(self, kv_len: int) -> jax.Array:
        return self._keys() >= 0

    def valid_queries(self, q_len: int) -> jax.Array:
        return self.q_ids >= 0

    def check(self, batch: int, q_len: int, kv_len: int) -> None:
        for name, ids, length in (("q_ids", self.q_ids, q_len), ("kv_ids", self._keys(), kv_len)):
            if not _is_integer(ids) or ids.ndim != 2 or ids.shape[0] not in (1, batch) or ids.shape[1] != length:
                raise ValueError(
                    f"mask: Segments {name} is an integer array [batch={batch}, length={length}], got {_of(ids)}."
                )


@dataclass(frozen=True)
class Lengths(Mask):
    """Only the first `kv_length` keys of each batch entry are seen, the rest is padding (the free part of a
    cache). `kv_length` [batch], integers."""

    kv_length: jax.Array

    def block(self, q: Span, k: Span):
        seen = k.positions()[None, None, None, :] < self.kv_length[:, None, None, None]
        return jnp.broadcast_to(seen, (seen.shape[0], 1, q.size, k.size))

    def valid_keys(self, kv_len: int) -> jax.Array:
        return np.arange(kv_len, dtype=np.int32) < self.kv_length[:, None]

    def check(self, batch: int, q_len: int, kv_len: int) -> None:
        length = self.kv_length
        if not _is_integer(length) or length.shape not in ((1,), (batch,)):
            raise ValueError(f"mask: Lengths kv_length is an integer array [batch={batch}], got {_of(length)}.")


@dataclass(frozen=True)
class And(Mask):
    """Seen where all parts see; written `a & b`."""

    parts: tuple[Mask, ...]

    def block(self, q: Span, k: Span):
        seen = None
        for part in self.parts:
            square = part.block(q, k)
            seen = square if seen is None else seen if square is None else seen & square
        return seen

    def key_range(self, start: int, stop: int, kv_len: int) -> tuple[int, int]:
        ranges = [part.key_range(start, stop, kv_len) for part in self.parts]
        low = max(r[0] for r in ranges)
        return low, max(low, min(r[1] for r in ranges))

    def valid_keys(self, kv_len: int):
        return _all(part.valid_keys(kv_len) for part in self.parts)

    def valid_queries(self, q_len: int):
        return _all(part.valid_queries(q_len) for part in self.parts)

    def check(self, batch: int, q_len: int, kv_len: int) -> None:
        for part in self.parts:
            part.check(batch, q_len, kv_len)


def _all(arrays):
    result = None
    for array in arrays:
        result = array if result is None else result if array is None else result & array
    return result


def _register_band(cls: type, static: tuple[str, ...]) -> None:
    # An int offset is part of the tree's structure (static); an array is a leaf.
    def flatten(mask):
        known = tuple(getattr(mask, name) for name in static)
        if _is_static(mask.offset):
            return (), (known, int(mask.offset))
        return (mask.offset,), (known, None)

    def unflatten(aux, children):
        known, offset = aux
        mask = object.__new__(cls)  # without checks: jax also puts placeholders into leaves
        for name, value in zip((*static, "offset"), (*known, children[0] if offset is None else offset)):
            object.__setattr__(mask, name, value)
        return mask

    jax.tree_util.register_pytree_node(cls, flatten, unflatten)


_register_band(Causal, ())
_register_band(Window, ("left", "right"))
jax.tree_util.register_dataclass(Segments, data_fields=["q_ids", "kv_ids"], meta_fields=[])
jax.tree_util.register_dataclass(Lengths, data_fields=["kv_length"], meta_fields=[])
jax.tree_util.register_dataclass(And, data_fields=["parts"], meta_fields=[])


def without_padding(mask: Mask, q, k, v):
    """q, k, v with zeros at padding, so that whatever stands there (NaN too) reaches neither results nor
    gradients."""
    keys, queries = mask.valid_keys(k.shape[1]), mask.valid_queries(q.shape[1])
    if keys is not None:
        k, v = (jnp.where(keys[:, :, None, None], x, 0) for x in (k, v))
    if queries is not None:
        q = jnp.where(queries[:, :, None, None], q, 0)
    return q, k, v
