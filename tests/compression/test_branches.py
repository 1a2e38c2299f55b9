"""Branch-Train-MiX: branches learn as if alone, and what is made of them is what the paper says."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lissom.compression.branches import Branches, averaged, mixed, upcycled
from lissom.compression.transforms import structured
from lissom.models.language import LanguageModel
from lissom.models.variables import flatten, map_paths, merge, split
from lissom.training.errors import UserError
from lissom.training.objectives.branch_training import BranchTraining
from lissom.training.objectives.language_modelling import LanguageModelling

TOKENS = jax.random.randint(jax.random.key(0), (5, 6), 0, 11)
# Three sequences of domain 0, two of domain 1, none of domain 2.
DOMAINS = jnp.eye(3)[jnp.array([0, 1, 0, 1, 0])]
BATCH = {
    "inputs": TOKENS,
    "labels": jnp.roll(TOKENS, -1, 1),
    "weights": jax.random.uniform(jax.random.key(1), (5, 6)),
    "domains": DOMAINS,
    "mask": jnp.ones(5),
}
MOE = {"ffn": "moe", "ffn_kwargs": {"moe": {"experts": 3, "k": 2}}}


def network(seed=0, **settings):
    return LanguageModel(vocab_size=11, width=8, depth=2, heads=2, rngs=nnx.Rngs(seed), **settings)


def branches():
    """Three that differ."""
    module = Branches(count=3).structure(network())
    parts = split(module)
    shake = lambda name, leaf: leaf + 0.1 * jax.random.normal(jax.random.key(len(name)), leaf.shape)
    return merge(parts._replace(params=map_paths(shake, parts.params)))


def alone(module, number):
    """Branch `number` as a network of its own."""
    of_one = jax.tree.map(lambda leaf: leaf[number], split(module).params["network"])
    return merge(split(network())._replace(params=of_one))


def rows(batch, of):
    return {name: array[jnp.array(of)] for name, array in batch.items()}


def gradients(objective, module, batch):
    parts = split(module)
    return objective.gradients(parts.graph, *parts[1:], batch, jax.random.key(2), jnp.zeros((), int))


def trained(objective):
    objective.prepare({"domains": ["a", "b", "c"]})
    return objective


def test_a_branch_learns_as_if_alone():
    module = branches()
    grads, _, metrics = gradients(trained(BranchTraining()), module, BATCH)
    losses = []
    for number, of in enumerate(([0, 2, 4], [1, 3])):
        own, _, told = gradients(LanguageModelling(), alone(module, number), rows(BATCH, of))
        losses.append(told["loss"])
        for name, leaf in flatten(own).items():
            np.testing.assert_allclose(flatten(grads["network"])[name][number], leaf, atol=1e-6, err_msg=name)
    assert all((leaf[2] == 0).all() for leaf in jax.tree.leaves(grads))
    np.testing.assert_allclose(metrics["loss"], np.mean(losses), rtol=1e-6)


def test_branches_of_their_own_and_all_together():
    module = branches()
    own, _ = module(TOKENS, branch=DOMAINS.argmax(1))
    every = jnp.stack([alone(module, number)(TOKENS)[0] for number in range(3)])
    for row, domain in enumerate([0, 1, 0, 1, 0]):
        np.testing.assert_allclose(own[row], every[domain, row], atol=1e-5)
    np.testing.assert_allclose(jnp.exp(module(TOKENS)[0]), jax.nn.softmax(every).mean(0), atol=1e-6)


def state(module):
    return {"params": split(module).params, "step": 7}


def filled(converter, old, fresh):
    new = converter(state(old), {**state(fresh), "step": 0})
    assert new["step"] == 7
    return merge(split(fresh)._replace(params=new["params"]))


def test_branches_begin_as_the_seed():
    seed = network(1)
    module = Branches(count=3).values(Branches(count=3).structure(network(2)), network(1), ())
    for number in range(3):
        np.testing.assert_array_equal(alone(module, number)(TOKENS)[0], seed(TOKENS)[0])


@pytest.mark.parametrize("converter", [upcycled, mixed])
def test_experts_that_are_alike_are_the_dense_network(converter):
    seed = network(1)
    old = Branches(count=3).structure(network(1)) if converter is mixed else seed
    mixture = filled(converter, old, network(3, **MOE))
    np.testing.assert_allclose(mixture(TOKENS)[0], seed(TOKENS)[0], atol=1e-5)


def test_experts_are_the_branches_and_the_rest_is_their_mean():
    module, fresh = branches(), network(3, **MOE)
    new, old = (flatten(split(m).params) for m in (filled(mixed, module, fresh), module))
    for number in range(3):
        ffn = {part: old[f"network/blocks/1/ffn/{part}/kernel"][number] for part in ("gate", "up", "down")}
        np.testing.assert_array_equal(new["blocks/1/ffn/experts/inner/kernel"][number, :, 0], ffn["gate"])
        np.testing.assert_array_equal(new["blocks/1/ffn/experts/inner/kernel"][number, :, 1], ffn["up"])
        np.testing.assert_array_equal(new["blocks/1/ffn/experts/down/kernel"][number], ffn["down"])
    name = "blocks/1/ffn/gate/router/kernel"
    np.testing.assert_array_equal(new[name], flatten(split(fresh).params)[name])
    rest = [name for name in new if "/ffn/" not in name]
    assert len(rest) == len([name for name in old if "/ffn/" not in name]) and "embed/table" in rest
    for name in rest:
        np.testing.assert_allclose(new[name], old[f"network/{name}"].mean(0), atol=1e-7)
    for name, leaf in flatten(split(filled(averaged, module, network())).params).items():
        np.testing.assert_allclose(leaf, old[f"network/{name}"].mean(0), atol=1e-7)


def test_what_does_not_fit_is_one_sentence():
    narrow = {"ffn": "moe", "ffn_kwargs": {"moe": {"experts": 3, "expansion": 2.0}}}
    four = {"ffn": "moe", "ffn_kwargs": {"moe": {"experts": 4}}}
    for settings in (narrow, four):
        with pytest.raises(UserError, match="there must be a branch an expert"):
            filled(mixed, branches(), network(**settings))
    with pytest.raises(UserError, match="ffn/shared/down/kernel has no counterpart"):
        filled(upcycled, network(), network(ffn="moe", ffn_kwargs={"moe": {"shared": 1}}))
    with pytest.raises(UserError, match="mixtures of experts already"):
        filled(upcycled, network(**MOE), network(**MOE))
    with pytest.raises(UserError, match="experts have no biases"):
        filled(upcycled, network(ffn="mlp"), network(ffn="moe", ffn_kwargs={"moe": {"experts": 3, "gated": False}}))
    with pytest.raises(UserError, match=r"set config.model.stack to 'loop'"):
        structured(network(stack="scan"), [("branches", Branches(count=2))])
    with pytest.raises(ValueError, match="layers of a network must stand apart"):
        Branches(count=2).structure(network(stack="scan"))
    with pytest.raises(UserError, match="without statistics"):
        structured(network(**MOE), [("branches", Branches(count=2))])
    with pytest.raises(UserError, match="count must be at least 1, got 0"):
        structured(network(), [("branches", Branches(count=0))])
    with pytest.raises(UserError, match="data that names domains"):
        BranchTraining().prepare({})
    for wrong in (network(), Branches(count=2).structure(network())):
        with pytest.raises(UserError, match="a branch for each domain of the data"):
            trained(BranchTraining()).build(wrong, None)
