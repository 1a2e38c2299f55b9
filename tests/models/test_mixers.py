"""What every mixer promises: a cache gives what the whole sequence gives; causality, gradients, degenerate forms."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.test_util import check_grads

from lissom.evaluation import costs, memory
from lissom.models.context import Context
from lissom.models.language import LanguageModel
from lissom.models.mixers import MIXERS
from lissom.models.mixers.attention import Attention, GroupedQueryAttention, WindowAttention
from lissom.models.mixers.bilevel import BilevelAttention, region_order
from lissom.models.mixers.compressed import CompressedAttention, CompressedGroupedAttention, unit
from lissom.models.mixers.latent import LatentAttention
from lissom.models.registry import construct
from lissom.models.variables import split
from lissom.ops.attention import masks

WIDTH, HEADS, D = 16, 4, 4
VARIANTS = [
    ("attention", {}),
    ("attention", {"kv_heads": 2, "rope_dim": 2, "qk_norm": True}),
    ("gqa", {}),
    ("mla", {}),
    ("mla", {"rotary": "after", "latent_norm": False, "value_latent_dim": 6}),
    ("mla", {"rotary": "none", "value_dim": 3}),
    ("mla", {"value_latent_dim": 6, "rope_heads": 2, "rope_dim": 6, "query_latent_dim": 5}),
    ("cca", {}),
    ("ccgqa", {"kernels": (3, 4)}),
    ("ccgqa", {"conv": False, "value_shift": False}),
    ("cca", {"mean": False, "norm": False, "rope_theta": 0.0}),
    ("window", {"window": 4, "kv_heads": 1}),
    ("window", {"window": 1}),
    ("neighborhood", {"window": 3, "dilation": 2}),
    ("neighborhood", {"window": 30}),
    ("meta_tokens", {}),
    ("meta_tokens", {"kv_heads": 2, "bias": True, "zero_positions": True}),
    ("meta_tokens", {"meta_attention": False}),
    ("token_elimination", {"block": 4}),
    ("lstm", {}),
    ("lstm", {"hidden": 6}),
    ("none", {}),
]
ids = lambda value: ",".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else str(value)


def mixer_of(name, settings, seed=0):
    kwargs = {name: settings}
    return construct(MIXERS, name, kwargs, "mixer", width=WIDTH, heads=HEADS, rngs=nnx.Rngs(seed))


def inputs(tokens=23, batch=2, seed=1):
    return jax.random.normal(jax.random.key(seed), (batch, tokens, WIDTH))


def marks(tokens=23, batch=2):
    """Which tokens are meta-tokens: the mixers that know of none do as without."""
    return jnp.asarray(np.random.default_rng(tokens).random((batch, 64)) < 0.4)[:, :tokens].at[:, :2].set(True)


@functools.cache
def stepper(name, settings, room=32):
    mixer = mixer_of(name, dict(settings))

    @jax.jit
    def step(x, cache, meta):
        length = cache["length"]
        positions = length[:, None] + jnp.arange(x.shape[1])
        return mixer(x, Context(positions=positions, mask=masks.Causal(offset=length), meta=meta), cache)[:2]

    empty = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), mixer.init_cache(2, room, jnp.float32))
    return mixer, step, empty


@pytest.mark.parametrize(("name", "settings"), VARIANTS, ids=ids)
def test_cached_is_whole(name, settings):
    """Token by token, in chunks of few and of many tokens, in one piece."""
    mixer, step, empty = stepper(name, tuple(settings.items()))
    x, meta = inputs(), marks()
    whole, nothing, _ = mixer(x, Context(mask=masks.Causal(), meta=meta))
    assert nothing is None
    for cuts in ([1] * 23, [5, 1, 17], [23]):
        cache, parts = empty, []
        for part, of_part in zip(*(jnp.split(array, np.cumsum(cuts)[:-1], 1) for array in (x, meta)), strict=True):
            y, cache = step(part, cache, of_part)
            parts.append(y)
        assert cache["length"].tolist() == [23, 23]
        np.testing.assert_allclose(jnp.concatenate(parts, 1), whole, atol=3e-6)


@pytest.mark.parametrize(("name", "settings"), VARIANTS, ids=ids)
def test_sequences_of_a_cache_have_lengths_of_their_own(name, settings):
    """The second sequence has two tokens less behind it than the first, in one cache."""
    mixer, step, empty = stepper(name, tuple(settings.items()))
    x, meta = inputs(), marks()
    long, short = (step(x[:, :n], empty, meta[:, :n])[1] for n in (9, 7))
    mixed = jax.tree.map(lambda a, b: jnp.stack([a[0], b[1]]), long, short)
    part = lambda array: jnp.stack([array[0, 9:12], array[1, 7:10]])
    y, _ = step(part(x), mixed, part(meta))
    whole = mixer(x, Context(mask=masks.Causal(), meta=meta))[0]
    np.testing.assert_allclose(y[0], whole[0, 9:12], atol=3e-6)
    np.testing.assert_allclose(y[1], whole[1, 7:10], atol=3e-6)


@pytest.mark.parametrize(("name", "settings"), VARIANTS, ids=ids)
def test_nobody_sees_the_future(name, settings):
    mixer = mixer_of(name, settings)
    x, context = inputs(tokens=9), Context(mask=masks.Causal(), meta=marks(9))
    one = mixer(x, context)[0]
    two = mixer(x.at[:, 5:].set(7.0), context)[0]
    np.testing.assert_allclose(one[:, :5], two[:, :5], atol=1e-6)
    assert name == "none" or not np.allclose(one[:, 5:], two[:, 5:])


@pytest.mark.parametrize(("name", "settings"), VARIANTS, ids=ids)
def test_gradients(name, settings):
    """Against differences, of the inputs and of every parameter; none is without an effect."""
    if name == "none":
        pytest.skip("it has no parameters")
    graph, params, *_ = split(mixer_of(name, settings))
    x, weights = inputs(5, 1), inputs(5, 1, seed=2)
    context = Context(mask=masks.Causal(), meta=marks(5, 1))
    run = lambda params, x: (nnx.merge(graph, nnx.State(params))(x, context)[0] * weights).sum()
    check_grads(run, (params, x), order=1, modes=["rev"], atol=2e-2, rtol=2e-2, eps=3e-3)
    for path, gradient in jax.tree_util.tree_leaves_with_path(jax.grad(run)(params, x)):
        # Of a window of one token the softmax is 1, whatever q and k are.
        if settings.get("window") != 1:
            assert np.abs(gradient).max() > 0, jax.tree_util.keystr(path)


@pytest.mark.parametrize(("name", "settings"), VARIANTS, ids=ids)
def test_bfloat16(name, settings):
    settings = {name: settings}
    low, high = (
        construct(MIXERS, name, settings, "mixer", width=WIDTH, heads=HEADS, dtype=dtype, rngs=nnx.Rngs(0))
        for dtype in (jnp.bfloat16, jnp.float32)
    )
    x, context = inputs().astype(jnp.bfloat16), Context(mask=masks.Causal(), meta=marks())
    y, want = low(x, context)[0], high(x.astype(np.float32), context)[0]
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(y.astype(np.float32), want, atol=0.1)

    @jax.jit
    def step(x, cache, meta):
        length = cache["length"]
        positions = length[:, None] + jnp.arange(x.shape[1])
        return low(x, Context(positions=positions, mask=masks.Causal(offset=length), meta=meta), cache)[:2]

    cache, parts = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), low.init_cache(2, 32, jnp.bfloat16)), []
    for cut in (slice(0, 21), slice(21, 22), slice(22, 23)):
        y, cache = step(x[:, cut], cache, context.meta[:, cut])
        parts.append(y)
    assert all(part.dtype == jnp.bfloat16 for part in parts)
    # What every step adds to (the cells of an lstm) is not rounded.
    kept = {
        part.dtype for key, part in cache.items() if key not in ("length", "meta", *("hc" if name == "lstm" else ()))
    }
    assert kept <= {jnp.dtype(jnp.bfloat16)}
    np.testing.assert_allclose(jnp.concatenate(parts, 1).astype(np.float32), want, atol=0.1)


@pytest.mark.parametrize("mixer", ["mla", "cca", "window", "lstm"])
def test_in_a_scanned_stack(mixer):
    loop, scan = (
        LanguageModel(vocab_size=11, width=16, depth=3, heads=4, mixer=mixer, stack=stack, rngs=nnx.Rngs(0))
        for stack in ("loop", "scan")
    )
    x = jax.random.randint(jax.random.key(1), (2, 9), 0, 11)
    want, _ = loop(x)
    np.testing.assert_allclose(scan(x)[0], want, atol=2e-5)
    cache, parts = scan.init_cache(2, 16), []
    for a, b in ((0, 4), (4, 5), (5, 9)):
        y, cache = scan.extend(x[:, a:b], cache)
        parts.append(y)
    np.testing.assert_allclose(jnp.concatenate(parts, 1), want, atol=2e-5)


# ---- what a cache holds ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "settings", "per_token", "fixed"),
    [
        ("attention", {}, 2 * 4 * D, 0),
        ("gqa", {}, 2 * 1 * D, 0),
        ("mla", {}, 2 * D + 2, 0),  # latent 2 D, rotary D / 2
        ("mla", {"rotary": "after", "value_latent_dim": 6}, 2 * D + 6, 0),
        ("cca", {}, 2 * 2 * D, 2 * 4 * D + D),  # q0, k0 of two tokens, 2 heads each; half of 2 value heads
        ("ccgqa", {}, 2 * 1 * D, 2 * 3 * D + D / 2),
        ("window", {"window": 4}, 0, 3 * 2 * 4 * D),
        ("neighborhood", {"window": 4, "dilation": 2}, 0, 2 * 3 * 2 * 4 * D),
        ("block_sparse", {}, 2 * 4 * D, 0),
        ("token_elimination", {}, 2 * 4 * D, 0),
        ("lstm", {}, 0, 2 * WIDTH),
        ("lstm", {"hidden": 6}, 0, 2 * 6),
        ("none", {}, 0, 0),
    ],
    ids=ids,
)
def test_bytes(name, settings, per_token, fixed):
    """float32 numbers of 4 bytes, and 4 bytes for the length."""
    mixer = mixer_of(name, settings)
    of = lambda dtype: lambda length: mixer.init_cache(1, length, dtype)
    assert memory.cache_bytes_per_token(of(jnp.float32), 64) == 4 * per_token
    assert memory.cache_bytes(of(jnp.float32), 64) == 4 * (64 * per_token + fixed) + 4
    assert memory.cache_bytes_per_token(of(jnp.bfloat16), 64) == 2 * per_token


@pytest.mark.parametrize(("name", "settings"), VARIANTS, ids=ids)
def test_caches_name_their_axes(name, settings):
    mixer = mixer_of(name, settings)
    for entry, shape in mixer.init_cache(2, 8, jnp.float32).items():
        axes = mixer.cache_axes[entry]
        assert len(axes) == len(shape.shape) and axes[0] == "batch", entry
        assert ("length" in axes) == (8 in shape.shape[1:]), entry


def test_a_window_continues_causally_only():
    mixer, _, empty = stepper("window", (("window", 4), ("kv_heads", 1)))
    with pytest.raises(ValueError, match="under a causal mask only"):
        mixer(inputs(3), Context(mask=masks.Full()), empty)


# ---- degenerate settings -----------------------------------------------------------------------------------------


def test_gqa_shares_by_four():
    one, two = mixer_of("gqa", {}), mixer_of("attention", {"kv_heads": 1})
    np.testing.assert_array_equal(one(inputs(), Context())[0], two(inputs(), Context())[0])
    assert GroupedQueryAttention(16, heads=2, rngs=nnx.Rngs(0)).kv_heads == 1
    assert GroupedQueryAttention(64, heads=16, rngs=nnx.Rngs(0)).kv_heads == 4


def test_multi_query_is_attention_with_its_keys_repeated():
    one, many = (Attention(WIDTH, heads=HEADS, kv_heads=k, rngs=nnx.Rngs(0)) for k in (1, HEADS))
    for name in ("k", "v"):
        getattr(many, name).kernel[...] = jnp.repeat(getattr(one, name).kernel[...], HEADS, 1)
    x, context = inputs(), Context(mask=masks.Causal())
    np.testing.assert_allclose(one(x, context)[0], many(x, context)[0], atol=2e-6)


def test_query_key_norm_by_hand():
    """Root mean squares of a head's entries, in front of the rotary angles; without rotary angles here. The size of a
    projection has no effect."""
    mixer = Attention(WIDTH, heads=HEADS, qk_norm=True, rope_theta=0.0, rngs=nnx.Rngs(0))
    mixer.q_norm.scale[...] = jnp.array([1.0, 2.0, 0.5, 1.5])
    x, context = inputs(), Context(mask=masks.Causal())
    y = mixer(x, context)[0]
    q, k, v = (jnp.einsum("btm,mhd->bhtd", x, layer.kernel[...]) for layer in (mixer.q, mixer.k, mixer.v))
    q, k = (part / np.sqrt((part**2).mean(-1, keepdims=True) + 1e-6) for part in (q, k))
    logits = jnp.einsum("bhtd,bhsd->bhts", q * mixer.q_norm.scale[...], k) / np.sqrt(D)
    weights = jax.nn.softmax(jnp.where(np.tri(23, dtype=bool), logits, -jnp.inf))
    want = mixer.o(jnp.einsum("bhts,bhsd->bthd", weights, v).reshape(2, 23, WIDTH))
    np.testing.assert_allclose(y, want, atol=2e-5)
    mixer.k.kernel[...] *= 30
    np.testing.assert_allclose(mixer(x, context)[0], y, atol=1e-4)


def test_partial_rotary_turns_the_first_entries():
    """Positions 0 and 5: the last entries of q and k are those of a mixer without positions."""
    mixer = mixer_of("attention", {"rope_dim": 2})
    plain = mixer_of("attention", {"rope_theta": 0.0})
    at = Context(positions=jnp.full((2, 23), 5))
    q, bare = mixer.project(inputs(), at, None)[0], plain.project(inputs(), at, None)[0]
    np.testing.assert_array_equal(q[..., 2:], bare[..., 2:])
    np.testing.assert_allclose(q[..., 0], bare[..., 0] * np.cos(5) - bare[..., 1] * np.sin(5), atol=1e-6)


def test_a_neighbourhood_of_everything_is_attention():
    x = inputs()
    for settings, grid in (({"window": 23}, None), ({"window": 23}, (23,))):
        context = Context(grid=grid)
        want = mixer_of("attention", {})(x, context)[0]
        np.testing.assert_allclose(mixer_of("neighborhood", settings)(x, context)[0], want, atol=2e-6)
    square, context = inputs(25), Context(grid=(5, 5))
    want = mixer_of("attention", {})(square, context)[0]
    np.testing.assert_allclose(mixer_of("neighborhood", {"window": 5})(square, context)[0], want, atol=2e-6)


def test_a_neighbourhood_on_a_grid_sees_its_neighbours():
    """Window 3 on a 5 x 5 grid: what stands at (0, 0) is seen by rows and columns 0 and 1, as windows shift there."""
    mixer, context = mixer_of("neighborhood", {"window": 3}), Context(grid=(5, 5))
    x = inputs(25, 1)
    changed = np.abs(mixer(x, context)[0] - mixer(x.at[:, 0].set(0.0), context)[0]).max((0, 2)) > 1e-6
    assert changed.reshape(5, 5).sum() == 4 and changed.reshape(5, 5)[:2, :2].all()


def test_a_causal_dilated_neighbourhood_by_hand():
    """window 3, dilation 2: position 6 sees 2, 4, 6, so what stands at 4 changes 4, 6 and 8."""
    mixer, causal = mixer_of("neighborhood", {"window": 3, "dilation": 2}), Context(mask=masks.Causal())
    x = inputs(10, 1)
    changed = np.abs(mixer(x, causal)[0] - mixer(x.at[:, 4].set(0.0), causal)[0]).max((0, 2)) > 1e-6
    assert np.flatnonzero(changed).tolist() == [4, 6, 8]


# ---- bi-level routing --------------------------------------------------------------------------------------------


def bilevel(**settings):
    return BilevelAttention(WIDTH, heads=HEADS, rngs=nnx.Rngs(0), **settings)


def test_bilevel_with_all_regions_is_attention():
    x, context = inputs(36), Context(grid=(6, 6))
    want = Attention(WIDTH, heads=HEADS, rope_theta=0.0, rngs=nnx.Rngs(0))(x, context)[0]
    ours = bilevel(regions=3, top_k=9, local=0)(x, context)[0]
    np.testing.assert_allclose(ours, want, atol=2e-6)
    assert np.abs(bilevel(regions=3, top_k=2, local=0)(x, context)[0] - want).max() > 1e-3
    grouped = Attention(WIDTH, heads=HEADS, kv_heads=2, rope_theta=0.0, rngs=nnx.Rngs(0))(x, context)[0]
    np.testing.assert_allclose(bilevel(regions=3, top_k=9, local=0, kv_heads=2)(x, context)[0], grouped, atol=2e-6)


def test_regions_by_hand():
    """A 4 x 4 grid in 2 x 2 regions: tokens 0, 1, 4, 5 are the first."""
    assert region_order((4, 4), 2).reshape(4, 4).tolist() == [
        [0, 1, 4, 5],
        [2, 3, 6, 7],
        [8, 9, 12, 13],
        [10, 11, 14, 15],
    ]
    assert region_order((2, 6), 2).tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]


def test_routing_by_hand():
    """Means of q are e_0, e_1, e_2, e_3, and of k e_1, e_2, 2 e_0, e_0 + e_3: region 0 prefers 2, then 3, ..."""
    q = jnp.eye(4).reshape(1, 4, 1, 1, 4) + jnp.array([1.0, -1.0]).reshape(1, 1, 2, 1, 1)  # noise with mean 0
    k = jnp.array([[0, 1, 0, 0], [0, 0, 1, 0], [2, 0, 0, 0], [1, 0, 0, 1.0]]).reshape(1, 4, 1, 1, 4)
    found = bilevel(regions=2, top_k=1, local=0).route(q, k)
    assert found[0, :, 0].tolist() == [2, 0, 1, 3]
    assert bilevel(regions=2, top_k=2, local=0).route(q, k)[0, 0].tolist() == [2, 3]


def test_bilevel_sees_what_it_is_routed_to(monkeypatch):
    """Regions of a 4 x 4 grid routed 0 -> 3, 1 -> 1, 2 -> 0, 3 -> 0: token 15 is seen by region 0 alone."""
    mixer, context, x = bilevel(regions=2, top_k=1, local=0), Context(grid=(4, 4)), inputs(16, 1)
    monkeypatch.setattr(BilevelAttention, "route", lambda self, q, k: jnp.array([[[3], [1], [0], [0]]]))
    changed = np.abs(mixer(x, context)[0] - mixer(x.at[:, 15].set(0.0), context)[0]).max((0, 2)) > 1e-6
    changed[15] = False  # its own query
    assert np.flatnonzero(changed).tolist() == [0, 1, 4, 5]


def test_local_enhancement_is_a_depthwise_convolution_of_v():
    mixer, context, x = bilevel(regions=2, top_k=4, local=3), Context(grid=(4, 6)), inputs(24)
    plain = bilevel(regions=2, top_k=4, local=0)
    for name in ("q", "k", "v", "o"):
        getattr(plain, name).kernel[...] = getattr(mixer, name).kernel[...]
    v = mixer.v(x).reshape(2, 4, 6, WIDTH)
    near = jax.lax.conv_general_dilated(
        v, mixer.near.kernel[...][:, :, None], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=WIDTH,
    )  # fmt: skip
    want = plain(x, context)[0] + mixer.o(near.reshape(2, 24, WIDTH))
    np.testing.assert_allclose(mixer(x, context)[0], want, atol=5e-6)


def test_bilevel_gradients(monkeypatch):
    """Of the attention; the routing has none, and differences would jump with it."""
    fixed = jnp.array([[[3, 0], [1, 2], [0, 2], [0, 3]]])
    monkeypatch.setattr(BilevelAttention, "route", lambda self, q, k: fixed)
    graph, params, *_ = split(bilevel(regions=2, top_k=2, local=3))
    x, weights = inputs(16, 1), inputs(16, 1, seed=2)
    run = lambda p: (nnx.merge(graph, nnx.State(p))(x, Context(grid=(4, 4)))[0] * weights).sum()
    check_grads(run, (params,), order=1, modes=["rev"], atol=2e-2, rtol=2e-2, eps=1e-3)


@pytest.mark.parametrize(("rotary", "absorbed"), [("decoupled", True), ("none", True), ("after", False)])
def test_a_step_of_latent_attention_makes_no_keys(rotary, absorbed):
    """Its products are fewer than those by which the keys alone are made of the cached latents; with `rotary="after"`
    they have to be made."""
    size, latent, length = 16, 8, 1024
    mixer = LatentAttention(WIDTH, heads=HEADS, head_dim=size, latent_dim=latent, rotary=rotary, rngs=nnx.Rngs(0))
    cache = mixer.init_cache(1, length, jnp.float32)
    context = lambda cache: Context(positions=cache["length"][:, None], mask=masks.Causal(cache["length"]))
    step = lambda x, cache: mixer(x, context(cache), cache)[0]
    keys = 2 * length * latent * HEADS * size
    assert (costs.count(step, jax.ShapeDtypeStruct((1, 1, WIDTH), jnp.float32), cache).flops < keys) == absorbed


def plain_cca(**settings):
    off = {"conv": False, "mean": False, "value_shift": False, "norm": False}
    return CompressedAttention(WIDTH, heads=HEADS, rngs=nnx.Rngs(0), **{**off, **settings})


def test_cca_with_everything_off_is_attention():
    """Two of four heads: the same arrays as attention with two heads of four entries; likewise grouped."""
    for ours, kv_heads in ((plain_cca(), 2), (plain_cca(cache_compression=4), 1)):
        theirs = Attention(WIDTH, heads=2, kv_heads=kv_heads, head_dim=D, rngs=nnx.Rngs(0))
        x, causal = inputs(), Context(mask=masks.Causal())
        np.testing.assert_array_equal(ours(x, causal)[0], theirs(x, causal)[0])


def test_cca_with_identity_convolutions_is_without():
    ours, plain = plain_cca(conv=True), plain_cca()
    for name in ("q", "k", "v", "o"):
        getattr(ours, name).kernel[...] = getattr(plain, name).kernel[...]
    assert not np.allclose(ours(inputs(), Context())[0], plain(inputs(), Context())[0], atol=1e-2)
    ours.channel_conv[...] = jnp.zeros_like(ours.channel_conv[...]).at[-1].set(1.0)
    ours.head_conv[...] = jnp.zeros_like(ours.head_conv[...]).at[-1].set(jnp.eye(D))
    np.testing.assert_allclose(ours(inputs(), Context())[0], plain(inputs(), Context())[0], atol=1e-6)


def test_cca_by_hand():
    """One head of two entries (compression 1, width 2), taps (1, 10) for every channel, then (1, 100) times identity.

    q0 = (1, 2, 3)_t in both entries: the first convolution gives q0[t-1] + 10 q0[t] = 10, 21, 32; the second
    10 * 100, 10 + 2100, 21 + 3200.
    """
    mixer = CompressedAttention(
        2, heads=1, query_compression=1, cache_compression=1, mean=False, norm=False, rope_theta=0.0, rngs=nnx.Rngs(0)
    )
    mixer.q.kernel[...] = mixer.k.kernel[...] = jnp.eye(2).reshape(2, 1, 2)
    mixer.channel_conv[...] = jnp.broadcast_to(jnp.array([1.0, 10.0])[:, None, None], (2, 2, 2))
    mixer.head_conv[...] = jnp.array([1.0, 100.0])[:, None, None, None] * jnp.eye(2) * jnp.ones((2, 2, 1, 1))
    mixer.v.kernel[...] = mixer.v_previous.kernel[...] = jnp.array([[1.0], [0.0]])
    x = jnp.array([1.0, 2.0, 3.0])[None, :, None] * jnp.ones(2)
    q, k, v, _ = mixer.project(x, Context(), None)
    np.testing.assert_allclose(q[0, :, 0, 0], [1000, 2110, 3221])
    np.testing.assert_allclose(k, q)
    np.testing.assert_allclose(v[0, :, 0], [[1, 0], [2, 1], [3, 2]])  # this token, the one before


def test_cca_mean_by_hand():
    """Two query heads q0 = 1 and 3, one key head k0 = 5: q = q0 + (q0 + 5) / 2, k = 5 + mean(3, 4)."""
    mixer = CompressedGroupedAttention(
        4, heads=2, head_dim=1, query_compression=1, cache_compression=2, conv=False, norm=False, value_shift=False,
        rope_theta=0.0, rngs=nnx.Rngs(0),
    )  # fmt: skip
    mixer.q.kernel[...] = jnp.zeros((4, 2, 1)).at[0, :, 0].set(jnp.array([1.0, 3.0]))
    mixer.k.kernel[...] = jnp.zeros((4, 1, 1)).at[0].set(5.0)
    q, k, _, _ = mixer.project(jnp.eye(4)[None, :1], Context(), None)
    np.testing.assert_allclose(q[0, 0, :, 0], [1 + 3, 3 + 4])
    np.testing.assert_allclose(k[0, 0, :, 0], [5 + 3.5])


def test_cca_norm():
    """Lengths are sqrt(D), times the temperature for keys."""
    mixer = mixer_of("ccgqa", {})
    mixer.temperature[...] = jnp.array([3.0])
    q, k, _, _ = mixer.project(inputs(), Context(), None)
    np.testing.assert_allclose(jnp.linalg.norm(q, axis=-1), 2.0, rtol=1e-5)
    np.testing.assert_allclose(jnp.linalg.norm(k, axis=-1), 6.0, rtol=1e-5)
    assert (unit(jnp.zeros(3)) == 0).all()


def test_latent_attention_by_its_equation():
    """Against the sums of the docstring, head by head in numpy."""
    mixer = mixer_of("mla", {"rope_dim": 2})
    x = inputs(6, 1)
    positions = jnp.arange(6)[None]
    c = np.asarray(mixer.latent_norm(mixer.down(x)))[0]
    turn = lambda part: np.asarray(
        mixer.queries(x, positions)[1] if part == "q" else mixer.latents(x, positions)["latent"]
    )
    rotated_q, rotated_k = turn("q")[0], turn("k")[0, :, 0, -2:]
    q = np.einsum("tm,mhd->thd", x[0], mixer.q.kernel[...])[..., :D]
    outs = []
    for h in range(HEADS):
        k = c @ mixer.k_up.kernel[...][:, h]
        scores = (q[:, h] @ k.T + rotated_q[:, h] @ rotated_k.T) / np.sqrt(D + 2)
        weights = np.exp(np.where(np.tri(6, dtype=bool), scores, -np.inf))
        outs.append(weights / weights.sum(1, keepdims=True) @ (c @ mixer.v_up.kernel[...][:, h]))
    want = np.concatenate(outs, 1) @ mixer.o.kernel[...]
    np.testing.assert_allclose(mixer(x, Context(mask=masks.Causal()))[0][0], want, atol=2e-6)


# ---- bad settings ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "settings", "words"),
    [
        (Attention, {"rope_dim": 3}, "an even number of the 4 entries of a head, not rope_dim=3"),
        (Attention, {"rope_dim": 6}, "not rope_dim=6"),
        (LatentAttention, {"rotary": "both"}, "mixer.rotary='both' must be one of decoupled, after, none"),
        (LatentAttention, {"rotary": "none", "rope_dim": 2}, "rope_dim=2 has no meaning"),
        (LatentAttention, {"rope_heads": 3}, "rope_heads=3 must divide heads=4"),
        (LatentAttention, {"rotary": "after", "rope_heads": 2}, "is for rotary='decoupled' only"),
        (LatentAttention, {"latent_dim": 0}, "mixer.latent_dim=0 must be at least 1"),
        (LatentAttention, {"rope_theta": 0.0}, "rotary='none' switches positions off"),
        (CompressedAttention, {"cache_compression": 3}, "heads=4 must be a multiple of cache_compression=3"),
        (CompressedAttention, {"query_compression": 4}, "that a multiple of query_compression=4"),
        (CompressedAttention, {"kernels": (2,)}, "must be two lengths"),
        (BilevelAttention, {"regions": 2, "top_k": 5}, "mixer.top_k=5 must be at most regions"),
        (BilevelAttention, {"local": 4}, "mixer.local=4 must be 0 or odd"),
        (WindowAttention, {"window": 0}, "mixer.window=0 must be at least 1"),
        (WindowAttention, {"rope_theta": -1.0}, "mixer.rope_theta=-1.0 must be above 0"),
    ],
)
def test_bad_settings_give_a_sentence(kind, settings, words):
    with pytest.raises(ValueError, match=words):
        kind(WIDTH, heads=HEADS, rngs=nnx.Rngs(0), **settings)


def test_convolutions_cannot_keep_segments_apart():
    with pytest.raises(ValueError, match="cannot keep segments apart"):
        mixer_of("cca", {})(inputs(), Context(segments=jnp.zeros((2, 23), jnp.int32)))
    packed = masks.Causal() & masks.Segments(jnp.zeros((2, 23), jnp.int32))
    with pytest.raises(ValueError, match="cannot keep segments apart"):
        mixer_of("cca", {})(inputs(), Context(mask=packed))


def test_images_only_is_said():
    x = inputs(16)
    with pytest.raises(ValueError, match="is for images"):
        bilevel()(x, Context())
    with pytest.raises(ValueError, match="regions=3 must divide the grid of 4 x 4 tokens"):
        bilevel(regions=3)(x, Context(grid=(4, 4)))
    with pytest.raises(ValueError, match="no causal form and no cache"):
        bilevel().init_cache(1, 8, jnp.float32)
    with pytest.raises(ValueError, match="on a grid has no causal form"):
        mixer_of("neighborhood", {"window": 3})(x, Context(mask=masks.Causal(), grid=(4, 4)))
    with pytest.raises(ValueError, match="stride=2: neighborhoods with a stride have no causal form"):
        mixer_of("neighborhood", {"window": 3, "stride": 2})(x, Context(mask=masks.Causal()))


@pytest.mark.parametrize("name", ["attention", "gqa", "mla", "window"])
def test_a_cache_is_for_causal_masks(name):
    mixer = mixer_of(name, {})
    cache = jax.tree.map(lambda part: jnp.zeros(part.shape, part.dtype), mixer.init_cache(2, 8, jnp.float32))
    with pytest.raises(ValueError, match="under a causal mask only"):
        mixer(inputs(4), Context(), cache)


def test_gqa_of_heads_that_are_no_multiple_of_four():
    of = lambda heads: construct(MIXERS, "gqa", {}, "mixer", width=heads * 4, heads=heads, rngs=nnx.Rngs(0)).kv_heads
    assert list(map(of, (8, 14, 9, 2))) == [2, 2, 1, 1]
