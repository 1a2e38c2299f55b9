"""Spiking neurons over time."""

import math
from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Float

from lissom.ops import dispatch
from lissom.ops.spiking.neuron import Rates, Rule, State
from lissom.ops.spiking.surrogates import SURROGATES

__all__ = ["OP", "RESETS", "State", "spike_scan"]

OP = dispatch.Op(
    name="spiking",
    implementations={
        "reference": "lissom.ops.spiking.reference",
        "xla": "lissom.ops.spiking.xla",
        # Never run on their hardware: in no default order.
        "pallas_gpu": "lissom.ops.spiking.pallas_gpu",
        "pallas_tpu": "lissom.ops.spiking.pallas_tpu",
    },
    defaults={"default": ("xla",)},
)
RESETS = ("hard", "soft", "none")


def spike_scan(
    current: Float[Array, "t ..."],
    state: State | None = None,
    *,
    decay: float | Array = 1.0,
    threshold: float | Array = 1.0,
    current_decay: float | Array | None = None,
    adaptation_decay: float | Array | None = None,
    adaptation_step: float | Array | None = None,
    reset: str = "hard",
    reset_to: float = 0.0,
    attached: bool = False,
    surrogate: str = "arctan",
    slope: float | None = None,
    implementation: str | Sequence[str] | None = None,
) -> tuple[Float[Array, "t ..."], State]:
    """Spikes of neurons that are driven by `current` for t steps, and their state behind the last.

        i_t = g i_{t-1} + current_t                    g = current_decay; without one i_t = current_t
        q_t = threshold + d a_{t-1}                    d = adaptation_step; without one q_t = threshold
        h_t = decay v_{t-1} + i_t
        s_t = 1 where h_t >= q_t, else 0
        v_t = reset_to where s_t = 1, else h_t         reset "hard"
            = h_t - q_t s_t                            reset "soft"
            = h_t                                      reset "none"
        a_t = c a_{t-1} + s_t                          c = adaptation_decay

    With decay 1 it integrates and fires (IF); below it leaks (LIF), and where decay is a parameter that is learned it
    is parametric (PLIF; Fang et al. 2021, arXiv:2007.05785, have it as a sigmoid of the parameter, and may weigh
    currents by 1 - decay, which is the caller's affair); with g it is current-based, with c and d adaptive (Bellec et
    al. 2018, arXiv:1803.09574). Sources differ in whether a soft reset takes the adapted threshold; here it does.

    current: [t, ...], time first, then the batch, then what else there is of neurons; float32, bfloat16, float16 or
    float64. Spikes have its shape and dtype; states are float32, or float64 for float64.
    state: that of an earlier call, of which this goes on; None: zeros.
    decay, threshold, current_decay, adaptation_decay, adaptation_step: numbers, or arrays whose shapes broadcast to
    the neurons ([...] without t). The last two come together. All, the current and the state may be differentiated.
    reset_to: a number. attached: whether gradients pass the reset's s_t, by the surrogate; to a_t they pass always.
    surrogate, slope: the derivative of s_t by h_t - q_t is SURROGATES[surrogate] of it
    (`lissom.ops.spiking.surrogates`); None: its default slope.

    A neuron whose current was NaN does not spike from there on. ValueError names the argument that does not fit;
    NotImplementedError comes from an implementation that was asked for by name and cannot do the request.
    """
    if not hasattr(current, "dtype") or not jnp.issubdtype(current.dtype, jnp.floating):
        raise ValueError(f"current is a float array, got {getattr(current, 'dtype', type(current).__name__)}.")
    if current.ndim < 1 or 0 in current.shape:
        raise ValueError(f"current is [time, ...] and not empty, got shape {current.shape}.")
    if reset not in RESETS:
        raise ValueError(f"reset is one of {', '.join(RESETS)}, got {reset!r}.")
    if surrogate not in SURROGATES:
        raise ValueError(f"surrogate is one of {', '.join(SURROGATES)}, got {surrogate!r}.")
    slope = SURROGATES[surrogate].slope if slope is None else float(slope)
    if not 0 < slope < math.inf:
        raise ValueError(f"slope is above 0, got {slope}.")
    if (adaptation_decay is None) != (adaptation_step is None):
        raise ValueError("adaptation_decay and adaptation_step come together.")
    neurons, wide = current.shape[1:], jnp.promote_types(current.dtype, jnp.float32)
    given = {
        "decay": decay,
        "threshold": threshold,
        "current_decay": current_decay,
        "adaptation_decay": adaptation_decay,
        "adaptation_step": adaptation_step,
    }
    rates = Rates(**{name: None if rate is None else jnp.asarray(rate, wide) for name, rate in given.items()})
    for name, rate in rates._asdict().items():
        if rate is not None and not _broadcasts(rate.shape, neurons):
            raise ValueError(f"{name} broadcasts to the neurons {neurons}, got shape {rate.shape}.")
    state = _state(state, rates, neurons, wide)
    rule = Rule(reset, float(reset_to), bool(attached), surrogate, slope)
    of_neurons = ("batch", *(None,) * (len(neurons) - 1))[: len(neurons)]
    dims = lambda array: None if array is None else of_neurons[len(neurons) - array.ndim :]
    state_dims = State(*(dims(part) for part in state))
    return dispatch.call(
        OP,
        operands=(current, state, rates),
        options={"rule": rule},
        implementation=implementation,
        operand_dims=((None, *of_neurons), state_dims, Rates(*(dims(rate) for rate in rates))),
        result_dims=((None, *of_neurons), state_dims),
    )


def _broadcasts(shape: tuple[int, ...], to: tuple[int, ...]) -> bool:
    return len(shape) <= len(to) and all(a in (1, b) for a, b in zip(shape[::-1], to[::-1]))


def _state(state: State | None, rates: Rates, neurons: tuple[int, ...], wide) -> State:
    has = State(True, rates.current_decay is not None, rates.adaptation_decay is not None)
    if state is None:
        return State(*(jnp.zeros(neurons, wide) if part else None for part in has))
    for name, part, needed in zip(State._fields, state, has, strict=True):
        if (part is not None) != needed:
            raise ValueError(f"state.{name} is {'missing' if needed else 'of no use'} for this neuron.")
        if part is not None and part.shape != neurons:
            raise ValueError(f"state.{name} has the shape {neurons} of the neurons, got {part.shape}.")
    return State(*(None if part is None else part.astype(wide) for part in state))
