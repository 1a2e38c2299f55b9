"""The mixture of experts: every way of bringing tokens to experts against the sum by hand, and what gates promise."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.test_util import check_grads

from lissom.models.bounds import UnsupportedForm
from lissom.models.context import Context
from lissom.models.language import LanguageModel
from lissom.models.moe import GATES
from lissom.models.moe.experts import Experts, with_capacity
from lissom.models.moe.gates import NoisyTopK, SigmoidBias, TopK, _hashed
from lissom.models.moe.layer import MoE
from lissom.models.moe.routing import Choices, Everyone, Picks, Slots, load_metrics
from lissom.models.moe.trees import leaves_of, smooth_step
from lissom.models.variables import merge, split
from lissom.ops.attention import masks

WIDTH, EXPERTS = 12, 4
X = jax.random.normal(jax.random.key(0), (4, 6, WIDTH))
TOKENS = jax.random.randint(jax.random.key(1), (4, 6), 0, 50)
CAUSAL = functools.partial(Context, mask=masks.Causal(), tokens=TOKENS)


def layer(gate="top_k", settings=None, **others):
    kwargs = None if settings is None else {gate: settings}
    return MoE(WIDTH, gate=gate, gate_kwargs=kwargs, **{"experts": EXPERTS, **others}, rngs=nnx.Rngs(3))


def alone(experts: Experts, number: int, x):
    """Expert `number` on x [..., M], by the equation of SwiGLU or of an MLP."""
    inner, down = (kernel[number] for kernel in experts.kernels[:2])
    first, *second = (x @ inner[:, h] for h in range(inner.shape[1]))
    return (jax.nn.silu(first) * second[0] if second else jax.nn.gelu(first)) @ down


def by_hand(experts: Experts, weights):
    """sum_e weights_e f_e(x); weights [B, T, E]."""
    return sum(weights[..., e, None] * alone(experts, e, X) for e in range(EXPERTS))


def dense(choices: Choices):
    return (jax.nn.one_hot(choices.experts, EXPERTS) * choices.weights[..., None]).sum(2)


def close(a, b, tolerance=1e-5):
    np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


# ---- bringing tokens to experts ---------------------------------------------------------------------------------


@pytest.mark.parametrize("gated", [True, False])
def test_all_forms_are_the_sum_over_experts(gated):
    experts = Experts(WIDTH, 7, experts=EXPERTS, gated=gated, dtype=jnp.float32, rngs=nnx.Rngs(0))
    order = jax.random.permutation(
        jax.random.key(2), jnp.tile(jnp.arange(EXPERTS), (4, 6, 1)), axis=2, independent=True
    )
    choices = Choices(order[..., :2], jax.random.uniform(jax.random.key(3), (4, 6, 2)))
    weights = dense(choices)
    right = by_hand(experts, weights)
    for capacity in (None, 100.0):
        y, metrics = experts(X, choices, capacity)
        close(y, right)
        assert metrics["dropped"] == 0
    close(experts(X, Everyone(weights), None)[0], right)
    # Every expert picks all tokens, those that did not choose it with weight 0.
    flat = weights.reshape(24, EXPERTS)
    close(experts(X, Picks(jnp.tile(jnp.arange(24), (EXPERTS, 1)), flat.T), None)[0], right)
    # As many slots as tokens, each of one token; sequences in the order of their places, as under a mask.
    tokens = jnp.arange(24).reshape(4, 6).T
    one_each = jnp.broadcast_to(jnp.eye(4)[:, None], (6, 4, EXPERTS, 4))
    combine = one_each * flat[tokens][..., None]
    close(experts(X, Slots(tokens, one_each, combine), None)[0], right)


def test_gradients_of_the_dropless_form_are_those_of_the_sum():
    experts = Experts(WIDTH, 7, experts=EXPERTS, gated=True, dtype=jnp.float32, rngs=nnx.Rngs(0))
    parts = split(experts)
    named = jax.random.randint(jax.random.key(2), (4, 6, 2), 0, EXPERTS + 1)  # some name no expert
    weights = jax.random.uniform(jax.random.key(3), (4, 6, 2))

    def loss(form, params, x, weights):
        return (form(merge(parts._replace(params=params)), x, Choices(named, weights)) ** 2).sum()

    ours = lambda experts, x, choices: experts(x, choices, None)[0]
    theirs = lambda experts, x, choices: experts(x, Everyone(dense(choices)), None)[0]
    both = [
        jax.grad(functools.partial(loss, form), argnums=(0, 1, 2))(parts.params, X, weights) for form in (ours, theirs)
    ]
    jax.tree.map(close, *both)


def test_capacity_drops_later_choices_first():
    """Six tokens choose experts 0 first but for one; of ceil(1 x 6 x 2 / 4) = 3 places of expert 0 the first choices of
    tokens 0, 1, 2 take all, so those of 3 and 4 and the second choice of 5 are dropped: 3 of 12."""
    named = jnp.array([[[0, 1], [0, 2], [0, 3], [0, 1], [0, 2], [3, 0]]])
    kept, dropped = with_capacity(Choices(named, jnp.ones(named.shape)), 4, 1.0)
    assert kept.experts.tolist() == [[[0, 1], [0, 2], [0, 3], [4, 1], [4, 2], [3, 4]]]
    assert float(dropped) == 3 / 12
    # By priority: the tokens of the largest weights are 4, 3 and 0, and of the others 5 has the larger.
    weights = jnp.array([0.6, 0.1, 0.2, 0.7, 0.8, 0.3])[None, :, None] * jnp.array([1.0, 0.5])
    kept, dropped = with_capacity(Choices(named, weights), 4, 1.0, priority=True)
    assert kept.experts.tolist() == [[[0, 1], [4, 2], [4, 3], [0, 1], [0, 2], [3, 4]]]
    assert float(dropped) == 3 / 12
    # ceil(0.7 x 12 / 4) = ceil(2.1) is 3 again.
    assert with_capacity(Choices(named, jnp.ones(named.shape)), 4, 0.7)[1] == dropped


@pytest.mark.parametrize("experts", [1, 4])
def test_all_tokens_to_one_expert(experts):
    of = Experts(WIDTH, 5, experts=experts, gated=True, dtype=jnp.float32, rngs=nnx.Rngs(0))
    y, _ = of(X, Choices(jnp.full((4, 6, 1), experts - 1), jnp.ones((4, 6, 1))), None)
    close(y, alone(of, experts - 1, X))


def test_a_shared_expert_is_added_for_every_token():
    moe = layer(shared=2)
    routing, _ = routed(moe.gate)
    gate, up, down = (getattr(moe.shared, name).kernel[...] for name in ("gate", "up", "down"))
    assert up.shape[1] == 2 * moe.experts.down.kernel.shape[1]
    always = (jax.nn.silu(X @ gate) * (X @ up)) @ down
    close(moe(X, CAUSAL())[0], by_hand(moe.experts, dense(routing)) + always)


def test_no_tokens_to_any_expert():
    """Of no expert there is no output, and no gradient but zeros."""
    experts = Experts(WIDTH, 5, experts=EXPERTS, gated=True, dtype=jnp.float32, rngs=nnx.Rngs(0))
    routing = Choices(jnp.full((4, 6, 2), EXPERTS), jnp.ones((4, 6, 2)))
    y, pull = jax.vjp(lambda x: experts(x, routing, None)[0], X)
    assert not y.any() and not pull(jnp.ones_like(y))[0].any()


# ---- gates ------------------------------------------------------------------------------------------------------

SETTINGS = {"soft": {"slots": 2}}
MADE = functools.cache(lambda gate: layer(gate, SETTINGS.get(gate)))


def routed(gate, x=X, **context):
    return gate(x, CAUSAL(**context), jax.random.key(5))


def with_kernel(gate, kernel):
    gate.router.kernel[...] = jnp.asarray(kernel, jnp.float32)
    return gate


def test_top_k_by_hand():
    """x = (ln 1, ln 2, ln 5) and a router that is the identity: p = 1/8, 2/8, 5/8; the two largest are experts 2 and 1
    with weights 5/7 and 2/7. The loss for one token: f = 0, 1/2, 1/2, so 3 (2/8 + 5/8) / 2 = 21/16."""
    gate = with_kernel(TopK(3, experts=3, k=2, balance=1.0, z_loss=1.0, rngs=nnx.Rngs(0)), np.eye(3))
    x = jnp.log(jnp.array([[[1.0, 2.0, 5.0]]]))
    routing, aux = gate(x, Context(), None)
    assert routing.experts.tolist() == [[[2, 1]]]
    close(routing.weights, [[[5 / 7, 2 / 7]]])
    close(aux["losses"]["balance"], 21 / 16)
    close(aux["losses"]["router_z"], math.log(8) ** 2)
    one = with_kernel(TopK(3, experts=3, k=1, rngs=nnx.Rngs(0)), np.eye(3))
    close(one(x, Context(), None)[0].weights, [[[5 / 8]]])


def test_sigmoid_bias_by_hand():
    """Scores sigmoid(0, 1, 2); the bias lifts expert 0 above 1 but is no part of the weights. In training each expert
    has a choice but 1, so 1 rises and 0 and 2 fall: one token's 2 choices are 2/3 an expert."""
    gate = with_kernel(SigmoidBias(3, experts=3, k=2, rate=0.5, rngs=nnx.Rngs(0)), np.eye(3))
    gate.bias[...] = jnp.array([0.4, 0.0, 0.0])
    x = jnp.array([[[0.0, 1.0, 2.0]]])
    routing, _ = gate(x, Context(train=True), None)
    s = jax.nn.sigmoid(x)[0, 0]
    assert routing.experts.tolist() == [[[0, 2]]]  # 0.9 and 0.88, before 0.73
    chosen = routing.experts[0, 0]
    close(routing.weights[0, 0], s[chosen] / s[chosen].sum())
    close(gate.bias[...], [0.4 - 0.5, 0.5, -0.5])


def test_the_bias_balances_without_a_loss():
    """A router that wants expert 0 for all tokens: steps on, each expert has its share, within what one step moves."""
    gate = SigmoidBias(2, experts=4, k=1, rate=0.004, rngs=nnx.Rngs(0))
    with_kernel(gate, [[4, 0, 0, 0], [0.5, 1.5, -1, 1]])
    x = jnp.stack([jnp.ones(256), jax.random.normal(jax.random.key(0), 256)], -1)[None]
    load = lambda: float(gate(x, Context(), None)[1]["metrics"]["max_load"])
    before = load()
    for _ in range(250):
        gate(x, Context(train=True), None)
    assert before > 3.9 and load() < 1.2


def test_noise_is_for_training_and_losses_are_variations():
    gate = NoisyTopK(WIDTH, experts=EXPERTS, k=2, balance=1.0, rngs=nnx.Rngs(0))
    # Both matrices begin at 0: without noise all scores are equal, so all tokens take experts 0 and 1 with weights 1/2:
    # importances 12, 12, 0, 0 have mean 6 and variance 36.
    routing, aux = routed(gate)
    assert (routing.experts == jnp.arange(2)).all()
    close(aux["losses"]["balance"], 1.0)
    drawn, aux = routed(gate, train=True)
    assert not (drawn.experts == routing.experts).all()
    assert 0 < aux["losses"]["balance"] < 0.5
    with pytest.raises(ValueError, match="needs a random key"):
        gate(X, Context(train=True), None)


def test_hash_is_a_function_of_the_token_alone():
    routing, _ = routed(MADE("hash").gate)
    first = np.asarray(routing.experts[..., 0])
    assert len({(int(t), int(e)) for t, e in zip(TOKENS.ravel(), first.ravel())}) == len(np.unique(TOKENS))
    assert (np.asarray(routing.experts[..., 1]) == (first + 1) % EXPERTS).all()
    shares = np.bincount(np.asarray(_hashed(jnp.arange(4000), 0) % 8), minlength=8)
    assert shares.min() > 400 and shares.max() < 600  # 500 each, 24 are one standard deviation
    with pytest.raises(UnsupportedForm, match="routes by the numbers of tokens"):
        MADE("hash")(X, Context())


def test_expert_choice_loads_all_alike_and_is_causal_outside_of_training():
    moe = layer("expert_choice", {"decay": 0.5})
    picks, aux = routed(moe.gate, train=True)
    assert picks.tokens.shape == (EXPERTS, 12) and aux["metrics"]["max_load"] == 1  # 24 x 2 / 4
    probabilities = jax.nn.softmax(moe.gate.router(X)).reshape(24, EXPERTS)
    for e in range(EXPERTS):
        assert set(np.argsort(-np.asarray(probabilities[:, e]))[:12].tolist()) == set(picks.tokens[e].tolist())
    # The first step sets the threshold, so that the same tokens are taken again.
    close(moe.gate.least[...], np.sort(np.asarray(probabilities), 0)[12])
    choices, _ = routed(moe.gate)
    assert np.bincount(np.asarray(choices.experts).ravel(), minlength=5)[:4].tolist() == [12] * 4


def test_smooth_step_and_a_tree_by_hand():
    close(smooth_step(jnp.array([-0.6, -0.5, 0.0, 0.25, 0.5, 0.6]), 1.0), [0, 0, 0.5, 27 / 32, 1, 1])
    close(jax.vmap(jax.grad(lambda t: smooth_step(t, 1.0)))(jnp.array([-0.6, 0.0, 0.6])), [0, 1.5, 0])
    # The root sends 0.25 left; its left child 1, its right child 0.5: leaves 0.25, 0, 0.375, 0.375.
    close(leaves_of(jnp.array([0.25, 1.0, 0.5]), 2), [0.25, 0, 0.375, 0.375])


@pytest.mark.parametrize("name", ["comet", "dselect_k"])
def test_sparse_gates_sum_to_one_and_have_k_experts_once_saturated(name):
    gate = layer(name, k=2).gate
    weights = routed(gate, train=True)[0].weights
    close(weights.sum(-1), np.ones((4, 6)))
    assert (weights > 0).all()
    steps = gate.nodes if name == "comet" else gate.codes
    steps.kernel[...] = 1e4 * steps.kernel[...]
    weights = routed(gate, train=True)[0].weights
    close(weights.sum(-1), np.ones((4, 6)))
    assert ((weights > 0).sum(-1) <= 2).all()
    routing, aux = routed(gate)
    close(dense(routing), weights)
    close(aux["metrics"]["left_out"], 0)
    close(aux["losses"]["entropy"], 0)


def test_comet_is_the_softmax_of_scores_and_paths():
    gate = layer("comet", k=3).gate
    paths = leaves_of(smooth_step(gate.nodes(X), 1.0), 2)
    whole = jax.nn.softmax((gate.leaves(X) + jnp.log(paths)).reshape(4, 6, 12)).reshape(4, 6, 3, 4)
    close(routed(gate, train=True)[0].weights, whole.sum(2))


def test_soft_is_the_equation():
    """Slots are mixtures of a sequence where all may be seen; under a mask, of the tokens at one place."""
    moe = MADE("soft")
    phi = moe.gate.phi.kernel[...] / jnp.linalg.norm(moe.gate.phi.kernel[...], axis=0)
    for mask, x in ((masks.Full(), X), (masks.Causal(), X.swapaxes(0, 1))):
        scores = (x / jnp.linalg.norm(x, axis=-1, keepdims=True)) @ phi
        slots = jnp.einsum("ngm,ngs->nsm", x, jax.nn.softmax(scores, 1))
        outputs = jnp.stack([alone(moe.experts, s // 2, slots[:, s]) for s in range(8)], 1)
        right = jnp.einsum("nsm,ngs->ngm", outputs, jax.nn.softmax(scores, 2))
        y = moe(X, Context(mask=mask))[0]
        close(y if isinstance(mask, masks.Full) else y.swapaxes(0, 1), right)


@pytest.mark.parametrize("name", GATES)
def test_gradients_are_those_of_finite_differences(name):
    """Of what a gate weighs with and of its losses, in float64; which experts are chosen does not change so near."""
    moe = layer(name, SETTINGS.get(name))
    if name == "noisy_top_k":  # whose matrices begin at 0, where all experts are equal
        with_kernel(moe.gate, jax.random.normal(jax.random.key(6), (WIDTH, EXPERTS)))
    if name == "expert_choice":
        moe.gate.least[...] = jnp.full(EXPERTS, 0.1)  # which every token passes
    with jax.enable_x64(True):
        parts = split(moe)
        double = lambda tree: jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), tree)
        parts = parts._replace(params=double(parts.params), stats=double(parts.stats))
        train = name not in ("noisy_top_k", "expert_choice")  # whose training draws, or keeps what it saw

        def f(router, x):
            moe = merge(parts._replace(params={**parts.params, "gate": router}))
            routing, aux = moe.gate(x, CAUSAL(train=train), jax.random.key(5))
            scale = jnp.cos(jnp.arange(1.0, 100.0))
            weighed = [(leaf.ravel() * scale[jnp.arange(leaf.size) % 99]).sum() for leaf in jax.tree.leaves(routing)
                       if leaf.dtype.kind == "f"]  # fmt: skip
            return sum(weighed) + sum(aux["losses"].values())

        check_grads(f, (parts.params.get("gate", {}), X.astype(jnp.float64)), order=1, modes=["rev"], rtol=1e-3)


def test_balance_over_the_batch_and_over_sequences():
    """Four sequences, each of which sends all of its tokens to an expert of its own: balanced over the batch (1), and
    as unbalanced as can be within a sequence (E f = E: 4 p, with p near 1)."""
    x = 20.0 * jnp.broadcast_to(jnp.eye(4)[:, None], (4, 6, 4))
    for sequences, expected in ((None, 1.0), (4, 1.0), (2, 2.0), (1, 4.0)):
        gate = TopK(4, experts=4, k=1, balance=1.0, balance_sequences=sequences, rngs=nnx.Rngs(0))
        close(with_kernel(gate, np.eye(4))(x, Context(train=True), None)[1]["losses"]["balance"], expected, 1e-4)
    with pytest.raises(UnsupportedForm, match="balance_sequences=3 must divide the micro-batch of 4 sequences"):
        TopK(4, experts=4, k=1, balance_sequences=3, rngs=nnx.Rngs(0))(x, Context(train=True), None)


def test_load_metrics_by_hand():
    found = load_metrics(jnp.array([2.0, 1.0, 1.0, 0.0]))
    close(found["load_entropy"], 1.5 * math.log(2) / math.log(4))  # 1/2 ln 2 + 2 (1/4 ln 4) = 3/2 ln 2
    close(found["max_load"], 2.0)
    assert load_metrics(jnp.array([3.0]))["load_entropy"] == 1


# ---- in a network -----------------------------------------------------------------------------------------------


def decoder(name):
    settings = {"gate": name, "gate_kwargs": {name: SETTINGS.get(name, {})}, "experts": 4}
    return LanguageModel(vocab_size=20, width=16, depth=1, heads=2, ffn="moe", ffn_kwargs={"moe": settings},
                         rngs=nnx.Rngs(0))  # fmt: skip


@pytest.mark.parametrize("name", GATES)
def test_a_decoder_does_not_see_its_future_and_decodes_as_it_reads(name):
    model = decoder(name)
    parts = split(model)  # merged inside of jit: training writes statistics
    tokens = jax.random.randint(jax.random.key(0), (3, 7), 0, 20)
    whole = jax.jit(lambda tokens: merge(parts)(tokens)[0])
    logits = whole(tokens)
    close(whole(tokens.at[:, 5].set((tokens[:, 5] + 1) % 20))[:, :5], logits[:, :5])
    step = jax.jit(lambda tokens, cache: merge(parts).extend(tokens, cache))
    cache, found = model.init_cache(3, 7), []
    for part in (tokens[:, :6], tokens[:, 6:]):
        more, cache = step(part, cache)
        found.append(more)
    close(jnp.concatenate(found, 1), logits, 1e-4)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"k": 5}, r"ffn.k=5 experts a token are more than ffn.experts=4"),
        ({"experts": 0}, r"ffn.experts=0 must be at least 1"),
        ({"capacity": 0.0}, r"ffn.capacity=0.0 must be above 0, or None: nothing is dropped"),
        ({"priority": True}, r"ffn.priority=True is of what a capacity drops: set ffn.capacity"),
        ({"shared": -1}, r"ffn.shared=-1 must be at least 0"),
        ({"dropout": 1.0}, r"ffn.dropout=1.0 must be at least 0 and below 1"),
        ({"expansion": 0.0}, r"ffn.expansion=0.0 of a width of 12 leaves no hidden feature"),
        ({"gate": "comet", "experts": 6}, r"ffn.experts=6 must be a power of 2"),
        ({"gate": "topk"}, r"unknown gate 'topk': known are .*did you mean 'top_k'"),
        ({"gate_kwargs": {"top_k": {"balanc": 1.0}}}, r"gate 'top_k' has no setting 'balanc'.*did you mean 'balance'"),
        ({"gate_kwargs": {"top_k": {"balance": -1.0}}}, r"ffn.balance=-1.0 must be at least 0"),
        ({"gate_kwargs": {"top_k": {"balance_sequences": 0}}}, r"ffn.balance_sequences=0 must be at least 1"),
        ({"gate_kwargs": {"top_k": {"jitter": 1.0}}}, r"ffn.jitter=1.0"),
        ({"gate_kwargs": {"top_k": {"z_loss": -1.0}}}, r"ffn.z_loss=-1.0"),
        ({"gate": "soft", "gate_kwargs": {"soft": {"slots": 0}}}, r"ffn.slots=0 must be at least 1"),
        ({"gate": "comet", "gate_kwargs": {"comet": {"gamma": 0.0}}}, r"ffn.gamma=0.0 must be above 0"),
        ({"gate": "sigmoid_bias", "gate_kwargs": {"sigmoid_bias": {"rate": -1.0}}}, r"ffn.rate=-1.0"),
        ({"gate": "expert_choice", "gate_kwargs": {"expert_choice": {"decay": 1.0}}}, r"ffn.decay=1.0"),
    ],
)
def test_bad_settings(settings, said):
    with pytest.raises(ValueError, match=said):
        MoE(WIDTH, **{"experts": EXPERTS, **settings}, rngs=nnx.Rngs(0))
