"""One selector a head."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lissom.models.registry import construct
from lissom.models.selectors import SELECTORS
from lissom.models.selectors.base import Choice, Selector


class PerHead(Selector):
    """Each query head has a selector of its own (MInference's assignment; Jiang et al. 2024, arXiv:2407.02490).

    assignment: (name, settings) for each query head, as `search.search` finds it; a shorter one repeats over the heads.
    The lists of all heads go to the op as one mask, so heads differ in what they compute, not in programs. Where lists
    differ in the rows that share them, the finest serves all. A selector that counts heads (`strided`, `random`) counts
    those of its own entry. A step of one token with a cache selects if all of its selectors do.
    `token_sparsity` chooses for all heads together and is refused.
    """

    def __init__(self, *, assignment: Sequence, rngs: nnx.Rngs | None = None, **kwargs):
        super().__init__(**kwargs)
        try:
            entries = [(str(name), dict(settings)) for name, settings in assignment]
        except (TypeError, ValueError):
            raise ValueError(f"selector.assignment={assignment!r:.80} must be pairs (name, settings)") from None
        if not entries or self.heads % len(entries):
            raise ValueError(f"selector.assignment has {len(entries)} entries: they must divide the {self.heads} heads")
        entries = entries * (self.heads // len(entries))
        distinct = [entry for n, entry in enumerate(entries) if entry not in entries[:n]]
        members, groups = [], []
        for name, settings in distinct:
            group = tuple(h for h, entry in enumerate(entries) if entry == (name, settings))
            facts = {"heads": len(group), "kv_heads": len(group), "head_dim": self.head_dim, "block": self.block}
            own = name if name in SELECTORS else name.rpartition(":")[2]
            member = construct(SELECTORS, name, {own: settings}, "selector", is_field=False, **facts, rngs=rngs)
            if type(member).choose is Selector.choose:
                raise ValueError(f"selector.assignment: {name} selects for all heads together, not for one")
            members.append(member)
            groups.append(group)
        self.members, self.groups = nnx.List(members), tuple(groups)
        self.decode = "select" if all(member.decode == "select" for member in members) else "dense"
        self.unrotated = any(member.unrotated for member in members)

    def rows(self, offset):
        return min(member.rows(offset) for member in self.members)

    def _parts(self, q, k, raw):
        """(member, its q, its k, its raw), a key-value head for each of its heads."""
        group_size = q.shape[2] // k.shape[2]
        for member, heads in zip(self.members, self.groups):
            own, shared = np.array(heads), np.array(heads) // group_size
            yield member, q[:, :, own], k[:, :, shared], (raw[0][:, :, own], raw[1][:, :, shared])

    def choose(self, q, k, offset, key, raw):
        rows, kv_len = self.rows(offset), k.shape[1]
        blocks, columns, most = [], [], 1
        for member, *part in self._parts(q, k, raw):
            choice = member.choose(part[0], part[1], offset, key, part[2])
            named = jnp.asarray(choice.blocks)
            if member.rows(offset) != rows:
                named = jnp.repeat(named, member.rows(offset) // rows, 2)[:, :, : -(-q.shape[1] // rows)]
            blocks.append(jnp.broadcast_to(named, (q.shape[0], part[0].shape[2], *named.shape[2:])))
            none = jnp.full((*blocks[-1].shape[:2], 0), kv_len, jnp.int32)
            columns.append(none if choice.columns is None else jnp.broadcast_to(
                choice.columns, (*blocks[-1].shape[:2], choice.columns.shape[-1])))  # fmt: skip
            most = max(most, choice.most)
        back = np.argsort(np.concatenate([np.array(group) for group in self.groups]))
        width = max(part.shape[-1] for part in columns)
        blocks = jnp.concatenate(blocks, 1)[:, back]
        if not width:
            return Choice(blocks, most)
        fill = lambda part: jnp.pad(part, ((0, 0), (0, 0), (0, width - part.shape[-1])), constant_values=kv_len)
        return Choice(blocks, most, jnp.concatenate([fill(part) for part in columns], 1)[:, back])

    def loss(self, q, k, raw):
        total: dict[str, jax.Array] = {}
        for member, *part in self._parts(q, k, raw):
            for name, value in member.loss(*part).items():
                total[name] = total.get(name, 0.0) + value * part[0].shape[2] / self.heads
        return total
