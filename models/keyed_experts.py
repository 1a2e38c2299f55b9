"""Many tiny classifiers, each with a key: an input asks those whose keys are nearest (class-incremental learning)."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from lissom.models.bounds import at_least_one
from lissom.models.ffn import NO_AUX
from lissom.models.linear import stacked_kernels
from lissom.models.moe.routing import load_metrics
from lissom.models.soft_top_k import soft_top_k
from lissom.models.variables import Frozen, Param


class RandomFeatures(nnx.Module):
    """inputs [B, *spatial, C] -> x [B, F]: tanh of a convolution, a mean over windows, flattened.

        x = mean over windows of `pool` of tanh(conv(inputs, K))        F = filters x product of spatial / pool

    K is drawn by the run's seed and frozen. Each filter sums to 0 over its window and channels and has norm 1, so that
    it tells contrast, not ink, and features have both signs. One or two spatial axes, 'SAME' padding.
    """

    def __init__(
        self,
        input_shape: Sequence[int],
        *,
        filters: int,
        kernel: int,
        pool: int,
        dtype: jnp.dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        *space, channels = input_shape
        if len(space) not in (1, 2):
            raise ValueError(
                f"the model keyed_experts reads examples [length, channels] or [rows, columns, channels], and those of "
                f"the data are {list(input_shape)}"
            )
        if any(size % pool for size in space):
            raise ValueError(f"model.pool={pool} must divide the spatial axes {space} of the examples")
        if kernel ** len(space) * channels < 2:
            raise ValueError(
                f"model.kernel={kernel} sees one number of an example, which has no contrast: take 2 or more"
            )
        drawn = jax.random.normal(rngs.params(), (*(kernel,) * len(space), channels, filters))
        axes = tuple(range(len(space) + 1))
        drawn = drawn - drawn.mean(axes, keepdims=True)
        self.kernel = Frozen(drawn / jnp.sqrt(jnp.square(drawn).sum(axes, keepdims=True)))
        self.pool, self.spatial, self.dtype = pool, len(space), dtype
        self.size = filters
        for size in space:
            self.size *= size // pool

    def __call__(self, inputs: jax.Array) -> jax.Array:
        letters = "XY"[: self.spatial]
        y = jax.lax.conv_general_dilated(
            inputs.astype(self.dtype),
            self.kernel[...].astype(self.dtype),
            (1,) * self.spatial,
            "SAME",
            dimension_numbers=(f"N{letters}C", f"{letters}IO", f"N{letters}C"),
        )
        y = jnp.tanh(y.astype(jnp.float32))
        batch, *space, filters = y.shape
        cut = [part for size in space for part in (size // self.pool, self.pool)]
        pooled = y.reshape(batch, *cut, filters).mean(tuple(range(2, 2 + 2 * self.spatial, 2)))
        return pooled.reshape(batch, -1)


class KeyedExperts(nnx.Module):
    """inputs [B, *spatial, C] -> votes [B, classes] of E tiny classifiers, each with a key (DE&E: Wójcik et al. 2023,
    arXiv:2307.05399; keys beside classifiers: Shanahan et al. 2021, arXiv:2105.13327).

        x = features(inputs) [F]                     frozen
        f_e = b tanh((x W_e + c_e) / b)              W [E, F, classes]; b = `bound`, 0: x W_e + c_e
        cos_e = <x, key_e> / (|x| |key_e|)           keys [E, F]
        A = soft_top_k(cos, k, temperature)          differentiable membership of the k nearest keys, sums to k
        a_e = A_e if A_e >= cutoff else 0,  w_e = a_e max(cos_e, 0)
        vote = sum_e w_e f_e / sum_e w_e             0 where no key is near

    The loss `key_loss` x mean sum_e a_e (1 - cos_e) draws keys to the inputs they are asked by. With `k` = `experts`
    there is no gate, no key and no such loss: vote = mean_e f_e, the dense ensemble; with one expert a linear head.
    `train_keys` False leaves the keys as they are drawn. Else the parameter is key / `key_rate`, so that keys move at
    that fraction of the learning rate: those that move as fast as experts leave them before they have learned.

    The paper has votes as a sum of output x cosine x score. Of its text we had an abstract and a summary; from its
    authors' code (mateusz-wojcik-97/neural-architecture-for-online-ensemble-cl) are the bound (250), the cutoff (0.3),
    the division by the sum of weights, normal keys of norm 1, the loss on keys, and the operator of Xie et al., there
    with epsilon 5e-4: temperature 2.5e-4 here, times the largest cost of a batch. Ours: the temperature; a key at more
    than 90 degrees has weight 0, where theirs would divide by sums of both signs; the cosine in the vote is
    differentiated, which they take for a constant; keys are normalised at each use, not at the start only; one
    optimizer, where theirs are two (experts by sign descent, keys by Adam at 5e-5: `key_rate` 0.005 of a learning rate
    of 1e-2); and features are random (`RandomFeatures`), where theirs are of a network pretrained on other data.
    Training by their code is the objective's `loss="target_score"` with sign descent: `optim.name="lion"` with
    b1 = b2 = 0, which does not move what has no gradient.

    Where `cutoff` is over k / experts, scores that are all alike (a high temperature) are all cut off. Metrics:
    `load_entropy` and `max_load` of a. Float32 but for the products with the filters and W, which are in `dtype`.
    """

    def __init__(
        self,
        *,
        input_shape: Sequence[int],
        classes: int,
        experts: int,
        k: int,
        filters: int,
        kernel: int = 3,
        pool: int = 2,
        temperature: float = 0.002,
        cutoff: float = 0.3,
        bound: float = 250.0,
        key_loss: float = 1.0,
        key_rate: float = 0.005,
        train_keys: bool = True,
        dtype: jnp.dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        at_least_one("model", experts=experts, k=k, filters=filters, kernel=kernel, pool=pool)
        if k > experts:
            raise ValueError(f"model.k={k} nearest keys are more than model.experts={experts}")
        for name, value in (("temperature", temperature), ("key_rate", key_rate)):
            if not value > 0:
                raise ValueError(f"model.{name}={value} must be over 0")
        if not 0 <= cutoff < 1:
            raise ValueError(f"model.cutoff={cutoff} must be at least 0 and below 1")
        for name, value in (("bound", bound), ("key_loss", key_loss)):
            if value < 0:
                raise ValueError(f"model.{name}={value} must be at least 0")
        self.features = RandomFeatures(input_shape, filters=filters, kernel=kernel, pool=pool, dtype=dtype, rngs=rngs)
        width = self.features.size
        self.kernel = Param(
            stacked_kernels(experts, width, classes, rngs), out_sharding=("experts", "embed", "classes")
        )
        self.bias = Param(jnp.zeros((experts, classes)), out_sharding=("experts", "classes"))
        keys = jax.random.normal(rngs.params(), (experts, width))
        keys = keys / (key_rate * jnp.linalg.norm(keys, axis=-1, keepdims=True))
        kind = Param if train_keys else Frozen
        self.keys = kind(keys, out_sharding=("experts", "embed")) if k < experts else None
        self.k, self.temperature, self.cutoff, self.bound = k, temperature, cutoff, bound
        self.key_loss, self.key_rate, self.train_keys, self.dtype = key_loss, key_rate, train_keys, dtype

    def __call__(self, inputs: jax.Array, *, train: bool = False, key: jax.Array | None = None):
        del train, key
        x = self.features(inputs)
        said = jnp.einsum("bf,efc->bec", x.astype(self.dtype), self.kernel[...].astype(self.dtype))
        said = said.astype(jnp.float32) + self.bias[...]
        if self.bound:
            said = self.bound * jnp.tanh(said / self.bound)
        if self.keys is None:
            return said.mean(1), NO_AUX
        scores, cosines = self.gate(x)
        weights = scores * jax.nn.relu(cosines)
        votes = jnp.einsum("be,bec->bc", weights, said) / jnp.maximum(weights.sum(-1, keepdims=True), 1e-9)
        losses = {}
        if self.train_keys and self.key_loss:
            losses["keys"] = self.key_loss * jnp.sum(scores * (1 - cosines), -1).mean()
        return votes, {"losses": losses, "metrics": load_metrics(jax.lax.stop_gradient(scores.sum(0)))}

    def gate(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Features [B, F] -> (scores, 0 below the cutoff, and cosines) [B, E]."""
        unit = lambda a: a / jnp.maximum(jnp.linalg.norm(a, axis=-1, keepdims=True), 1e-9)
        cosines = jnp.einsum("bf,ef->be", unit(x), unit(self.key_rate * self.keys[...]))
        scores = soft_top_k(cosines, self.k, self.temperature)
        return jnp.where(scores >= self.cutoff, scores, 0.0), cosines
