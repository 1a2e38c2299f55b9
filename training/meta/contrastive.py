"""Contrastive pretraining for few shots, without labels: a student, its slow teacher, and memories of what they saw."""

import itertools

import jax
import jax.numpy as jnp
from flax import nnx

from lissom.models import transductive
from lissom.models.linear import Linear
from lissom.models.norms import BatchNorm
from lissom.models.variables import Stat, replace_variables
from lissom.training.errors import UserError
from lissom.training.meta.memory import ClusteredMemory
from lissom.training.meta.prototypes import FeatureExtractor
from lissom.training.meta.views import views


class Head(nnx.Module):
    """Products of the given widths, with BatchNorm (in the place of a bias) and relu between them; `normed`: BatchNorm
    behind the last one too."""

    def __init__(self, *widths: int, normed: bool, rngs: nnx.Rngs):
        pairs, self.normed = list(itertools.pairwise(widths)), normed
        bare = len(pairs) - (not normed)  # as many have a BatchNorm
        self.products = nnx.List(
            [Linear(*pair, axes=("embed", "mlp"), bias=i >= bare, rngs=rngs) for i, pair in enumerate(pairs)]
        )
        self.norms = nnx.List([BatchNorm(width, rngs=rngs) for _, width in pairs[:bare]])

    def __call__(self, x: jax.Array) -> jax.Array:
        for i, product in enumerate(self.products):
            x = product(x)
            x = self.norms[i](x, train=True) if i < len(self.norms) else x
            x = jax.nn.relu(x) if i < len(self.products) - 1 else x
        return x


class Embedder(nnx.Module):
    """A network without a head and a projector: images [B, H, W, C] -> embeddings [B, width]."""

    def __init__(self, network: nnx.Module, projector: Head):
        self.network, self.projector = network, projector

    def __call__(self, inputs: jax.Array, key: jax.Array) -> jax.Array:
        return self.projector(self.network.features(inputs, train=True, key=key))


class Siamese(nnx.Module):
    """The network with a projector and a predictor, all trained; the teacher, whose parameters are `Stat`s and follow
    those of the network and the projector; and the memories, None where no neighbours are asked for."""

    def __init__(self, network: nnx.Module, width: int, make_memory, rngs: nnx.Rngs):
        self.network = network
        self.projector = Head(network.feature_size, width, width, width, normed=True, rngs=rngs)
        self.predictor = Head(width, max(width // 4, 1), width, normed=False, rngs=rngs)
        self.teacher = Embedder(*(_carried(nnx.clone(part)) for part in (self.network, self.projector)))
        self.followed = Stat(jnp.full((), -1, jnp.int32))  # the step in which the teacher moved last
        self.targets, self.projections, self.predictions = (make_memory() for _ in range(3))

    def student(self, inputs: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(projections, predictions), each [B, width]."""
        projected = self.projector(self.network.features(inputs, train=True, key=key))
        return projected, self.predictor(projected)

    def follow(self, momentum: float, step: jax.Array) -> None:
        """teacher <- momentum teacher + (1 - momentum) student, once a step, whatever number of micro-batches it has.
        The first time the teacher becomes the student, whose values may be those of another run."""
        followed = self.followed[...]
        kept = jnp.where(followed < 0, 0.0, jnp.where(followed == step, 1.0, momentum))
        for name in ("network", "projector"):
            student = dict(nnx.to_flat_state(nnx.state(getattr(self, name), nnx.Param)))
            teacher = dict(nnx.to_flat_state(nnx.state(getattr(self.teacher, name))))
            for path, value in student.items():
                own = teacher[path]
                own[...] = kept * own[...] + (1 - kept) * jax.lax.stop_gradient(value[...])
        self.followed[...] = jnp.asarray(step, jnp.int32)


def _carried(module: nnx.Module) -> nnx.Module:
    """The module, its parameters carried from step to step instead of trained."""
    change = lambda variable, axes: Stat(variable[...], **axes) if isinstance(variable, nnx.Param) else variable
    return replace_variables(module, change)


class BECLR(FeatureExtractor):
    """Batch-enhanced contrastive learning (Poulakakis-Daktylidis & Jamali-Rad 2024, arXiv:2402.02444), from the images
    of the training classes one by one, their labels unread.

    Of each of B images two views are made (`views.py`, by `strength`). The student gives projections z and predictions
    p, the teacher, whose parameters follow the student's with `momentum`, projections t. From step `warm_up` on each of
    these gets besides, from a memory of its own kind (`memory.py`), its nearest `neighbours` k: of both views (1, 2)
    there are then B (k + 1) rows, each divided by its norm, and the loss is

        L = -mean over rows of (p_1 . t_2 + p_2 . t_1) / 2
            + uniformity log mean_i mean_j exp(z_i . z_j / temperature),   j any row but i and i's other view

    An episode is answered by the nearest class mean of the network's features; the paper's own answer is the column
    `transported_accuracy` (OpTA).

    memory: its rows, to be read as the last memory / 2 B batches; the paper has 40 a cluster. clusters: 0 searches the
    whole memory. neighbours: 0 is the plain Siamese loss, without memories. prototype_momentum, epsilon: of the
    memories. width: of the embeddings.

    As in the authors' code: a batch enters the memory before it is searched, so that a row is often its own nearest
    neighbour; neighbours are constants. Both of a pair of neighbours in the first term are: its gradient is that of the
    B own rows, 1 / (k + 1) as large, and neighbours act through the second term, as rows to be far from.
    Other than there: the teacher's momentum is constant (there it rises to 1 by a cosine); the views are for letters;
    no view has masked patches. Where the paper counts epochs `warm_up` counts steps. Micro-batches are batches of their
    own: their rows are compared with each other alone.
    """

    path = ("network",)
    single = True

    def __init__(
        self,
        *,
        memory: int = 8000,
        clusters: int = 200,
        neighbours: int = 5,
        warm_up: int = 500,
        momentum: float = 0.995,
        prototype_momentum: float = 0.9,
        epsilon: float = 0.05,
        uniformity: float = 0.1,
        temperature: float = 2.0,
        width: int = 128,
        strength: float = 1.0,
        statistics: str = "running",
    ):
        super().__init__(statistics=statistics)
        least = {"memory": 1, "clusters": 0, "neighbours": 0, "warm_up": 0, "uniformity": 0, "width": 1}
        given = {"memory": memory, "clusters": clusters, "neighbours": neighbours, "warm_up": warm_up}
        for name, value in {**given, "uniformity": uniformity, "width": width}.items():
            if value < least[name]:
                raise ValueError(f"objective.{name}={value} must be at least {least[name]}")
        for name, value in (("momentum", momentum), ("prototype_momentum", prototype_momentum), ("strength", strength)):
            if not 0 <= value <= 1:
                raise ValueError(f"objective.{name}={value} must lie in [0, 1]")
        for name, value in (("epsilon", epsilon), ("temperature", temperature)):
            if not value > 0:
                raise ValueError(f"objective.{name}={value} must be above 0")
        if neighbours and max(clusters, neighbours) > memory:
            name, value = ("clusters", clusters) if clusters > memory else ("neighbours", neighbours)
            raise ValueError(f"objective.{name}={value} must be at most the {memory} rows of objective.memory")
        self.memory, self.clusters, self.neighbours, self.warm_up = memory, clusters, neighbours, warm_up
        self.momentum, self.prototype_momentum, self.epsilon = momentum, prototype_momentum, epsilon
        self.uniformity, self.temperature = uniformity, temperature
        self.width, self.strength = width, strength

    def prepare(self, facts):
        if len(facts["input_shape"]) != 3:
            raise UserError(
                f"objective 'beclr' makes views of images [H, W, C], and the inputs of this data are "
                f"{list(facts['input_shape'])}"
            )

    def build(self, model, rngs):
        return Siamese(model, self.width, self._memory, rngs)

    def _memory(self) -> ClusteredMemory | None:
        if not self.neighbours:
            return None
        settings = {"clusters": self.clusters, "momentum": self.prototype_momentum, "epsilon": self.epsilon}
        return ClusteredMemory(self.memory, self.width, **settings)

    def notes(self, network):
        return (*super().notes(network), "trained on single images, their labels unread")

    def loss(self, module, batch, key, step):
        images = batch["inputs"]
        self._check_rows(2 * len(images))
        first, second, dropping, taught, searching = jax.random.split(key, 5)
        seen = jnp.concatenate([views(images, key, self.strength) for key in (first, second)])
        module.follow(self.momentum, step)
        z, p = map(transductive.unit, module.student(seen, dropping))
        t = transductive.unit(jax.lax.stop_gradient(module.teacher(seen, taught)))
        spread = t.std(0).mean()
        pairs = zip((module.targets, module.predictions, module.projections), (t, p, z), strict=True)
        keys = jax.random.split(searching, 3)
        t, p, z = (self.enhanced(memory, rows, key) for (memory, rows), key in zip(pairs, keys, strict=True))
        enhancing = jnp.asarray(step >= self.warm_up, jnp.float32)
        weights = jnp.concatenate([jnp.ones(len(images)), jnp.full(self.neighbours * len(images), enhancing)])
        near, far = alignment(p, t, weights), uniformity(z, weights, self.temperature)
        # Rows of norm 1 that all lie alike have a spread of 0: the collapse that a teacher and its student may share.
        return near + self.uniformity * far, {"alignment": near, "uniformity": far, "spread": spread}

    def enhanced(self, memory: ClusteredMemory | None, rows: jax.Array, key: jax.Array) -> jax.Array:
        """Rows [2 B, D] of both views, one behind the other, -> [2, B (k + 1), D]: each view's rows, then k neighbours
        of the first, of the second, ...; the rows enter the memory."""
        apart = rows.reshape(2, -1, rows.shape[-1])
        if memory is None:
            return apart
        fixed = jax.lax.stop_gradient(rows)
        memory.update(fixed, key)
        found = memory.nearest(fixed, self.neighbours)
        return jnp.concatenate([apart, found.reshape(2, -1, rows.shape[-1])], 1)

    def _check_rows(self, rows: int) -> None:
        if rows < 4:
            raise UserError("objective 'beclr' tells images apart: a batch, or micro-batch, must have at least 2")
        if self.neighbours and not self.neighbours <= rows <= self.memory:
            name, value, bound = "neighbours", self.neighbours, "most"
            if rows > self.memory:
                name, value, bound = "memory", self.memory, "least"
            raise UserError(
                f"objective.{name}={value} must be at {bound} the {rows} rows of a batch, which are two views an image"
            )


def alignment(p: jax.Array, t: jax.Array, weights: jax.Array) -> jax.Array:
    """-mean over rows of (p_1 . t_2 + p_2 . t_1) / 2, by `weights` [m], for p and t [2, m, D] of rows of norm 1."""
    found = (p * t[::-1]).sum(-1).mean(0)
    return -(weights * found).sum() / weights.sum()


def uniformity(z: jax.Array, weights: jax.Array, temperature: float) -> jax.Array:
    """log mean_i mean_j exp(z_i . z_j / temperature) over the rows of norm 1 of both views [2, m, D], j any row but i
    and the row of i's place in the other view; means by `weights` [m]. (The mean over i stands within the logarithm.)
    """
    rows, twice = z.reshape(-1, z.shape[-1]), jnp.tile(weights, 2)
    others = 1 - jnp.tile(jnp.eye(z.shape[1]), (2, 2))
    away = (jnp.exp(rows @ rows.T / temperature) * others) @ twice / (twice.sum() - 2)
    return jnp.log((twice * away).sum() / twice.sum())
