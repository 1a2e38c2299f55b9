"""Layers of spiking neurons: `spikes, state = neuron(current[T, B, *space, C], state=None, train=...)`.

What they compute is `lissom.ops.spiking.spike_scan`; here stand the numbers that are learned, and the normalisation of
the membrane potential, which has to look at all neurons of a batch at every step.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from lissom.models.norms import BatchNorm
from lissom.models.spiking.membrane_norm import folded_threshold, sign
from lissom.models.variables import Frozen, Param
from lissom.ops.spiking import RESETS, State, spike_scan
from lissom.ops.spiking.surrogates import SURROGATES

MEMBRANE_NORMS = ("none", "channel", "element")


class Neuron(nnx.Module):
    """C channels of neurons, of which a subclass names the rates:

        h_t = decay v_{t-1} + current_t;    s_t = 1 where h_t >= threshold, else 0;    v_t by the reset

    threshold: above 0. learn_threshold: it is a parameter, one of the layer (as in DIET-SNN and IIR-SNN, Chowdhury et
    al. 2021, arXiv:2110.05929), whose softplus is used, so that it stays above 0.
    reset: "hard" (to 0), "soft" (less the threshold) or "none". attached, surrogate, slope: as `spike_scan` has them.
    initial: the potential in front of the first step, in thresholds; 0.5 makes the spikes of an IF neuron the rounded
    and not the truncated share of the current (Bu et al. 2022, arXiv:2303.04347).

    membrane_norm puts BatchNorm in front of the comparison (MPBN, Guo et al. 2023, arXiv:2308.08359):

        s_t = 1 where BN(h_t) >= threshold;    v_t = 0 where s_t = 1, else h_t itself

    with one BN for all steps: in training it takes the statistics of each step, one after the other, which no fused
    scan can. "channel" has one mean, variance, scale and bias a channel, "element" one a neuron. In evaluation it is
    what the comparison says of h_t (`folded_threshold`), and the scan is the fused one again. The statistics of
    evaluation are means over the steps, those of training each step's own: where many neurons have the same potential
    (the background of a picture), a small difference moves all of them over the threshold, and evaluation is another
    network than training was. `fold` keeps that form and drops the norm.
    """

    # What a neuron keeps from step to step, and multiplies at each.
    states, multiplications = 1, 1

    def __init__(
        self,
        channels: int,
        space: Sequence[int],
        *,
        threshold: float = 1.0,
        learn_threshold: bool = False,
        reset: str = "hard",
        attached: bool = False,
        surrogate: str = "arctan",
        slope: float | None = None,
        initial: float = 0.0,
        membrane_norm: str = "none",
        rngs: nnx.Rngs,
    ):
        if reset not in RESETS:
            raise ValueError(f"neuron.reset={reset!r} must be one of {', '.join(RESETS)}")
        if surrogate not in SURROGATES:
            raise ValueError(f"neuron.surrogate={surrogate!r} must be one of {', '.join(SURROGATES)}")
        if slope is not None and slope <= 0:
            raise ValueError(f"neuron.slope={slope} must be above 0")
        if threshold <= 0:
            raise ValueError(f"neuron.threshold={threshold} must be above 0")
        if membrane_norm not in MEMBRANE_NORMS:
            raise ValueError(f"neuron.membrane_norm={membrane_norm!r} must be one of {', '.join(MEMBRANE_NORMS)}")
        if membrane_norm != "none" and reset != "hard":
            raise ValueError(
                f"neuron.membrane_norm={membrane_norm!r} goes with reset='hard': what it compares is no "
                f"potential that a {reset} reset could take from"
            )
        _fraction(initial=initial)
        if initial and (membrane_norm != "none" or self.states > 1):
            raise ValueError(
                f"neuron.initial={initial} goes with if, lif and plif, whose only state is the potential, without "
                "membrane_norm"
            )
        # softplus(x) = threshold
        # and log(exp(threshold) - 1), which overflows for large ones
        at = threshold + jnp.log(-jnp.expm1(-jnp.array([float(threshold)])))
        self.threshold = Param(at, out_sharding=("norm",)) if learn_threshold else threshold
        self.reset, self.attached, self.surrogate, self.slope = reset, attached, surrogate, slope
        self.initial = initial
        self.features = (*(space if membrane_norm == "element" else ()), channels)
        self.norm = None if membrane_norm == "none" else BatchNorm(math.prod(self.features), rngs=rngs)
        self.signs = None

    def rates(self) -> dict[str, float | jax.Array]:
        """The keyword arguments of `spike_scan` that say how the neuron forgets."""
        raise NotImplementedError

    def limit(self) -> float | jax.Array:
        """The threshold: a number, [1], or of folded neurons one of each channel or neuron."""
        if isinstance(self.threshold, Frozen):
            return self.threshold[...]
        return jax.nn.softplus(self.threshold[...]) if isinstance(self.threshold, Param) else self.threshold

    def __call__(self, current: jax.Array, state: State | None = None, *, train: bool):
        if self.norm is not None and train:
            return self._normed(current, state)
        limit, signs = self.folded()
        if state is None and self.initial:
            state = State(jnp.broadcast_to(self.initial * jnp.asarray(limit), current.shape[1:]))
        kinds = {"reset": self.reset, "attached": self.attached, "surrogate": self.surrogate, "slope": self.slope}
        if signs is None:
            return spike_scan(current, state, threshold=limit, **self.rates(), **kinds)
        flip = lambda state: None if state is None else State(*(None if x is None else signs * x for x in state))
        # Where the scale is below 0 the comparison points the other way: it is that of the mirrored neuron.
        spikes, after = spike_scan(
            signs.astype(current.dtype) * current, flip(state), threshold=limit, **self.rates(), **kinds
        )
        return spikes, flip(after)

    def folded(self) -> tuple[float | jax.Array, jax.Array | None]:
        """(the threshold, the signs of the potentials that it is compared with; None: all 1) of evaluation."""
        if self.norm is None:
            return self.limit(), None if self.signs is None else self.signs[...]
        limit, signs = folded_threshold(self.norm, self.limit()), sign(self.norm)
        return limit.reshape(self.features), signs.reshape(self.features)

    def fold(self, *, keep_signs: bool = False) -> jax.Array | None:
        """Drops the norm, in place: thresholds become an array. Gives the signs [C] that the weights in front have to
        take; those of single neurons stay here, since a convolution has one weight for all places, and where
        `keep_signs` those of channels too: then None."""
        limit, signs = self.folded()
        self.norm = None
        self.hold(limit)
        if len(self.features) == 1 and not keep_signs:
            return signs
        self.signs = nnx.data(Frozen(signs, out_sharding=self._axes()))
        return None

    def hold(self, limits: jax.Array) -> None:
        """From here on thresholds are these, [C] or of each neuron [*space, C], of any sign, and not learned."""
        self.features = limits.shape
        self.threshold = nnx.data(Frozen(limits, out_sharding=self._axes()))

    def _axes(self) -> tuple[str | None, ...]:
        return (*(None,) * (len(self.features) - 1), "norm")

    def _normed(self, current: jax.Array, state: State | None):
        decay, limit, wide = self.rates()["decay"], self.limit(), jnp.promote_types(current.dtype, jnp.float32)
        v, spikes = jnp.zeros(current.shape[1:], wide) if state is None else state.v, []
        width = self.norm.mean[...].size
        for now in current:
            h = decay * v + now.astype(wide)
            normed = self.norm(h.reshape(-1, width), train=True).reshape(h.shape)
            # A step of a neuron that forgets all and is not reset: the comparison alone, with its surrogate.
            fired, _ = spike_scan(
                normed[None], threshold=limit, decay=0.0, reset="none", surrogate=self.surrogate, slope=self.slope
            )
            cleared = fired[0] if self.attached else jax.lax.stop_gradient(fired[0])
            v = (1 - cleared) * h
            spikes.append(fired[0].astype(current.dtype))
        return jnp.stack(spikes), State(v)


class IF(Neuron):
    """Integrates and fires: nothing leaks (decay 1)."""

    multiplications = 0

    def rates(self):
        return {"decay": 1.0}


class LIF(Neuron):
    """Leaks: h_t = decay v_{t-1} + current_t, decay in [0, 1]."""

    def __init__(self, channels: int, space: Sequence[int], *, decay: float = 0.5, rngs: nnx.Rngs, **settings):
        _fraction(decay=decay)
        super().__init__(channels, space, rngs=rngs, **settings)
        self.decay = decay

    def rates(self):
        return {"decay": self.decay}


class PLIF(Neuron):
    """Leaks by a decay that is learned, the sigmoid of one parameter a layer (Fang et al. 2021, arXiv:2007.05785;
    their current is weighed by 1 - decay besides, which the weights in front can do). `decay`: at the beginning."""

    def __init__(self, channels: int, space: Sequence[int], *, decay: float = 0.5, rngs: nnx.Rngs, **settings):
        if not 0 < decay < 1:
            raise ValueError(f"neuron.decay={decay} must be between 0 and 1")
        super().__init__(channels, space, rngs=rngs, **settings)
        self.decay = Param(jnp.log(jnp.array([decay / (1 - decay)])), out_sharding=("norm",))

    def rates(self):
        return {"decay": jax.nn.sigmoid(self.decay[...])}


class ALIF(LIF):
    """A LIF neuron whose threshold rises by `adaptation_step` with each spike and falls back by `adaptation_decay` a
    step (Bellec et al. 2018, arXiv:1803.09574)."""

    states, multiplications = 2, 3

    def __init__(
        self,
        channels: int,
        space: Sequence[int],
        *,
        adaptation_decay: float = 0.9,
        adaptation_step: float = 0.2,
        rngs: nnx.Rngs,
        **settings,
    ):
        _fraction(adaptation_decay=adaptation_decay)
        super().__init__(channels, space, rngs=rngs, **settings)
        _plain(self, "alif")
        self.adaptation = {"adaptation_decay": adaptation_decay, "adaptation_step": adaptation_step}

    def rates(self):
        return super().rates() | self.adaptation


class CUBA(LIF):
    """A current-based LIF neuron: its current i_t = current_decay i_{t-1} + current_t leaks too."""

    states, multiplications = 2, 2

    def __init__(self, channels: int, space: Sequence[int], *, current_decay: float = 0.5, rngs: nnx.Rngs, **settings):
        _fraction(current_decay=current_decay)
        super().__init__(channels, space, rngs=rngs, **settings)
        _plain(self, "cuba")
        self.current_decay = current_decay

    def rates(self):
        return super().rates() | {"current_decay": self.current_decay}


def _fraction(**settings: float) -> None:
    for name, value in settings.items():
        if not 0 <= value <= 1:
            raise ValueError(f"neuron.{name}={value} must be at least 0 and at most 1")


def _plain(neuron: Neuron, name: str) -> None:
    if neuron.norm is not None:
        raise ValueError(
            f"neuron.membrane_norm goes with if, lif and plif, whose only state is the potential; not {name}"
        )
