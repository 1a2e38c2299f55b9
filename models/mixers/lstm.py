"""Long short-term memory as a mixer: what a sequence has been is a state of fixed size."""

from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from lissom.models.bounds import UnsupportedForm, at_least_one
from lissom.models.context import Context
from lissom.models.ffn import NO_AUX
from lissom.models.linear import KERNEL_INIT, Linear
from lissom.models.variables import Param
from lissom.ops.attention import masks

GATES = 4  # input, forget, output, candidate, in this order
FORGET_BIAS = 1.0


class LSTM(nnx.Module):
    """Hochreiter & Schmidhuber 1997 (doi:10.1162/neco.1997.9.8.1735) with the forget gate of Gers et al. 2000
    (doi:10.1162/089976600300015015), a step a token, over `hidden` = N cells (None: as many as the width):

        i, f, o, g = x_t Wx + h_{t-1} Wh + b        [N] each
        c_t = sigmoid(f) c_{t-1} + sigmoid(i) tanh(g)
        h_t = sigmoid(o) tanh(c_t)                  h_{-1} = c_{-1} = 0
        y_t = h_t Wo

    Left open and chosen here: b begins as 1 in the forget gate (Jozefowicz et al. 2015) and 0 elsewhere, kernels with
    variance 1 / fan-in, no peepholes; Wo, as in attention, lets N differ from the width. `heads` is what every mixer is
    given: it has none, and does not read it. Products are in `dtype`, gates and state in float32.

    It reads every token before t and no other: UnsupportedForm under a mask that is not causal alone, and for several
    documents in one sequence. Cache: h, c [B, N] in float32 and the length, whatever the length is.
    """

    cache_axes: ClassVar = {"h": ("batch", "mlp"), "c": ("batch", "mlp"), "length": ("batch",)}

    def __init__(
        self, width: int, *, heads: int, hidden: int | None = None, dtype: jnp.dtype = jnp.float32, rngs: nnx.Rngs
    ):
        del heads
        at_least_one("mixer", hidden=hidden)
        hidden = width if hidden is None else hidden
        self.x = Linear(width, (GATES, hidden), axes=("embed", None, "mlp"), bias=False, dtype=dtype, rngs=rngs)
        recurrent = KERNEL_INIT(rngs.params(), (hidden, GATES * hidden), jnp.float32)
        self.kernel = Param(recurrent.reshape(hidden, GATES, hidden), out_sharding=(None, None, "mlp"))
        self.bias = Param(jnp.zeros((GATES, hidden)).at[1].set(FORGET_BIAS), out_sharding=(None, "mlp"))
        self.o = Linear(hidden, width, axes=("mlp", "embed"), bias=False, dtype=dtype, rngs=rngs)
        self.hidden, self.dtype = hidden, dtype

    def init_cache(self, batch: int, length: int, dtype: jnp.dtype) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes of the cache for `batch` sequences."""
        del length, dtype  # what every step adds to is not rounded
        entry = jax.ShapeDtypeStruct((batch, self.hidden), jnp.float32)
        return {"h": entry, "c": entry, "length": jax.ShapeDtypeStruct((batch,), jnp.int32)}

    def __call__(self, x: jax.Array, context: Context, cache: dict | None = None, key: jax.Array | None = None):
        del key
        if context.segments is not None or not isinstance(context.mask, masks.Causal):
            raise UnsupportedForm(
                f"lstm reads all of a sequence up to a token: it takes a causal mask alone, not {context.mask!r:.60}."
            )
        # A kernel and a bias as arrays: a module is not called inside of what scan traces.
        kernel, bias = self.kernel[...].astype(self.dtype), self.bias[...]
        given = jnp.swapaxes(self.x(x), 0, 1)  # of all tokens in one product, time in front
        if cache is None:
            state = (jnp.zeros((x.shape[0], self.hidden)),) * 2
        else:
            state = cache["h"], cache["c"]

        def step(state, of_token):
            h, c = state
            gates = of_token + jnp.einsum("bn,ngm->bgm", h.astype(self.dtype), kernel)
            i, f, o, g = jnp.moveaxis(gates.astype(jnp.float32) + bias, 1, 0)
            c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
            h = jax.nn.sigmoid(o) * jnp.tanh(c)
            return (h, c), h.astype(self.dtype)

        (h, c), y = jax.lax.scan(step, state, given)
        y = self.o(jnp.swapaxes(y, 0, 1))
        if cache is None:
            return y, None, NO_AUX
        return y, {"h": h, "c": c, "length": cache["length"] + x.shape[1]}, NO_AUX
