"""The Block Transformer: a decoder over blocks of tokens, and one within a block."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lissom.models.bounds import at_least_one
from lissom.models.context import Context
from lissom.models.language import LanguageModel
from lissom.models.linear import Embedding, Linear, needed
from lissom.models.mixers.caches import advanced, chosen
from lissom.models.transformer import Transformer
from lissom.models.variables import Param
from lissom.ops.attention import masks

PAD = -1  # stands where a block has no token


class BlockTransformer(LanguageModel):
    """inputs int32 [B, T] -> logits float32 [B, T, vocab] (Ho et al. 2024, arXiv:2406.02657). For blocks of
    L = `block_length` tokens, token j of block i being x_ij:

        b_i       = [E x_i0 | ... | E x_i(L-1)]                 E [vocab, M / L], concatenated to M entries
        c_i       = norm(lower layers)(b_0 .. b_i)              causal over the blocks: the block decoder
        h_i       = norm(upper layers)(W_1 c_(i-1), ..., W_P c_(i-1), U x_i0, ..., U x_i(L-2))        the token decoder
        logits of x_ij = h_i(P-1+j) U^T                         U [vocab, M] is its own table (`tied`), P = `prefix`

    Attention over the sequence is left to the lower `block_depth` of `depth` layers (None: half of them) and sees one
    entry a block; the upper layers see P + L - 1 positions, folded into the batch. Other settings are those of
    `LanguageModel` and hold for both decoders; a tuple of mixers repeats over each.

    The first token is the first block, behind L - 1 pads (an entry of their own in E), so that every prediction has a
    block in front of it: the authors' code predicts nothing inside the first block either, and pads prompts on the left
    to whole blocks. With `random_padding` training draws 0 .. L - 1 pads for each sequence, as theirs does, and a
    sequence may begin anywhere in a block: predictions inside the first block then stand behind a learned c, a choice
    made here (the objective scores them), and pads have an entry in U's place too.

    The cache holds an entry a block for the lower layers, at most P + L - 1 positions for the upper ones, and the open
    block: its tokens and c. A step runs the block decoder only where it ends a block, of any sequence of the batch (of
    two branches of `cond`, both run where some sequences end one and others do not): decode sequences of one phase
    together, which `padding` can give prompts of different lengths.

    Chosen here: a norm behind each decoder; how the learned vectors begin (pads as rows of the tables, c normal, as
    a norm leaves it); positions are the mixers', of blocks below, and within a prefix and its block above.
    """

    places_tokens = False  # of two decoders each has rows of its own

    def __init__(
        self,
        *,
        vocab_size: int,
        width: int,
        depth: int,
        block_length: int = 4,
        prefix: int = 2,
        block_depth: int | None = None,
        random_padding: bool = True,
        mixer: str | Sequence[str] = "attention",
        ffn: str | Sequence[str] = "swiglu",
        norm: str = "rmsnorm",
        tied: bool = True,
        learned_positions: int = 0,
        embedding_multiplier: float | None = None,
        dtype: jnp.dtype = jnp.float32,
        rngs: nnx.Rngs,
        **settings,
    ):
        at_least_one("model", width=width, block_length=block_length, prefix=prefix, block_depth=block_depth)
        if width % block_length:
            raise ValueError(f"model.width={width} must be a multiple of model.block_length={block_length}")
        lower = depth // 2 if block_depth is None else block_depth
        if not 1 <= lower < depth:
            raise ValueError(f"model.depth={depth} and block_depth={block_depth} must leave each decoder a layer")
        if learned_positions:
            raise ValueError(f"model.learned_positions={learned_positions} must be 0: positions are those of mixers")
        both = {"mixer": mixer, "ffn": ffn, "norm": norm, "dtype": dtype, "rngs": rngs, **settings}
        # The token decoder is this network's own stack and ends.
        ends = {"tied": tied, "embedding_multiplier": embedding_multiplier}
        super().__init__(vocab_size=vocab_size, width=width, depth=depth - lower, **ends, **both)
        self.block_decoder = Transformer(width=width, depth=lower, **both)
        part = width // block_length
        self.lookup = Embedding(vocab_size, part, multiplier=embedding_multiplier, dtype=dtype, rngs=rngs)
        self.expand = Linear(width, (prefix, width), axes=("embed", None, "mlp"), dtype=dtype, rngs=rngs)
        learned = lambda size, scale: Param(scale * jax.random.normal(rngs.params(), (size,)), out_sharding=("embed",))
        self.pad = learned(part, self.lookup.multiplier * part**-0.5)
        self.token_pad = learned(width, self.embed.multiplier * width**-0.5) if random_padding else None
        self.begin = learned(width, 1.0) if random_padding else None
        self.width, self.block_length, self.prefix = width, block_length, prefix
        self.random_padding = random_padding

    @property
    def period(self) -> int:
        """Decoding costs the same again after so many tokens."""
        return self.block_length

    # ---- the whole sequence ----------------------------------------------------------------------------------------

    def __call__(
        self,
        inputs: jax.Array,
        *,
        train: bool = False,
        key: jax.Array | None = None,
        padding: jax.Array | None = None,
    ):
        """`padding` int [B]: pads in front of each sequence, 0 .. L - 1 (None: L - 1, and drawn from `key` in training
        with `random_padding`)."""
        if padding is None and train and self.random_padding:
            key, pad_key = jax.random.split(needed(key, "random_padding"))
            padding = jax.random.randint(pad_key, inputs.shape[:1], 0, self.block_length)
        keys = (None, None) if key is None else jax.random.split(key)
        filled = self._filled(len(inputs), padding)
        tokens = self._placed(inputs, jnp.full((len(inputs), self.block_length), PAD), filled)
        context = Context(mask=masks.Causal(), train=train)
        contexts, aux = self.block_decoder.features(self._vectors(tokens[:, :-1]), context, keys[0])
        if padding is None:  # nothing is predicted inside the first block
            x, more = self._decoded(contexts, tokens[:, 1:], context, keys[1])
            x = x[:, : inputs.shape[1]]
        else:
            begin = jnp.broadcast_to(self.begin[...].astype(self.dtype), (len(inputs), 1, contexts.shape[2]))
            x, more = self._decoded(jnp.concatenate([begin, contexts], 1), tokens, context, keys[1])
            x = _rows(x, filled + 1, inputs.shape[1])
        return self.logits(x), _joined(aux, more)

    def _filled(self, batch: int, padding: jax.Array | None) -> jax.Array:
        """int32 [B], in front of each sequence."""
        if padding is None:
            return jnp.full(batch, self.block_length - 1)
        if not self.random_padding:
            raise ValueError("padding needs model.random_padding=True, which trains sequences that begin in a block")
        if isinstance(padding, int | Sequence | np.ndarray):
            known = np.asarray(padding)
            if known.size and (known.min() < 0 or known.max() >= self.block_length):
                raise ValueError(f"padding={padding!r:.60} must be 0 to {self.block_length - 1}")
        return jnp.broadcast_to(jnp.asarray(padding, jnp.int32), (batch,))

    def _placed(self, inputs: jax.Array, held: jax.Array, at: jax.Array) -> jax.Array:
        """Tokens by block [B, n, L]: the first `at` of the open block `held` [B, L], then the inputs [B, t]; n blocks
        are begun by every place of the first, and what is behind the inputs is PAD."""
        batch, length = inputs.shape
        blocks = (self.block_length - 1 + length) // self.block_length + 1
        room = jnp.pad(held, ((0, 0), (0, (blocks - 1) * self.block_length)), constant_values=PAD)
        write = jax.vmap(lambda row, new, at: jax.lax.dynamic_update_slice(row, new, (at,)))
        return write(room, inputs.astype(room.dtype), at).reshape(batch, blocks, self.block_length)

    def _vectors(self, tokens: jax.Array) -> jax.Array:
        """Tokens by block [B, n, L] -> what the block decoder reads, [B, n, M]."""
        parts = self.lookup(jnp.maximum(tokens, 0))
        parts = jnp.where(tokens[..., None] == PAD, self.pad[...].astype(parts.dtype), parts)
        return parts.reshape(*tokens.shape[:2], -1)

    def _embedded_tokens(self, tokens: jax.Array) -> jax.Array:
        """Tokens [...] -> what the token decoder reads, [..., M]."""
        x = self.embed(jnp.maximum(tokens, 0))
        if self.token_pad is None:
            return x
        return jnp.where(tokens[..., None] == PAD, self.token_pad[...].astype(x.dtype), x)

    def _decoded(self, contexts: jax.Array, tokens: jax.Array, context: Context, key: jax.Array | None = None):
        """The token decoder on blocks [B, n, L], each behind its context [B, n, M] -> (features [B, n L, M], row r
        predicting place r; aux)."""
        batch, blocks, _ = tokens.shape
        x = jnp.concatenate([self.expand(contexts), self._embedded_tokens(tokens[..., :-1])], 2)
        x, aux = self.features(x.reshape(batch * blocks, *x.shape[2:]), context, key)
        return x[:, self.prefix - 1 :].reshape(batch, blocks * self.block_length, -1), aux

    # ---- through a cache -------------------------------------------------------------------------------------------

    def init_cache(self, batch: int, length: int, padding: jax.Array | None = None) -> dict:
        """An empty cache for `batch` sequences of at most `length` tokens, behind `padding` as in the call. Prompts of
        lengths n end their blocks together behind padding = -n modulo L."""
        filled = self._filled(batch, padding)
        held = jnp.full((batch, self.block_length), PAD)
        context = jnp.zeros((batch, self.width), self.dtype)
        if padding is None:  # the first token ends a block: no prediction reads what is here
            local = self.blocks.init_cache(batch, self._positions, self.dtype)
        else:
            context = context + self.begin[...].astype(self.dtype)
            local = self._reopened(context, held, filled)
        return {
            "blocks": self.block_decoder.blocks.init_cache(batch, self._room(length), self.dtype),
            "local": local,
            "context": context,
            "open": held,
            "padding": filled,
            "length": jnp.zeros(batch, jnp.int32),
        }

    def branch(self, cache: dict, ways: int, more: int) -> dict:
        """As `LanguageModel.branch`: the blocks are shared, each continuation has an open block of its own."""
        at_least_one("branch", ways=ways, more=more)
        repeat = lambda tree: jax.tree.map(lambda rows: jnp.repeat(rows, ways, 0), tree)
        new = {name: repeat(cache[name]) for name in ("context", "open", "padding", "length")}
        new["local"] = self.blocks.each(lambda _, rows: repeat(rows), cache["local"])
        return {**new, "blocks": self.block_decoder.blocks.branch(cache["blocks"], ways, self._room(more))}

    def extend(self, inputs: jax.Array, cache: dict) -> tuple[jax.Array, dict]:
        """As `LanguageModel.extend`. One token goes through the token decoder; one that ends its block goes through the
        block decoder, and only its prefix through the token decoder. Of a chunk both see whole blocks."""
        x, cache = (self._step if inputs.shape[1] == 1 else self._chunk)(inputs, cache)
        return self.logits(x), cache

    @property
    def _positions(self) -> int:
        """Of the token decoder: its last token is in the next block's context only."""
        return self.prefix + self.block_length - 1

    def _room(self, length: int) -> int:
        """Blocks that `length` tokens may begin. A sequence that ends none in a step may be written one too many,
        behind its length, and must have room for it."""
        return -(-(length + self.block_length - 1) // self.block_length)

    def _step(self, inputs: jax.Array, cache: dict) -> tuple[jax.Array, dict]:
        """One token of each sequence [B, 1]."""
        at = cache["length"] + cache["padding"]
        count, place = at // self.block_length, at % self.block_length
        ends = place == self.block_length - 1
        held = jnp.where(jnp.arange(self.block_length) == place[:, None], inputs, cache["open"])

        def inside(local):
            return self.continued(self._embedded_tokens(inputs), local, self.prefix + place)

        def end(blocks, local, x, context):
            fresh, new = self.block_decoder.continued(self._vectors(held[:, None]), blocks, count)
            blocks = self._where(ends, new, blocks)
            begun, new = self._begun(fresh[:, 0])
            local = self.blocks.each(lambda _, *rows: jax.tree.map(lambda a, b: chosen(ends, a, b), *rows), new, local)
            return blocks, local, chosen(ends, begun, x), chosen(ends, fresh[:, 0], context)

        # Neither runs where no sequence needs it.
        nothing = jnp.zeros((*inputs.shape, self.width), self.dtype)
        x, local = jax.lax.cond(~ends.all(), inside, lambda local: (nothing, local), cache["local"])
        state = (cache["blocks"], local, x, cache["context"])
        blocks, local, x, context = jax.lax.cond(ends.any(), end, lambda *state: state, *state)
        new = {"blocks": blocks, "local": local, "context": context, "open": held, "length": cache["length"] + 1}
        return x, {**cache, **new}

    def _chunk(self, inputs: jax.Array, cache: dict) -> tuple[jax.Array, dict]:
        """The t next tokens of each sequence. They end t // L blocks of each, and of some one more."""
        whole, rest = divmod(inputs.shape[1], self.block_length)
        at = cache["length"] + cache["padding"]
        count, place = at // self.block_length, at % self.block_length
        tokens = self._placed(inputs, cache["open"], place)
        contexts, blocks = [cache["context"][:, None]], cache["blocks"]
        if whole:
            fresh, blocks = self.block_decoder.continued(self._vectors(tokens[:, :whole]), blocks, count)
            contexts.append(fresh)
        if rest:
            ends = place + rest >= self.block_length

            def end(blocks):
                x = self._vectors(tokens[:, whole : whole + 1])
                fresh, new = self.block_decoder.continued(x, blocks, count + whole)
                return fresh, self._where(ends, new, blocks)

            nothing = jnp.zeros_like(contexts[0])
            fresh, blocks = jax.lax.cond(ends.any(), end, lambda blocks: (nothing, blocks), blocks)
            contexts.append(fresh)
        contexts = jnp.concatenate(contexts, 1)
        x, _ = self._decoded(contexts, tokens, Context(mask=masks.Causal()))
        last, place_after = jnp.divmod(place + inputs.shape[1], self.block_length)
        context, held = (_rows(array, last, 1)[:, 0] for array in (contexts, tokens))
        new = {"blocks": blocks, "local": self._reopened(context, held, place_after), "context": context, "open": held}
        new["length"] = cache["length"] + inputs.shape[1]
        return _rows(x, place + 1, inputs.shape[1]), {**cache, **new}

    def _where(self, ends: jax.Array, new: list, old: list) -> list:
        """The block decoder's caches, moved on for the sequences that end a block."""
        return self.block_decoder.blocks.each(
            lambda layer, *rows: advanced(ends, *rows, layer.mixer.cache_axes), new, old
        )

    def _begun(self, context: jax.Array) -> tuple[jax.Array, list]:
        """A new block behind its context [B, M] -> (features [B, 1, M] that predict its first token, caches)."""
        local = self.blocks.init_cache(len(context), self._positions, self.dtype)
        x, local = self.continued(self.expand(context), local, jnp.zeros(len(context), jnp.int32))
        return x[:, -1:], local

    def _reopened(self, context: jax.Array, tokens: jax.Array, count: jax.Array) -> list:
        """The token decoder's caches behind a context [B, M] and the first `count` [B] of the tokens [B, L], at most
        L - 1 of them. One by one: a mixer's cache of a sequence cannot be cut back."""
        _, local = self._begun(context)

        def step(local, token):
            place, x = token
            _, new = self.continued(self._embedded_tokens(x[:, None]), local, self.prefix + jnp.full_like(count, place))
            keep = lambda _, *rows: jax.tree.map(lambda a, b: chosen(place < count, a, b), *rows)
            return self.blocks.each(keep, new, local), None

        return jax.lax.scan(step, local, (jnp.arange(self.block_length - 1), tokens[:, :-1].T))[0]


def _joined(lower: dict, upper: dict) -> dict:
    """What both decoders' layers report; the mixers of a pattern may stand in one of them only."""
    losses = {
        name: lower["losses"].get(name, 0.0) + upper["losses"].get(name, 0.0)
        for name in lower["losses"] | upper["losses"]
    }
    metrics = {
        name: jnp.concatenate([aux["metrics"][name] for aux in (lower, upper) if name in aux["metrics"]])
        for name in lower["metrics"] | upper["metrics"]
    }
    return {"losses": losses, "metrics": metrics}


def _rows(x: jax.Array, at: jax.Array, count: int) -> jax.Array:
    """`count` rows of each x[b] from at[b] on."""
    return jax.vmap(lambda rows, at: jax.lax.dynamic_slice_in_dim(rows, at, count))(x, at)
