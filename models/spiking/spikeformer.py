"""Meta-SpikeFormer, the second Spike-driven Transformer: stages of spiking convolutions, then of spiking attention."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lissom.models.bounds import at_least_one, shape_of
from lissom.models.linear import Linear
from lissom.models.registry import construct
from lissom.models.spiking import ACTIVATIONS
from lissom.models.spiking.layers import Work
from lissom.models.spiking.spike_attention import THRESHOLDS, SpikeAttention
from lissom.models.spiking.spike_maps import DepthwiseSeparable, NormedConv, SpikeMap
from lissom.models.spiking.stepwise import Entered, StepwiseNetwork, entered_or_not
from lissom.models.spiking.walk import Walk

SHORTCUTS = ("membrane", "vanilla", "spike")


class Chain(nnx.Module):
    """Spikes -> currents: map, neurons, map, ..., map; `neurons` stand between the maps."""

    def __init__(self, maps: Sequence[SpikeMap], neurons: Sequence[nnx.Module]):
        self.maps, self.neurons = nnx.List(maps), nnx.List(neurons)

    def __call__(self, x: jax.Array, walk: Walk, binary: bool) -> jax.Array:
        for number, layer in enumerate(self.maps):
            if number:
                x = walk.fire(self.neurons[number - 1], x)
            x = walk.map(layer, x, binary=binary or number > 0)
        return x


class Branch(nnx.Module):
    """A residual branch F around which the stream x passes, with its neurons SN by the `shortcut`:

    membrane    x + F(SN(x))    x: currents (MS; Hu et al. 2021, arXiv:2112.08954); all that F sees is 0 or 1
    vanilla     SN(x + F(x))    x: spikes, added to the currents of the next ones (VS; Zheng et al. 2021,
                                arXiv:2011.05280); what F sees is 0 or 1
    spike       x + SN(F(x))    x: sums of spikes (SEW; Fang et al. 2021, arXiv:2102.04159), which are integers:
                                the first maps of F multiply them
    """

    def __init__(self, inner: nnx.Module, neuron: nnx.Module, shortcut: str):
        self.inner, self.neuron, self.shortcut = inner, neuron, shortcut

    def __call__(self, x: jax.Array, walk: Walk) -> jax.Array:
        if self.shortcut == "membrane":
            return x + self.inner(walk.fire(self.neuron, x), walk, True)
        if self.shortcut == "vanilla":
            return walk.fire(self.neuron, x + self.inner(x, walk, True))
        return x + walk.fire(self.neuron, self.inner(x, walk, False))


class Spikeformer(StepwiseNetwork):
    """inputs [B, rows, columns, C], or with an encoding of timed examples [B, T, rows, columns, C] -> logits [B,
    classes] (Yao et al. 2024, arXiv:2404.03663).

    Stage i begins with a convolution of stride `strides[i]` to `widths[i]` channels, the stem (`stem` x `stem`, of the
    values themselves) or one of 3 x 3, and has `depths[i]` blocks of two residual branches (`Branch`). Spike, product,
    BatchNorm is the order everywhere, SN the neurons, C the width:

        the first `convolutional` stages    1 x 1 to `separable` C, SN, depthwise `kernel` x `kernel`, 1 x 1 to C;
                                            then 3 x 3 to `expansion` C, SN, 3 x 3 to C
        the others                          `SpikeAttention` with `heads` heads;
                                            then 1 x 1 to `expansion` C, SN, 1 x 1 to C

    and logits are a linear head on the mean over places of the last spikes. There are no positions: the convolutions
    see the border. The paper's network is five of these stages (it calls the first two one) with 1, 1, 2, 6, 2 blocks
    and strides 2, 2, 2, 2, 1, the first three convolutional, a stem and kernels of 7, and 8 heads.

    neuron: one that spikes, of `ACTIVATIONS`, everywhere; `attention_threshold` is that within the attention (None:
    the paper's, see there). attention: of `THRESHOLDS`. The paper's training has a teacher besides, and drops
    branches; here are neither.
    """

    def __init__(
        self,
        *,
        input_shape: Sequence[int],
        classes: int,
        widths: Sequence[int],
        depths: Sequence[int],
        strides: Sequence[int],
        convolutional: int,
        heads: int,
        stem: int = 7,
        kernel: int = 7,
        separable: int = 2,
        expansion: int = 4,
        attention: str = "sdsa3",
        attention_threshold: float | None = None,
        shortcut: str = "membrane",
        neuron: str = "lif",
        neuron_kwargs: Mapping[str, Mapping[str, Any]] | None = None,
        dtype: jnp.dtype = jnp.float32,
        rngs: nnx.Rngs,
        **settings,
    ):
        at_least_one(
            "model", widths=widths, depths=depths, strides=strides, heads=heads, stem=stem, kernel=kernel,
            separable=separable, expansion=expansion,
        )  # fmt: skip
        _check_sizes(widths, depths, strides, convolutional, heads, kernel)
        _check_names(attention, attention_threshold, shortcut)
        super().__init__(input_shape=input_shape, classes=classes, dtype=dtype, rngs=rngs, **settings)
        if self.decoder.spiking:
            decoding = settings["decoding"]
            raise ValueError(f"model.decoding={decoding!r} reads spikes, and the head of a spikeformer has no neurons")
        *space, channels = shape_of("spikeformer", self.encoded, "rows, columns, channels")
        self.shortcut = shortcut
        if not construct(ACTIVATIONS, neuron, neuron_kwargs, "neuron", channels=1, space=(), rngs=rngs).states:
            raise ValueError(f"model.neuron={neuron!r} does not spike, and a spikeformer has no dense twin")
        chosen = {"neuron": neuron, "neuron_kwargs": neuron_kwargs}
        of_attention = {"heads": heads, "form": attention, "threshold": attention_threshold, **chosen}
        kinds, before = {"dtype": dtype, "rngs": rngs}, channels
        entries, edges, stages, is_membrane = [], [], [], shortcut == "membrane"
        for number, (width, depth, stride) in enumerate(zip(widths, depths, strides, strict=True)):
            # Neurons in front of each of these but the stem, or behind all of them.
            if is_membrane and number:
                edges.append(_neurons(chosen, space, rngs)(before))
            entries.append(NormedConv(before, width, 3 if number else stem, stride=stride, **kinds))
            space, before = tuple(-(-size // stride) for size in space), width
            neurons = _neurons(chosen, space, rngs)
            if not is_membrane:
                edges.append(neurons(width))
            blocks = []
            for _ in range(depth):
                if number < convolutional:
                    parts = _convolutions(width, neurons, kernel, separable, expansion, **kinds)
                else:
                    mixer = SpikeAttention(width, neurons=neurons, **of_attention, **kinds)
                    parts = (mixer, _expanded(width, neurons, 1, expansion, **kinds))
                blocks += [Branch(part, neurons(width), shortcut) for part in parts]
            stages.append(nnx.List(blocks))
        if is_membrane:
            edges.append(neurons(before))
        self.entries, self.edges, self.stages = nnx.List(entries), nnx.List(edges), nnx.List(stages)
        self.head = Linear(before, classes, axes=("mlp", "classes"), rngs=rngs)

    @property
    def is_spiking(self) -> bool:
        return True

    def start(self, batch: int) -> tuple:
        return None, self.decoder.start(batch, self.classes)

    def entered(self, x: jax.Array) -> Entered:
        stem = lambda x: self.entries[0](x.astype(self.dtype), train=False)
        return Entered(x, jax.vmap(stem)(x))

    def advance(self, x: jax.Array | Entered, steps: int, carry: tuple, *, train: bool = False):
        walk = Walk(steps, carry[0], train=train)
        outputs = self._outputs(x, walk)
        scores, decoded = self.decoder(outputs, carry[1])
        return scores, (tuple(walk.states), decoded), jnp.array(walk.activity, jnp.float32)

    def work(self) -> list[Work]:
        """What each row of the activity is for one example: maps in their order, of each attention q, k, v, its
        products and its last map; the head."""
        walk = Walk(self.steps, train=False)
        steps = 1 if self.encoder.repeats else self.steps
        x = jax.ShapeDtypeStruct((steps, 1, *self.encoded), self.dtype)
        jax.eval_shape(lambda x: self._outputs(x, walk), x)
        return walk.work

    def _outputs(self, x: jax.Array | Entered, walk: Walk) -> jax.Array:
        """float32 [steps, B, classes], what the head says of each step."""
        x, current = entered_or_not(x)
        x, is_membrane, edges = x.astype(self.dtype), self.shortcut == "membrane", iter(self.edges)
        for number, (entry, blocks) in enumerate(zip(self.entries, self.stages, strict=True)):
            if number and is_membrane:
                x = walk.fire(next(edges), x)
            binary = self.shortcut != "spike" if number else self.encoder.binary
            events = number > 0 or not self.encoder.repeats
            x = walk.map(entry, x, binary=binary, events=events, known=None if number else current)
            if not is_membrane:
                x = walk.fire(next(edges), x)
            for block in blocks:
                x = block(x, walk)
        if is_membrane:
            x = walk.fire(next(edges), x)
        places = x.shape[2] * x.shape[3]
        features = places * x.shape[-1]
        walk.row(
            (x != 0).astype(jnp.float32).sum() * self.classes,
            x.shape[1],
            products=features * self.classes,
            passes=len(x),
            weights=x.shape[-1] * self.classes,
            inputs=features,
            outputs=self.classes,
            binary=self.shortcut != "spike",
        )
        # Of the spikes and then the mean over places: a mean of spikes is none, and a product with it multiplies.
        return self.head(x.astype(jnp.float32)).mean((2, 3))


def _neurons(chosen: Mapping[str, Any], space: Sequence[int], rngs: nnx.Rngs) -> Callable[[int], nnx.Module]:
    """Makes neurons of so many channels in that space."""
    kind, settings = chosen["neuron"], chosen["neuron_kwargs"]
    return lambda width: construct(ACTIVATIONS, kind, settings, "neuron", channels=width, space=tuple(space), rngs=rngs)


def _convolutions(width, neurons, kernel: int, separable: int, expansion: int, **kinds) -> tuple[Chain, Chain]:
    wide = separable * width
    maps = [NormedConv(width, wide, 1, **kinds), DepthwiseSeparable(wide, width, kernel, **kinds)]
    return Chain(maps, [neurons(wide)]), _expanded(width, neurons, 3, expansion, **kinds)


def _expanded(width: int, neurons, size: int, expansion: int, **kinds) -> Chain:
    wide = expansion * width
    return Chain([NormedConv(width, wide, size, **kinds), NormedConv(wide, width, size, **kinds)], [neurons(wide)])


def _check_sizes(widths, depths, strides, convolutional: int, heads: int, kernel: int) -> None:
    if not len(widths) == len(depths) == len(strides):
        given = f"model.widths {tuple(widths)}, model.depths {tuple(depths)} and model.strides {tuple(strides)}"
        raise ValueError(f"{given} must be as long as each other")
    if not 0 <= convolutional <= len(widths):
        raise ValueError(f"model.convolutional={convolutional} must be at least 0 and at most the {len(widths)} stages")
    if kernel % 2 == 0:
        raise ValueError(f"model.kernel={kernel} must be odd")
    for width in widths[convolutional:]:
        if width % heads:
            raise ValueError(f"model.heads={heads} must divide the width {width} of a stage with attention")


def _check_names(attention: str, threshold: float | None, shortcut: str) -> None:
    if attention not in THRESHOLDS:
        raise ValueError(f"model.attention={attention!r} must be one of {', '.join(THRESHOLDS)}")
    if threshold is not None and threshold <= 0:
        raise ValueError(f"model.attention_threshold={threshold} must be above 0")
    if shortcut not in SHORTCUTS:
        raise ValueError(f"model.shortcut={shortcut!r} must be one of {', '.join(SHORTCUTS)}")
