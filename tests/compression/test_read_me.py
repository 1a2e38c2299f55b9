"""Read-ME: what is carved, what the router is told, and that it decodes as it reads."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lissom.compression.read_me import ReadMe
from lissom.compression.transforms import structured
from lissom.models.bounds import UnsupportedForm
from lissom.models.context import Context
from lissom.models.language import LanguageModel
from lissom.models.variables import flatten, merge, split
from lissom.ops.attention import masks
from lissom.training.errors import UserError
from lissom.training.objectives.router_tuning import RouterTuning

TOKENS = jax.random.randint(jax.random.key(0), (4, 6), 0, 11)
DOMAINS = jnp.eye(2)[jnp.array([0, 1, 0, 1])]
BATCH = {
    "inputs": TOKENS,
    "labels": jnp.roll(TOKENS, -1, 1),
    "weights": jnp.ones((4, 6)),
    "domains": DOMAINS,
    "mask": jnp.ones(4),
}


def network(**settings):
    return LanguageModel(vocab_size=11, width=12, depth=2, heads=2, rngs=nnx.Rngs(0), **settings)


def carve(data=(BATCH,), **settings):
    transform = ReadMe(**{"experts": 2, "width": 8, **settings})
    return transform.values(transform.structure(network()), network(), iter(data))


def activity(layer, x):
    return np.abs(np.asarray(layer.inner(x)))


def test_channels_are_those_that_a_domain_makes_active():
    source, module = network(), carve()
    # The first layer's input, by hand; of 12 x 4 x 2 / 3 = 32 channels 8 are common and 8 an expert's own.
    block, carved = source.blocks[0], module.network.blocks[0].ffn
    x = source.embed(TOKENS)
    y, _, _ = block.mixer(block.mixer_norm(x), Context(mask=masks.Causal()))
    inner = activity(block.ffn, block.ffn_norm(x + y)).mean(1)
    share = np.stack([inner[[0, 2]].sum(0), inner[[1, 3]].sum(0)])
    share /= share.sum(1, keepdims=True)
    common = np.argsort(-share.min(0))[:8]
    assert set(carved.common_channels[...].tolist()) == set(common.tolist())
    for domain in range(2):
        own = [c for c in np.argsort(-share[domain]) if c not in common][:8]
        assert set(carved.channels[...][domain].tolist()) == set(own)
        order = carved.channels[...][domain]
        np.testing.assert_array_equal(
            carved.experts.inner.kernel[...][domain, :, 0], block.ffn.gate.kernel[...][:, order]
        )
        np.testing.assert_array_equal(
            carved.experts.inner.kernel[...][domain, :, 1], block.ffn.up.kernel[...][:, order]
        )
        np.testing.assert_array_equal(carved.experts.down.kernel[...][domain], block.ffn.down.kernel[...][order])


def test_all_channels_active_is_the_dense_network():
    """With share 1 every expert has all channels that are not common."""
    module = carve(share=1.0)
    np.testing.assert_allclose(module(TOKENS)[0], network()(TOKENS)[0], atol=1e-5)
    overlap = module(TOKENS, compare=True)[1]["metrics"]["overlap"]
    assert overlap.shape == (2, 4, 6, 2)
    np.testing.assert_array_equal(overlap, 1)


def test_overlap_by_hand():
    module = carve()
    carved, x = module.network.blocks[0].ffn, jax.random.normal(jax.random.key(3), (1, 2, 12))
    expert = jnp.zeros((1, 2), jnp.int32)
    _, aux = carved(x, Context(expert=expert, compare=True))
    inner = activity(network().blocks[0].ffn, x)
    common, own = (np.asarray(a[...]) for a in (carved.common_channels, carved.channels))
    known = np.union1d(common, own)
    for token in range(2):
        most = set(known[np.argsort(-inner[0, token, known])][:16].tolist())
        for number in range(2):
            found = len(most & set(common.tolist())) + len(most & set(own[number].tolist()))
            np.testing.assert_allclose(aux["metrics"]["overlap"][0, token, number], found / 16, atol=1e-6)
    assert "overlap" not in carved(x, Context(expert=expert))[1]["metrics"]
    with pytest.raises(UnsupportedForm, match="need the experts that its router names"):
        carved(x, Context())


def test_the_router_alone_learns_and_follows_the_overlap():
    objective, module = RouterTuning(), carve()
    parts = split(module)
    graph, rest = parts.graph, parts[1:]
    of = jax.jit(lambda params: objective.gradients(graph, params, *rest[1:], BATCH, jax.random.key(0), 0))
    grads, _, before = of(parts.params)
    moved = {name for name, leaf in flatten(grads).items() if (leaf != 0).any()}
    assert moved and all(name.startswith("router/") for name in moved)

    @jax.jit
    def missed(params):
        """The overlap that the router leaves: experts that are as good as each other count the same."""
        module = merge(parts._replace(params=params))
        overlap = module(TOKENS, compare=True)[1]["metrics"]["overlap"].mean(0)
        taken = jnp.take_along_axis(overlap, module.scores(TOKENS).argmax(-1)[..., None], -1)[..., 0]
        return (overlap.max(-1) - taken).mean()

    params = parts.params
    for _ in range(600):
        grads, _, metrics = of(params)
        params = jax.tree.map(lambda p, g: p - 0.3 * g, params, grads)
    assert missed(params) < 0.25 * missed(parts.params)
    assert metrics["loss"] < before["loss"] and metrics["agreement"] > before["agreement"]


def test_it_decodes_as_it_reads_and_does_not_see_the_future():
    module = carve()
    parts = split(module)
    logits = module(TOKENS)[0]
    later = module(TOKENS.at[:, 4].set((TOKENS[:, 4] + 1) % 11))[0]
    np.testing.assert_allclose(later[:, :4], logits[:, :4], atol=1e-5)
    cache, found = module.init_cache(4, 6), []
    step = jax.jit(lambda tokens, cache: merge(parts).extend(tokens, cache))
    for part in (TOKENS[:, :4], TOKENS[:, 4:5], TOKENS[:, 5:]):
        more, cache = step(part, cache)
        found.append(more)
    np.testing.assert_allclose(jnp.concatenate(found, 1), logits, atol=1e-4)
    assert module(TOKENS, domains=DOMAINS)[1]["metrics"]["domain_use"].sum() == 2 * 24


def test_networks_of_other_seeds_get_other_routers():
    kernels = []
    for seed in (0, 0, 1):
        source = lambda seed=seed: LanguageModel(vocab_size=11, width=12, depth=2, heads=2, rngs=nnx.Rngs(seed))
        transform = ReadMe(experts=2, width=8)
        kernels.append(
            transform.values(transform.structure(source()), source(), iter([BATCH])).router.inner.kernel[...]
        )
    assert (kernels[0] == kernels[1]).all() and (kernels[0] != kernels[2]).any()


def test_what_does_not_fit_is_one_sentence():
    with pytest.raises(UserError, match="every layer needs ffn='swiglu'"):
        ReadMe(experts=2).structure(network(ffn="mlp"))
    with pytest.raises(UserError, match="an expert for each of the data's 2 domains"):
        carve(experts=3)
    with pytest.raises(UserError, match="needs data that names domains"):
        carve(data=[{"inputs": TOKENS}])
    with pytest.raises(UserError, match="there is none here"):
        carve(data=[])
    for wrong in ({"common": 0.5}, {"common": 0.0}, {"share": 1.1}):
        with pytest.raises(UserError, match="must be above 0 and below share"):
            ReadMe(experts=2, **wrong)
    with pytest.raises(UserError, match="must be at least 1"):
        ReadMe(experts=0)
    with pytest.raises(UserError, match="would be common, 1 active"):
        ReadMe(experts=2, share=0.04, common=0.01).structure(network())
    with pytest.raises(UserError, match=r"transform 'read_me': .*heads=0"):
        structured(network(), [("read_me", ReadMe(experts=2, heads=0))])
    with pytest.raises(UserError, match="needs the transform 'read_me'"):
        RouterTuning().build(network(), None)
    with pytest.raises(ValueError, match=r"objective.temperature=0 must be above 0"):
        RouterTuning(temperature=0)
