"""What holds for every selector: density is counted, lists are causal, density 1 is dense, a cache sees the same."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lissom.models.context import Context
from lissom.models.language import LanguageModel
from lissom.models.mixers.attention import Attention
from lissom.models.mixers.block_sparse import BlockSparseAttention
from lissom.models.registry import construct
from lissom.models.selectors import SELECTORS
from lissom.models.selectors.base import Choice, lists, measured, top
from lissom.models.variables import Parts, merge, split
from lissom.ops.attention import Causal, Full, Segments, attention
from lissom.ops.attention.sparse import listed

BLOCK, HEADS, KV_HEADS, SIZE = 8, 4, 2, 8
CHUNK = jnp.array([20, 9])
"""Where the first of a chunk's rows stands, inside of a block."""
MIX = (("a_shape", {}), ("vertical_slash", {"verticals": 3, "slashes": 2, "first": 1, "recent": 1}))
SPARSE = {
    "strided": {},
    "a_shape": {"window": 1},
    "random": {"density": 0.4},
    "pooled": {"density": 0.4},
    "oracle": {"density": 0.4},
    "vertical_slash": {"verticals": 5, "slashes": 3, "first": 2, "recent": 1, "probe": 4},
    "learned_gate": {"density": 0.4},
    "representative_heads": {"proxies": 2, "gamma": 0.5, "least": 8},
    "page_bounds": {"pages": 2, "logical": 4, "streaming": (1,), "window": 1},
    "token_sparsity": {"tau": 0.6, "probes": 8},
    "per_head": {"assignment": MIX},
}
ALL = {
    "strided": {"stride": 1},
    "a_shape": {"window": 100},
    "random": {"density": 1.0},
    "pooled": {"density": 1.0},
    "oracle": {"density": 1.0},
    "vertical_slash": {"verticals": 1000, "slashes": 1},
    "learned_gate": {"density": None, "threshold": 0.0},
    "representative_heads": {"gamma": 1.0, "least": 1},
    "page_bounds": {"pages": 100},
    "token_sparsity": {"tau": 1.0},
    "per_head": {"assignment": (("a_shape", {"window": 100}), ("vertical_slash", {"verticals": 1, "slashes": 1000}))},
}
SELECTING = ("strided", "a_shape", "random", "page_bounds")
"""Those whose cached steps select, and see exactly what the parallel form sees."""


def build(name, settings, heads=HEADS, kv_heads=KV_HEADS, block=BLOCK):
    facts = {"heads": heads, "kv_heads": kv_heads, "head_dim": SIZE, "block": block}
    return construct(SELECTORS, name, {name: settings}, "selector", **facts, rngs=nnx.Rngs(0))


def qkv(length=37, batch=2, heads=HEADS, kv_heads=KV_HEADS, seed=0):
    keys = jax.random.split(jax.random.key(seed), 3)
    return [jax.random.normal(key, (batch, length, h, SIZE)) for key, h in zip(keys, (heads, kv_heads, kv_heads))]


def seen(mask, q, k):
    """The definition of a mask, bool [B, H, T, S]."""
    whole = mask.dense(q.shape[1], k.shape[1])
    whole = jnp.repeat(whole, q.shape[2] // whole.shape[1], 1) if whole.shape[1] > 1 else whole
    return jnp.broadcast_to(whole, (q.shape[0], q.shape[2], q.shape[1], k.shape[1]))


def mixer(name="strided", settings=None, **kwargs):
    kwargs = {"block": BLOCK, "kv_heads": KV_HEADS, **kwargs}
    return BlockSparseAttention(
        32, heads=HEADS, selector=name, selector_kwargs={name: settings or SPARSE[name]}, rngs=nnx.Rngs(1), **kwargs
    )


def test_every_selector_is_tested():
    assert set(SPARSE) == set(ALL) == set(SELECTORS)


# -------------------------------------------------------------------------------------------------------------- lists


@functools.cache
def selected(name, settings="sparse", offset="start"):
    """What a selector makes of random q, k, v, in one program: (mask [B, H, T, S], causal, info, y, dense y)."""
    q, k, v = qkv()
    selector = build(name, (SPARSE if settings == "sparse" else ALL)[name])

    def run(q, k, v, offset):
        mask, info = selector(q, k, offset)
        y = selector.attend(q, k, v, mask, info, "reference")
        whole = attention(q, k, v, mask=Causal(offset), implementation="reference")
        return (
            seen(mask, q, k),
            seen(Causal(offset), q, k),
            {key: info[key] for key in ("density", "per_head")},
            y,
            whole,
        )

    if offset == "start":
        result = jax.jit(lambda *x: run(*x, 0))(q, k, v)
    else:
        result = jax.jit(run)(q[:, 20:31], k, v, CHUNK)
    return jax.device_get(result)


@pytest.mark.parametrize("offset", ["start", "chunk"])
@pytest.mark.parametrize("name", SPARSE)
def test_density_is_counted_and_lists_are_causal(name, offset):
    whole, causal, info, y, _ = selected(name, offset=offset)
    per_head = (whole.sum((2, 3)) / causal.sum((2, 3))).mean(0)
    np.testing.assert_allclose(info["per_head"], per_head, rtol=1e-6)
    np.testing.assert_allclose(info["density"], per_head.mean(), rtol=1e-6)
    assert 0 < info["density"] < 1 and np.isfinite(y).all()
    assert not (whole & ~causal).any()
    own = np.arange(whole.shape[2]) + (np.zeros((2, 1), int) if offset == "start" else np.asarray(CHUNK)[:, None])
    sees_itself = np.take_along_axis(whole, own[:, None, :, None], 3)[..., 0]
    if name == "token_sparsity":
        assert sees_itself[:, :, -1].all() and (sees_itself == whole.any(-1)).all() and not sees_itself.all()
    else:
        assert sees_itself.all()


@pytest.mark.parametrize("name", ["pooled", "vertical_slash", "page_bounds", "strided"])
def test_no_future_block_is_listed(name):
    q, k, _ = qkv()
    part = listed(jax.jit(build(name, SPARSE[name]).__call__)(q, k)[0])
    blocks = getattr(part, "blocks", part)
    last = np.minimum(blocks.block_q * np.arange(1, blocks.index.shape[2] + 1), 37) - 1
    assert not np.asarray(blocks.block_map(37))[:, :, np.arange(5) * BLOCK > last[:, None]].any()


def test_density_by_hand():
    # 8 tokens, blocks of 2, sink 1 and window 1: rows of blocks list {0}, {0, 1}, {0, 2}, {0, 3}.
    # Diagonal blocks have 3 causal scores, the three below 4: (4 x 3 + 3 x 4) / (8 x 9 / 2) = 24 / 36.
    q, k, _ = qkv(8)
    mask, info = build("a_shape", {"sink": 1, "window": 1}, block=2)(q, k)
    assert float(info["density"]) == pytest.approx(24 / 36)
    assert [list(row[:n]) for row, n in zip(listed(mask).index[0, 0], listed(mask).count[0, 0])] == [
        [0],
        [0, 1],
        [0, 2],
        [0, 3],
    ]
    assert isinstance(listed(mask).index, np.ndarray)  # static: part of the program


def test_a_key_of_a_block_and_a_column_counts_once():
    # The diagonal alone, 4 blocks x 3 scores, and keys 1 and 4. Key 1: rows 2..7 outside its own block, 6 scores.
    # Key 4: rows 6, 7, 2 scores. The entry 8 is no key. (12 + 6 + 2) / 36.
    diagonal = np.eye(4, dtype=bool)[None, None]
    mask = lists(Choice(diagonal, 1, jnp.array([[[1, 4, 8]]])), 2, 2, 8, 8, 0)
    info = measured(mask, (1, 8, 1, SIZE), 8, 0)
    assert float(info["density"]) == pytest.approx(20 / 36)
    assert listed(mask).columns.count.tolist() == [[[1, 1, 2, 2]]]  # rows of block 1 reach key 3 only


def test_top_by_hand():
    scores = jnp.array([[[[9.0, 0, 0], [0, 1, 0], [3, 3, -5]]]])
    visible, own = np.tri(3, dtype=bool)[None, None], np.eye(3, dtype=bool)[None, None]
    got = top(scores, jnp.array([2, 1, 2]), visible, own)
    # Row 0 has but one visible block, row 1 keeps its own, row 2 its own and the earlier of two equal ones.
    assert got[0, 0].astype(int).tolist() == [[1, 0, 0], [0, 1, 0], [1, 0, 1]]


# --------------------------------------------------------------------------------------------------------------- dense


@pytest.mark.parametrize("name", ALL)
def test_density_1_is_dense(name):
    _, _, info, y, whole = selected(name, "all")
    np.testing.assert_allclose(info["per_head"], 1, atol=1e-6)
    np.testing.assert_allclose(y, whole, atol=1e-5)


@pytest.mark.parametrize("name", ["strided", "pooled", "learned_gate", "page_bounds"])
def test_shorter_than_a_block_is_dense(name):
    q, k, v = qkv(3)
    mask, info = build(name, SPARSE[name] | ({"streaming": ()} if name == "page_bounds" else {}))(q, k)
    assert float(info["density"]) == 1
    np.testing.assert_allclose(attention(q, k, v, mask=mask), attention(q, k, v, mask=Causal()), atol=1e-5)


# --------------------------------------------------------------------------------------------------------- the strided


@pytest.mark.parametrize("kv_heads,stride,local,shift", [(2, 2, 1, 0), (4, 3, 2, 1), (8, 8, 1, 5), (5, None, 1, 0)])
def test_the_shards_of_strided_cover_the_context(kv_heads, stride, local, shift):
    settings = {"stride": stride, "local": local, "shift": shift}
    table = build("strided", settings, heads=kv_heads, kv_heads=kv_heads).table(20)
    assert table.shape[0] == kv_heads
    assert (table.any(0) == np.tri(20, dtype=bool)).all()
    assert not table.all(0)[19, :10].any() or stride == 1  # no head alone does


@pytest.mark.parametrize("kv_heads,stride", [(2, 3), (4, 8), (1, 2)])
def test_strided_says_that_it_cannot_cover(kv_heads, stride):
    with pytest.raises(ValueError, match=f"stride={stride} leaves blocks that no head sees.*at most {kv_heads}"):
        build("strided", {"stride": stride}, heads=kv_heads, kv_heads=kv_heads)
    gaps = build("strided", {"stride": stride, "gaps": True}, heads=kv_heads, kv_heads=kv_heads).table(20)
    assert not gaps.any(0)[19].all()


def test_strided_by_hand():
    # Two heads, stride 2, step 2 // 2 = 1: head 0 sees even blocks, head 1 those with (j + 1) mod 2 = 0; and their own.
    table = build("strided", {"stride": 2}).table(4).astype(int).tolist()
    assert table == [
        [[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 1, 1]],
        [[1, 0, 0, 0], [0, 1, 0, 0], [0, 1, 1, 0], [0, 1, 0, 1]],
    ]
    dense = build("strided", {"dense_heads": 1, "stride": 3}).table(4)
    assert dense[0].tolist() == np.tri(4, dtype=bool).tolist() and dense[1].sum() < dense[0].sum()


# -------------------------------------------------------------------------------------------------------------- caches


def language(name, depth=1, chosen=None, mixer="block_sparse", **settings):
    chosen = {name: chosen or SPARSE[name]}
    own = {"selector": name, "selector_kwargs": chosen, "block": 4, "implementation": "reference"}
    return LanguageModel(
        vocab_size=13,
        width=16,
        depth=depth,
        heads=4,
        mixer=mixer,
        mixer_kwargs={"block_sparse": own | {"kv_heads": 2}},
        rngs=nnx.Rngs(2),
        **settings,
    )


def check_cache(name, tokens, *ways, length=22, **settings):
    """That the parallel form, which is sparse, gives the logits of the cache in chunks of these sizes."""
    model = language(name, **settings)
    whole, aux = nnx.jit(lambda model, tokens: model(tokens))(model, tokens)
    assert float(aux["metrics"]["density"].max()) < 1
    extend = nnx.jit(type(model).extend)
    for chunks in ways:
        cache, at = model.init_cache(tokens.shape[0], length), 0
        for size in chunks:
            logits, cache = extend(model, tokens[:, at : at + size], cache)
            np.testing.assert_allclose(logits, whole[:, at : at + size], atol=2e-5)
            at += size
        assert at == tokens.shape[1]


@pytest.mark.parametrize("name", SELECTING)
def test_cached_steps_see_what_the_parallel_form_sees(name):
    # Chunks that begin inside of blocks, single tokens, and a cache with room behind.
    check_cache(name, jax.random.randint(jax.random.key(0), (2, 21), 0, 13), (6, 1, 6, 1, 1, 6))


def test_cached_steps_of_heads_that_all_select():
    mix = (("a_shape", {"window": 1}), ("strided", {"stride": 3, "gaps": True}))
    chunks, tokens = (6, 1, 6, 1, 1, 6), jax.random.randint(jax.random.key(0), (2, 21), 0, 13)
    check_cache("per_head", tokens, chunks, chosen={"assignment": mix})


def test_some_layers_are_dense():
    """A pattern of mixers: the sparse ones report their density, and a cache gives what the whole sequence gives."""
    tokens = jax.random.randint(jax.random.key(0), (2, 21), 0, 13)
    check_cache("strided", tokens, (6, 1, 14), depth=4, mixer=("attention", "block_sparse"))


@pytest.mark.parametrize("name", ["strided", "page_bounds"])
def test_branches_are_continuations(name):
    model, prompt = language(name, depth=2), jax.random.randint(jax.random.key(0), (2, 9), 0, 13)
    rest = jax.random.randint(jax.random.key(1), (4, 5), 0, 13)
    want = model(jnp.concatenate([jnp.repeat(prompt, 2, 0), rest], 1))[0][:, 9:]
    cache = model.branch(model.extend(prompt, model.init_cache(2, 9))[1], 2, 5)
    first, cache = model.extend(rest[:, :2], cache)
    last, _ = model.extend(rest[:, 2:], cache)
    np.testing.assert_allclose(jnp.concatenate([first, last], 1), want, atol=2e-5)


@pytest.mark.parametrize("name", ["pooled", "learned_gate", "oracle"])
def test_prefill_in_chunks_of_whole_blocks_is_one_shot(name):
    check_cache(name, jax.random.randint(jax.random.key(0), (2, 16), 0, 13), (16,), (8, 8))


@pytest.mark.parametrize("name", ["vertical_slash", "representative_heads", "token_sparsity", "per_head"])
def test_prefill_in_one_shot_is_the_parallel_form(name):
    check_cache(name, jax.random.randint(jax.random.key(0), (2, 18), 0, 13), (18,))


@pytest.mark.parametrize("name", ["pooled", "a_shape"])
def test_a_step_is_dense_where_the_source_selects_in_prefill_only(name):
    layer = mixer(name)
    dense = Attention(32, heads=HEADS, kv_heads=KV_HEADS, rngs=nnx.Rngs(1))
    cache = {
        key: jax.random.normal(jax.random.key(n), shape.shape) if n < 2 else jnp.array([30, 17])
        for n, (key, shape) in enumerate(layer.init_cache(2, 40, jnp.float32).items())
    }
    x = jax.random.normal(jax.random.key(5), (2, 1, 32))
    context = Context(positions=cache["length"][:, None], mask=Causal(cache["length"]))
    y, _, aux = layer(x, context, cache)
    want, _, _ = dense(x, context, cache)
    assert (np.abs(y - want).max() < 1e-5) == (name == "pooled")
    assert (float(aux["metrics"]["density"]) == 1) == (name == "pooled")


@pytest.mark.parametrize("name", SELECTING)
def test_no_output_depends_on_a_later_token(name):
    q, k, v = qkv()
    selector = build(name, SPARSE[name])
    other = [x.at[:, 21:].set(jax.random.normal(jax.random.key(9), x[:, 21:].shape)) for x in (q, k, v)]
    run = jax.jit(lambda q, k, v: attention(q, k, v, mask=selector(q, k)[0], implementation="reference")[:, :21])
    one, two = run(q, k, v), run(*other)
    np.testing.assert_array_equal(one, two)


# ----------------------------------------------------------------------------------------------------------- the mixer


@pytest.mark.parametrize("name", SPARSE)
def test_gradients_go_through_attention_alone(name):
    q, k, v = qkv(21, batch=1)
    selector = build(name, SPARSE[name])
    fixed, _ = jax.jit(selector.__call__)(q, k)

    def through(q, k, v):
        mask, info = selector(q, k)
        return jnp.sin(selector.attend(q, k, v, mask, info, "xla")).sum()

    given = lambda q, k, v: jnp.sin(attention(q, k, v, mask=fixed, implementation="reference")).sum()
    for got, want in zip(*(jax.jit(jax.grad(f, (0, 1, 2)))(q, k, v) for f in (through, given))):
        assert np.isfinite(got).all() and np.abs(want).max() > 0
        np.testing.assert_allclose(got, want, atol=2e-5)


def test_the_mixer_is_attention_over_the_lists():
    layer, x = mixer("pooled"), jax.random.normal(jax.random.key(3), (2, 37, 32))
    dense = Attention(32, heads=HEADS, kv_heads=KV_HEADS, rngs=nnx.Rngs(1))
    call = jax.jit(lambda x: (layer(x, Context(mask=Causal())), dense(x, Context(mask=Causal()))[0]))
    (y, cache, aux), whole = call(x)
    assert cache is None and aux["losses"] == {}
    assert 0.3 < float(aux["metrics"]["density"]) < 0.9
    np.testing.assert_allclose(y[:, :BLOCK], whole[:, :BLOCK], atol=1e-5)
    assert np.abs(y - whole).max() > 1e-3


def test_packed_documents_stay_apart():
    ids = jnp.repeat(jnp.array([[0, 1, 2]]), 12, 1)
    layer, x = mixer("strided"), jax.random.normal(jax.random.key(3), (1, 36, 32))
    context = Context(mask=Causal() & Segments(ids))
    y, _, _ = layer(x, context)
    changed, _, _ = layer(x.at[:, :12].set(0), context)
    np.testing.assert_array_equal(y[:, 12:], changed[:, 12:])


def test_it_needs_a_causal_mask():
    with pytest.raises(ValueError, match="it needs a causal mask, got Full"):
        mixer()(jnp.zeros((1, 4, 32)), Context(mask=Full()))


def test_scan_is_loop_and_density_is_a_metric_of_each_layer():
    tokens, results = jax.random.randint(jax.random.key(0), (1, 13), 0, 13), []
    for stack in ("loop", "scan"):
        parts = split(language("learned_gate", depth=2, stack=stack))
        run = jax.jit(lambda *trees, graph=parts.graph: merge(Parts(graph, *trees))(tokens, train=True))
        logits, aux = run(*parts[1:])
        assert aux["metrics"]["density"].shape == (2,) and set(aux["losses"]) == {"gate_kl"}
        results.append(logits)
    np.testing.assert_allclose(*results, atol=1e-5)


REFUSED = [
    ("pooled", {"density": 0.0}, "selector.density=0.0 must be above 0 and at most 1"),
    ("random", {"density": 1.5}, "selector.density=1.5 must be above 0"),
    ("a_shape", {"window": 0}, "selector.window=0 must be at least 1"),
    ("a_shape", {"sink": -1}, "selector.sink=-1 must be at least 0"),
    ("strided", {"dense_heads": 2}, "selector.dense_heads=2 must be 0 .. 1"),
    ("vertical_slash", {"verticals": 0}, "selector.verticals=0 must be at least 1"),
    ("vertical_slash", {"first": -1}, "selector.first=-1 must be at least 0"),
    ("learned_gate", {"threshold": 0.1}, "give one, and None for the other"),
    ("learned_gate", {"density": None, "threshold": 2.0}, "selector.threshold=2.0 must be at least 0 and below 1"),
    ("learned_gate", {"gate_dim": 3}, "selector.gate_dim=3 must be even"),
    ("learned_gate", {"weight": -1.0}, "selector.weight=-1.0 must be at least 0"),
    ("representative_heads", {"proxies": 3}, "selector.proxies=3 must divide the 2 key-value heads"),
    ("representative_heads", {"stride": 3}, "selector.stride=3 must divide the block of 8"),
    ("representative_heads", {"gamma": 0.0}, "selector.gamma=0.0 must be above 0"),
    ("page_bounds", {"logical": 3}, "selector.logical=3 must divide the block of 8"),
    ("page_bounds", {"streaming": (2,)}, "names key-value heads between 0 and 1"),
    ("token_sparsity", {"tau": 2.0}, "selector.tau=2.0 must be above 0"),
    ("per_head", {"assignment": ("pooled",)}, "selector.assignment=('pooled',) must be pairs (name, settings)"),
    ("per_head", {"assignment": (("pooled", {}),) * 3}, "has 3 entries: they must divide the 4 heads"),
    ("per_head", {"assignment": (("token_sparsity", {}),)}, "selects for all heads together"),
    ("per_head", {"assignment": (("pooled", {"tau": 1}),)}, "has no setting 'tau'"),
]


@pytest.mark.parametrize("name,settings,sentence", REFUSED, ids=str)
def test_wrong_settings_are_one_sentence(name, settings, sentence):
    with pytest.raises(ValueError) as error:
        build(name, settings)
    assert sentence in str(error.value) and "\n" not in str(error.value)
