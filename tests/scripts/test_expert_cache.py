"""Requests of trained decoders, and the cache that is simulated on them."""

import numpy as np
import pytest

from lissom.evaluation.rows import read_rows
from lissom.training.errors import UserError
from scripts import expert_cache


def test_requests_of_a_mixture_and_of_read_me(tiny_run, tmp_path):
    runs = [tiny_run(f"language/{name}", name)[1] for name in ("domains_moe", "read_me")]
    rows = expert_cache.run(runs, shares=(0.5, 1.0), windows=(2,), tokens=100, out=tmp_path / "out")
    assert [row.identity.variant for row in read_rows(tmp_path / "out" / "rows.jsonl")] == ["domains_moe", "read_me"]
    told = [{(m.conditions["policy"], m.conditions["share"]): m.value for m in row.measurements} for row in rows]
    assert {policy for policy, _ in told[0]} == {"lru", "belady"}
    assert {policy for policy, _ in told[1]} == {"lru", "belady", "lookahead"}
    for rates in told:
        # Of everything that fits only the first request of each expert misses.
        assert rates["lru", 1.0] == rates["belady", 1.0] >= rates["belady", 0.5] >= rates["lru", 0.5]
    # 100 tokens, two layers, two of eight experts: at most 16 first requests of 400.
    assert told[0]["lru", 1.0] >= 1 - 16 / 400 and told[1]["lru", 1.0] >= 1 - 6 / 100


def test_requests_come_token_by_token_and_layer_by_layer():
    import jax.numpy as jnp
    from flax import nnx

    from lissom.models.language import LanguageModel
    from lissom.models.variables import split

    settings = {"ffn": "moe", "ffn_kwargs": {"moe": {"gate": "hash", "experts": 4, "k": 2}}}
    network = LanguageModel(vocab_size=9, width=8, depth=3, heads=2, rngs=nnx.Rngs(0), **settings)
    batch = {"inputs": jnp.array([[3, 5, 3], [1, 1, 1]]), "mask": np.array([1.0, 0.0])}
    requests, experts, each = expert_cache.requests_of(split(network), [batch], 100)
    assert (experts, each) == (12, 6)
    first, other, third = np.array(requests).reshape(3, 3, 2)
    # A hash names the same experts in every layer, e and the next; layers have numbers of their own.
    assert (first == third).all() and (first == first[0] + 4 * np.arange(3)[:, None]).all()
    assert (first[0, 1] == (first[0, 0] + 1) % 4) and other.shape == (3, 2)
    plain = LanguageModel(vocab_size=9, width=8, depth=1, heads=2, rngs=nnx.Rngs(0))
    with pytest.raises(UserError, match="no experts"):
        expert_cache.requests_of(split(plain), [batch], 100)
    soft = LanguageModel(vocab_size=9, width=8, depth=1, heads=2, rngs=nnx.Rngs(0), ffn="moe",
                         ffn_kwargs={"moe": {"gate": "soft", "experts": 4}})  # fmt: skip
    with pytest.raises(UserError, match="mixtures of tokens"):
        expert_cache.requests_of(split(soft), [batch], 100)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"shares": ()}, "--shares= must be above 0"),
        ({"shares": (1.5,)}, "--shares=1.5 must be above 0 and at most 1"),
        ({"windows": (0,)}, "--windows=0 must be at least 1"),
        ({"tokens": 0}, "--tokens=0 must be at least 1"),
    ],
)
def test_wrong_flags_give_a_sentence(settings, words):
    with pytest.raises(UserError, match=words):
        expert_cache.run([], **settings)
