"""Layers against values computed by hand, and networks against parameter counts computed by hand."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lissom.models.context import Context
from lissom.models.ffn import MLP, SwiGLU
from lissom.models.language import LanguageModel
from lissom.models.linear import dropout
from lissom.models.mixers.attention import Attention, WindowAttention
from lissom.models.norms import BatchNorm, LayerNorm, RMSNorm
from lissom.models.positions import rotate
from lissom.models.registry import UnknownName, construct
from lissom.models.resnet import ResNet
from lissom.models.variables import Frozen, Stat, freeze, logical_axes, split
from lissom.models.vit import VisionTransformer
from lissom.ops.attention import masks


def count(module):
    return sum(leaf.size for leaf in jax.tree.leaves(split(module).params))


def test_norms_by_hand():
    """x = (1, 3): mean 2, variance 1, mean square 5."""
    x = jnp.array([[1.0, 3.0]])
    np.testing.assert_allclose(LayerNorm(2, rngs=nnx.Rngs(0))(x), [[-1.0, 1.0]], rtol=1e-5)
    np.testing.assert_allclose(RMSNorm(2, rngs=nnx.Rngs(0))(x), [[1 / 5**0.5, 3 / 5**0.5]], rtol=1e-5)


def test_norms_are_float32_inside():
    """In bfloat16 256 + 1 is 256: a mean taken there would not see the ones."""
    x = jnp.array([[256.0] + [1.0] * 255], jnp.bfloat16)
    want = np.asarray(x, np.float64) / np.sqrt((256.0**2 + 255) / 256)
    np.testing.assert_allclose(np.asarray(RMSNorm(256, rngs=nnx.Rngs(0))(x), np.float64), want, rtol=1e-2)


def test_batchnorm_by_hand():
    """One channel, x = (0, 2, 4, 6): mean 3, variance 5, Bessel-corrected 20/3; momentum 0.9."""
    norm = BatchNorm(1, rngs=nnx.Rngs(0))
    x = jnp.array([[0.0], [2.0], [4.0], [6.0]])
    y = norm(x, train=True)
    np.testing.assert_allclose(y[:, 0], np.array([-3.0, -1.0, 1.0, 3.0]) / 5**0.5, rtol=1e-4)
    np.testing.assert_allclose(norm.mean[...], [0.1 * 3], rtol=1e-6)
    np.testing.assert_allclose(norm.var[...], [0.9 + 0.1 * 20 / 3], rtol=1e-6)
    np.testing.assert_allclose(norm(x, train=False)[:, 0], (x[:, 0] - 0.3) / np.sqrt(0.9 + 2 / 3), rtol=1e-4)


def test_rotary_depends_on_distance_only():
    q, k = (jax.random.normal(jax.random.key(i), (1, 1, 1, 8)) for i in range(2))
    at = lambda x, p: rotate(x, jnp.array([[p]]))
    score = lambda p, r: float(jnp.sum(at(q, p) * at(k, r)))
    assert score(5, 2) == pytest.approx(score(103, 100), abs=1e-4)
    assert score(5, 2) != pytest.approx(score(5, 4), abs=1e-3)
    np.testing.assert_allclose(jnp.linalg.norm(at(q, 77)), jnp.linalg.norm(q), rtol=1e-5)


def test_rotary_by_hand():
    """D = 2 has one pair and the angle is the position: (1, 0) turns to (cos 1, sin 1)."""
    np.testing.assert_allclose(
        rotate(jnp.array([[[[1.0, 0.0]]]]), jnp.array([[1]]))[0, 0, 0], [np.cos(1), np.sin(1)], rtol=1e-6
    )


def test_dropout():
    x = jnp.ones(10_000)
    y = dropout(x, 0.25, jax.random.key(0), True)
    assert set(np.unique(y).tolist()) == {0.0, np.float32(1 / 0.75)}
    assert float(y.mean()) == pytest.approx(1.0, abs=0.03)
    np.testing.assert_array_equal(dropout(x, 0.25, None, False), x)
    with pytest.raises(ValueError, match="random key"):
        dropout(x, 0.25, None, True)


def test_a_layer_is_built_alone():
    """With no network imported before, flax would want a mesh for the logical axes."""
    program = (
        "from flax import nnx; from lissom.models.linear import Linear; "
        "print(Linear(4, 3, axes=('embed', 'mlp'), rngs=nnx.Rngs(0)).kernel.shape)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == "(4, 3)", done.stderr


def test_causal_attention_does_not_see_the_future():
    mixer = Attention(16, heads=4, kv_heads=2, qk_norm=True, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (1, 6, 16))
    context = Context(mask=masks.Causal())
    one, _, _ = mixer(x, context)
    two, _, _ = mixer(x.at[:, 4:].set(9.0), context)
    np.testing.assert_allclose(one[:, :4], two[:, :4], atol=1e-6)
    assert not np.allclose(one[:, 4:], two[:, 4:])


def test_window_sees_its_window():
    """window = 3, not causal: what stands at position 8 changes positions 6 to 10 and no other."""
    mixer = WindowAttention(16, heads=2, window=3, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (1, 12, 16))
    one, _, _ = mixer(x, Context())
    two, _, _ = mixer(x.at[:, 8].set(0.0), Context())
    changed = np.abs(one - two).max((0, 2)) > 1e-6
    assert np.flatnonzero(changed).tolist() == [6, 7, 8, 9, 10]


def test_a_window_over_all_is_attention():
    one, two = Attention(16, heads=2, rngs=nnx.Rngs(0)), WindowAttention(16, heads=2, window=12, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (1, 12, 16))
    for mask in (masks.Full(), masks.Causal()):
        np.testing.assert_allclose(one(x, Context(mask=mask))[0], two(x, Context(mask=mask))[0], atol=1e-5)


def test_parameter_counts_by_hand():
    m, f, v, h = 32, 128, 11, 4
    attention = 4 * m * m
    assert count(Attention(m, heads=h, rngs=nnx.Rngs(0))) == attention
    assert count(Attention(m, heads=h, kv_heads=2, rngs=nnx.Rngs(0))) == 2 * m * m + 2 * m * (m // 2)
    mlp = m * f + f + f * m + m
    assert count(MLP(m, rngs=nnx.Rngs(0))) == mlp
    hidden = round(f * 2 / 3)
    assert count(SwiGLU(m, rngs=nnx.Rngs(0))) == 3 * m * hidden
    # Language model, tied: table, per layer two norms, attention, feed-forward; last norm.
    lm = LanguageModel(vocab_size=v, width=m, depth=3, heads=h, rngs=nnx.Rngs(0))
    assert count(lm) == v * m + 3 * (2 * m + attention + 3 * m * hidden) + m
    untied = LanguageModel(vocab_size=v, width=m, depth=3, heads=h, tied=False, rngs=nnx.Rngs(0))
    assert count(untied) == count(lm) + m * v
    # ViT on 8x8x1 with patches of 2: 4 pixels a patch, 16 positions, LayerNorm with bias, 10 classes.
    vit = VisionTransformer(input_shape=(8, 8, 1), classes=10, width=m, depth=2, heads=h, patch=2, rngs=nnx.Rngs(0))
    assert count(vit) == (4 * m + m) + 16 * m + 2 * (4 * m + attention + mlp) + 2 * m + (m * 10 + 10)
    # ResNet (8, 16), one block a stage: stem, plain block, block with projection, head; BN has 2 a channel.
    net = ResNet(input_shape=(8, 8, 1), classes=10, widths=(8, 16), blocks=(1, 1), rngs=nnx.Rngs(0))
    stage1 = 2 * 9 * 8 * 8 + 2 * 16
    stage2 = 9 * 8 * 16 + 9 * 16 * 16 + 8 * 16 + 3 * 32
    assert count(net) == 9 * 8 + 16 + stage1 + stage2 + 16 * 10 + 10


def test_none_has_no_norm():
    with_, without = (
        LanguageModel(vocab_size=5, width=16, depth=1, heads=2, mixer=m, rngs=nnx.Rngs(0))
        for m in ("attention", "none")
    )
    assert count(with_) - count(without) == 4 * 16 * 16 + 16


@pytest.mark.parametrize("held", [nnx.Variable(jnp.zeros(2)), nnx.Rngs(0)], ids=["Variable", "Rngs"])
def test_split_is_a_lint(held):
    class Wrong(nnx.Module):
        def __init__(self):
            self.weight = nnx.Param(jnp.zeros(2), out_sharding=(None,))
            self.held = held

    with pytest.raises(ValueError, match=r"neither nnx.Param, Stat nor Frozen"):
        split(Wrong())


def test_batch_stat_and_quant_stat_are_stats():
    import qwix

    class Mixed(nnx.Module):
        def __init__(self):
            self.a, self.b, self.c = nnx.BatchStat(jnp.zeros(1)), qwix.QuantStat(jnp.zeros(1)), Stat(jnp.zeros(1))
            self.d = Frozen(jnp.zeros(1))

    parts = split(Mixed())
    assert set(parts.stats) == {"a", "b", "c"} and set(parts.frozen) == {"d"} and not parts.params


def test_freeze():
    net = ResNet(input_shape=(8, 1), classes=2, widths=(4,), blocks=(1,), rngs=nnx.Rngs(0))
    x = jnp.ones((2, 8, 1))
    before, _ = net(x)
    parts = split(freeze(net))
    assert not parts.params and not parts.stats and parts.frozen
    np.testing.assert_array_equal(net(x)[0], before)


def test_every_parameter_names_its_axes():
    lm = nnx.eval_shape(lambda: LanguageModel(vocab_size=8, width=16, depth=2, heads=2, stack="scan", rngs=nnx.Rngs(0)))
    axes = logical_axes(lm)
    assert axes[("blocks", 0, "mixer", "q", "kernel")] == ("layers", "embed", "heads", "head_dim")


def test_names_and_settings():
    table = {"attention": "lissom.models.mixers.attention:Attention"}
    build = lambda name, kwargs: construct(
        table, name, kwargs, "mixer", width=8, heads=2, dtype=jnp.float32, rngs=nnx.Rngs(0)
    )
    with pytest.raises(UnknownName, match=r"unknown mixer 'atention'.*did you mean 'attention'"):
        build("atention", {})
    with pytest.raises(UnknownName, match=r"no setting 'kv_head'.*did you mean 'kv_heads'"):
        build("attention", {"attention": {"kv_head": 1}})
    with pytest.raises(UnknownName, match="no module"):
        build("nowhere.at_all:Thing", {})
    assert isinstance(build("lissom.models.mixers.attention:WindowAttention", {}), WindowAttention)
