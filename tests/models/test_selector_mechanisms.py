"""Each selector does what its paper says: structured heads whose answer is known, and arithmetic by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lissom.models.context import Context
from lissom.models.mixers.attention import Attention
from lissom.models.mixers.block_sparse import TokenElimination
from lissom.models.registry import construct
from lissom.models.selectors import SELECTORS, scores
from lissom.models.selectors.learned_gate import distillation_target, gate_kl
from lissom.models.selectors.page_bounds import bounds
from lissom.models.selectors.quality import judged, quality
from lissom.models.selectors.search import search, streaming_heads
from lissom.models.selectors.token_sparsity import gather_blocks, kept_blocks, scatter_blocks
from lissom.models.variables import Parts, merge, split
from lissom.ops.attention import Causal, attention
from lissom.ops.attention.sparse import listed

BLOCK, LENGTH = 8, 64


def build(name, heads, kv_heads=None, head_dim=8, block=BLOCK, **settings):
    facts = {"heads": heads, "kv_heads": kv_heads or heads, "head_dim": head_dim, "block": block}
    return construct(SELECTORS, name, {name: settings}, "selector", **facts, rngs=nnx.Rngs(0))


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def causal_map(q, k):
    """The attention map [B, H, T, S], whole."""
    logits = jnp.einsum("bthd,bshd->bhts", q, jnp.repeat(k, q.shape[2] // k.shape[2], 2)) * q.shape[-1] ** -0.5
    hidden = jnp.arange(k.shape[1]) > jnp.arange(q.shape[1])[:, None]
    return jax.nn.softmax(jnp.where(hidden, -jnp.inf, logits), -1)


def structured(*kinds):
    """q, k, v [1, 64, heads, 66] with a head for each kind: "vertical" looks at key 19, "diagonal" 21 keys back,
    "block" at the keys of block 2, all at themselves where there is no such key yet. Feature t marks position t,
    feature 64 what is looked for."""
    q, k = np.zeros((2, 1, 64, len(kinds), 66), np.float32)
    first = {"vertical": 19, "diagonal": 21, "block": 16}
    for h, kind in enumerate(kinds):
        for t in range(64):
            k[0, t, h, t] = 1
            k[0, t, h, 64] = {"vertical": t == 19, "diagonal": 0, "block": t // BLOCK == 2}[kind]
            q[0, t, h, t if t < first[kind] else t - 21 if kind == "diagonal" else 64] = 160
    return jnp.array(q), jnp.array(k), normal(0, 1, 64, len(kinds), 8)


# ------------------------------------------------------------------------------------------------------------- scores


@pytest.mark.parametrize("reduce", ["sum", "max"])
def test_the_map_block_by_block_is_the_whole_map(reduce):
    q, k = normal(0, 2, 21, 4, 8), normal(1, 2, 21, 2, 8)
    whole = jnp.pad(causal_map(q, k), ((0, 0), (0, 0), (0, 3), (0, 3))).reshape(2, 4, 3, 8, 3, 8)
    want = whole.sum((3, 5)) if reduce == "sum" else whole.max((3, 5))
    run = jax.jit(lambda q, offset: scores.block_attention(q, k, offset, 8, reduce))
    np.testing.assert_allclose(run(q, 0), want, atol=1e-5)
    if reduce == "sum":
        np.testing.assert_allclose(want.sum(-1)[..., :2], 8, atol=1e-5)  # 8 rows a block, 1 each
    # A chunk of rows 8 .. 20 at its offset, one for each of the batch.
    np.testing.assert_allclose(run(q[:, 8:], jnp.array([8, 8])), want[:, :, 1:], atol=1e-5)


def largest(jaxpr):
    """Elements of the largest array in a jaxpr, inner ones included."""
    most = 0
    for equation in jaxpr.eqns:
        most = max([most, *(v.aval.size for v in equation.outvars)])
        for value in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(value, "jaxpr", value)
            most = max(most, largest(inner)) if hasattr(inner, "eqns") else most
    return most


def test_nothing_of_a_long_sequence_is_whole():
    long = 8192
    q, k, v = (jax.ShapeDtypeStruct((1, long, h, 16), jnp.float32) for h in (2, 1, 1))
    selectors = [build(name, 2, 1, 16, 128) for name in ("oracle", "learned_gate", "representative_heads")]
    functions = [lambda q, k, v, s=s: judged(s, q, k, v) for s in selectors]
    functions.append(lambda q, k, v: selectors[1].loss(q, k, (q, k)))
    for function in functions:
        assert largest(jax.make_jaxpr(function)(q, k, v).jaxpr) < long * long / 8
    whole = jax.make_jaxpr(lambda q, k, v: attention(q, k, v, implementation="reference"))(q, k, v)
    assert largest(whole.jaxpr) >= long * long  # the count sees what it is to see


def test_smallest_reaching_by_hand():
    mass = jnp.array([[4.0, 1, 3, 2], [0, 10, 0, 0], [1, 1, 1, 1]])
    # 4 + 3 = 7 of 10 reach 0.7, and 0.71 needs the 2 too; all mass in one entry; equal entries: 0.7 of 4 needs three.
    assert scores.smallest_reaching(mass, 0.7).tolist() == [2, 1, 3]
    assert scores.smallest_reaching(mass, 0.71).tolist() == [3, 1, 3]
    assert scores.smallest_reaching(mass, 1.0).tolist() == [4, 1, 4]


def test_quality_is_that_of_the_map():
    q, k, v = normal(0, 2, 24, 4, 8), normal(1, 2, 24, 2, 8), normal(2, 2, 24, 2, 8)
    mask, _ = build("a_shape", 4, 2, window=1)(q, k)
    weights, seen = causal_map(q, k), mask.dense(24, 24)
    got = quality(q, k, v, mask)
    np.testing.assert_allclose(got["recall"], jnp.where(seen, weights, 0).sum(-1).mean((0, 2)), atol=1e-5)
    values = jnp.repeat(v, 2, 2)
    part = jnp.where(seen, weights, 0)
    part, whole = (jnp.einsum("bhts,bshd->bhtd", w, values) for w in (part / part.sum(-1, keepdims=True), weights))
    size = lambda x: jnp.sqrt(jnp.square(x).sum((0, 2, 3)))
    np.testing.assert_allclose(got["error"], size(part - whole) / size(whole), atol=1e-5)


def test_the_oracle_recalls_most_at_equal_blocks():
    q, k, v = 3 * normal(0, 2, 64, 2, 8), normal(1, 2, 64, 2, 8), normal(2, 2, 64, 2, 8)
    judge = lambda name: jax.jit(functools.partial(judged, build(name, 2, density=0.4)))(q, k, v)
    results = {name: judge(name) for name in ("oracle", "pooled", "random")}
    densities = [float(values["density"].mean()) for values in results.values()]
    assert max(densities) - min(densities) < 1e-6
    recall = {name: float(values["recall"].mean()) for name, values in results.items()}
    assert recall["oracle"] > recall["pooled"] + 0.02 > recall["random"] + 0.02


# ------------------------------------------------------------------------------------------ MInference and its search


def test_vertical_slash_finds_a_column_and_a_diagonal():
    q, k, _ = structured("vertical", "diagonal")
    selector = build("vertical_slash", 2, head_dim=66, verticals=1, slashes=1, first=0, recent=0, probe=16)
    mask, _ = selector(q, k)
    columns, blocks = listed(mask).columns, listed(mask).blocks.block_map(64)
    assert columns.index[0, 0, :, 0].tolist() == [19] * 8
    assert columns.count[0, 0].tolist() == [0, 0, 1, 1, 1, 1, 1, 1]  # key 19 lies in block 2
    # 21 keys back: rows 8 i .. 8 i + 7 meet keys 8 i - 21 .. 8 i - 14, blocks i - 3 and i - 2; and their own.
    want = np.zeros((8, 8), bool)
    for back in (0, 2, 3):
        want |= np.eye(8, k=-back, dtype=bool)
    np.testing.assert_array_equal(blocks[0, 1], want)


def test_pooled_finds_a_block():
    q, k, _ = structured("block")
    mask, _ = build("pooled", 1, head_dim=66, density=0.25)(q, k)
    blocks = np.asarray(listed(mask).block_map(64))[0, 0]
    # Rows of blocks 4 .. 7 keep ceil(0.25 x 5 .. 8) = 2: their own and block 2.
    for i in range(4, 8):
        assert np.flatnonzero(blocks[i]).tolist() == [2, i]


def test_search_gives_each_head_its_pattern():
    q, k, v = structured("vertical", "diagonal", "block")
    q = jnp.concatenate([q, jnp.zeros_like(q[:, :, :1])], 2)  # a head that looks at everything alike
    k, v = jnp.concatenate([k, k[:, :, :1]], 2), jnp.concatenate([v, v[:, :, :1]], 2)
    found = {"verticals": 1, "slashes": 1, "first": 0, "recent": 0}
    candidates = {
        "a_shape": [{"sink": 1, "window": 2}, {"sink": 1, "window": 8}],
        "vertical_slash": [found],
        "pooled": [{"density": 0.25}],
    }
    assignment, report = search(q, k, v, density=0.7, block=BLOCK, candidates=candidates)
    names = ["vertical_slash", "vertical_slash", "pooled", "a_shape"]
    assert [name for name, _ in assignment] == names and assignment[0][1] == found
    assert assignment[3][1]["window"] == 2  # window 8 is dense: over the budget
    assert all(entry["density"] <= 0.7 for entry in report)
    # Rows of block 3 keep ceil(0.25 x 4) = 1 block, their own: 8 of 64 rows lose block 2.
    np.testing.assert_allclose([entry["recall"] for entry in report[:3]], [1, 1, 56 / 64], atol=1e-3)
    # The assignment is what per_head takes, and each head then does what its own selector does.
    selector = build("per_head", 4, head_dim=66, assignment=assignment)
    got = judged(selector, q, k, v)
    for name in ("density", "recall", "error"):
        np.testing.assert_allclose(got[name], [entry[name] for entry in report], atol=1e-5)
    with pytest.raises(ValueError, match=r"density=0.01 is below the sparsest candidate of head 0"):
        search(q, k, v, density=0.01, block=BLOCK, candidates={"a_shape": [{"sink": 1, "window": 1}]})


# ---------------------------------------------------------------------------------------------------------- page bounds


def test_a_bound_is_a_bound():
    q, k = normal(0, 2, 5, 4, 8), normal(1, 2, 12, 2, 8)
    got, products = bounds(q, k, 4), scores.products(q, k)
    assert (got >= products.reshape(2, 4, 5, 3, 4).max(-1) - 1e-5).all()
    np.testing.assert_allclose(bounds(q, k, 1), products, atol=1e-5)  # a page of one key is that key
    assert (bounds(q, k, 2).reshape(2, 4, 5, 3, 2).max(-1) <= got + 1e-5).all()  # finer pages bound tighter


def test_a_needle_is_found_in_its_page():
    q, k = 0.1 * normal(0, 1, 64, 2, 8), 0.1 * normal(1, 1, 64, 1, 8)
    q, k = q.at[0, 60].set(1.0), k.at[0, 19].set(3.0)
    mask, _ = build("page_bounds", 2, 1, pages=2, logical=4)(q, k)
    index = np.asarray(listed(mask).block_map(64))[0, :, 60]
    assert [np.flatnonzero(row).tolist() for row in index] == [[2, 7]] * 2  # key 19 in page 2, row 60 in page 7


def test_streaming_heads_see_sink_and_window():
    q, k, v = structured("vertical", "block")
    near = jnp.zeros((1, 64, 1, 66))
    q, k = (jnp.concatenate([x, near], 2) for x in (q, k))
    q, k = (x.at[0, jnp.arange(64), 2, jnp.arange(64)].set(9.0) for x in (q, k))  # a head that looks at itself
    v = jnp.concatenate([v, v[:, :, :1]], 2)
    found = streaming_heads(q, k, v, share=1 / 3, block=BLOCK)
    assert found == (2,)
    mask, _ = build("page_bounds", 3, head_dim=66, pages=3, streaming=found)(q, k)
    blocks = np.asarray(listed(mask).block_map(64))[0]
    assert np.flatnonzero(blocks[2, 60]).tolist() == [0, 6, 7] and blocks[0, 60].sum() == 3


# ----------------------------------------------------------------------------------------------------- learned gate


def test_the_target_is_the_pooled_map():
    q, k = normal(0, 1, 24, 4, 8), normal(1, 1, 24, 2, 8)
    largest_weights = causal_map(q, k).reshape(1, 4, 3, 8, 3, 8).max((3, 5))
    got = distillation_target(q, k, 8)
    np.testing.assert_allclose(got, largest_weights / largest_weights.sum(-1, keepdims=True), atol=1e-6)


def test_gate_kl_by_hand():
    # Four rows of blocks: the first quarter, row 0, is skipped. Rows 1, 2: equal, 0. Row 3: target (1, 0), gate
    # (1/4, 3/4): log 4. Mean over the three rows.
    target = jnp.array([[[[1.0, 0], [0.5, 0.5], [0.3, 0.7], [1, 0]]]])
    gate = jnp.array([[[[0.0, 1], [0.5, 0.5], [0.3, 0.7], [0.25, 0.75]]]])
    assert float(gate_kl(gate, target)) == pytest.approx(np.log(4) / 3)
    # Through a softmax the gradient is (gate - target) / rows, and 0 in the row that is skipped.
    logits = normal(0, 1, 1, 4, 2)
    got = jax.grad(lambda logits: gate_kl(jax.nn.softmax(logits, -1), target))(logits)
    want = (jax.nn.softmax(logits, -1) - target) / 3
    np.testing.assert_allclose(got, want.at[:, :, 0].set(0), atol=1e-6)


def test_the_gate_learns_where_attention_is_and_nothing_else_does():
    q, k, v = 4 * normal(0, 2, 64, 2, 8), normal(1, 2, 64, 2, 8), normal(2, 2, 64, 2, 8)
    parts = split(build("learned_gate", 2, density=0.3, rope_theta=0.0))
    gate = lambda params: merge(Parts(parts.graph, params, parts.stats, parts.frozen))
    loss = lambda params, q, k: gate(params).loss(q, k, (q, k))["gate_kl"]
    assert all(not np.any(g) for g in jax.grad(loss, (1, 2))(parts.params, q, k))
    step = jax.jit(jax.value_and_grad(loss))
    params, losses = parts.params, []
    for _ in range(60):
        value, gradient = step(params, q, k)
        losses.append(float(value))
        params = jax.tree.map(lambda p, g: p - 0.3 * g, params, gradient)
    assert all(np.any(g) for g in jax.tree.leaves(gradient)) and losses[-1] < 0.8 * losses[0]
    before, after = (judged(gate(p), q, k, v)["recall"].mean() for p in (parts.params, params))
    assert after > before + 0.02


def test_a_threshold_lists_what_is_above_it():
    q, k = 3 * normal(0, 1, 32, 2, 8), normal(1, 1, 32, 2, 8)
    selector = build("learned_gate", 2, density=None, threshold=0.3)
    blocks = listed(selector(q, k)[0]).block_map(32)
    np.testing.assert_array_equal(blocks, (selector.gate(q, k) > 0.3) | np.eye(4, dtype=bool))


# ----------------------------------------------------------------------------------------------- representative heads


def test_heads_share_a_ranking_and_have_budgets_of_their_own():
    q, k = normal(0, 1, 64, 4, 8), normal(1, 1, 64, 2, 8)
    q = q.at[:, :, 1].multiply(8.0)  # a head of sharp attention needs less
    selector = build("representative_heads", 4, 2, proxies=1, gamma=0.8, least=8)
    blocks = np.asarray(listed(selector(q, k)[0]).block_map(64))[0]
    counts = blocks[:, 7].sum(-1)
    last = causal_map(q, k)[0, :, 56:].reshape(4, 8, 8, 8).sum((1, 3))
    # The fewest blocks of the last rows that hold 0.8 of their mass.
    want = [int(np.argmax(np.cumsum(np.sort(mass)[::-1]) >= 0.8 * mass.sum())) + 1 for mass in np.asarray(last)]
    assert counts.tolist() == want and counts[1] < counts[0]
    # One ranking: what a head with the smaller budget sees, the others see too.
    for few, many in ((1, 0), (1, 2), (1, 3)):
        assert (blocks[many] | ~blocks[few])[counts[few] <= counts[many]].all()


def test_the_proxy_is_the_mean_of_its_group():
    q, k = normal(0, 1, 64, 4, 8), normal(1, 1, 64, 2, 8)
    proxied = build("representative_heads", 4, 2, proxies=2, stride=1, gamma=0.5, least=8)
    alike = build("representative_heads", 2, 2, proxies=2, stride=1, gamma=0.5, least=8)
    mean = q.reshape(1, 64, 2, 2, 8).mean(3)
    proxied.budgets = alike.budgets = lambda *_: jnp.full((1, 1), 0.5)
    one, two = (np.asarray(listed(mask).block_map(64)) for mask in (proxied(q, k)[0], alike(mean, k)[0]))
    np.testing.assert_array_equal(one, np.repeat(two, 2, 1))


# ------------------------------------------------------------------------------------------------------ token sparsity


def test_gathered_tokens_are_masked_tokens():
    q, k, v = 2 * normal(0, 2, 37, 4, 8), normal(1, 2, 37, 2, 8), normal(2, 2, 37, 2, 8)
    selector = build("token_sparsity", 4, 2, tau=0.7, probes=16)

    @jax.jit
    def both(q, k, v):
        mask, info = selector(q, k)
        masked = attention(q, k, v, mask=mask, implementation="reference")
        return selector.attend(q, k, v, mask, info, "reference"), masked, info["tokens"]

    gathered, masked, tokens = both(q, k, v)
    np.testing.assert_allclose(gathered, masked, atol=1e-5)
    kept = np.zeros((2, 38), bool)
    kept[np.arange(2)[:, None], np.asarray(tokens)] = True
    assert (np.asarray(gathered != 0).any((2, 3)) == kept[:, :37]).all() and 5 < kept.sum() < 60
    # Half of the tokens at most: smaller arrays.
    half = build("token_sparsity", 4, 2, tau=0.7, capacity=0.5, probes=16)
    assert jax.eval_shape(half.tokens, q, k).shape == (2, 19)  # ceil(37 / 2)


def test_tokens_are_those_that_reach_tau():
    # Every probe gives key 3 the weight 1 (keys behind 2 others before it exist for all but three probes).
    q, k = jnp.ones((1, 32, 1, 8)), jnp.zeros((1, 32, 1, 8)).at[0, 3].set(30.0)
    selector = build("token_sparsity", 1, tau=0.8, probes=32)
    index = np.asarray(selector.tokens(q, k))[0]
    # Probes 16 .. 31 and 16 between 0 and 31 are spread: of at most 32 rows at least 29 see key 3, more than 0.8.
    assert index[index < 32].tolist() == [31]  # n = 1: the last token, which is always kept
    assert build("token_sparsity", 1, tau=0.95, probes=32).tokens(q, k)[0, :3].tolist()[0] == 3


# -------------------------------------------------------------------------------------------------- token elimination


def test_blocks_are_gathered_and_put_back():
    x = normal(0, 2, 11, 3)
    index = kept_blocks(jnp.array([[5.0, 1, 0], [1, 5, 9]]), 0.6)
    assert index.tolist() == [[0, 2], [1, 2]]  # ceil(0.6 x 3) = 2 blocks, the last among them
    few = gather_blocks(x, index, 4)
    np.testing.assert_array_equal(few[0], np.concatenate([x[0, :4], x[0, 8:], np.zeros((1, 3))]))
    back = scatter_blocks(few, index, 4, 11)
    np.testing.assert_array_equal(back[1], x[1].at[:4].set(0))


def eliminating(keep, **kwargs):
    return TokenElimination(16, heads=2, keep=keep, block=4, rngs=nnx.Rngs(0), **kwargs)


def test_elimination_of_nothing_is_attention():
    x, context = normal(0, 2, 18, 16), Context(mask=Causal(), train=True)
    layer, dense = eliminating(1.0), Attention(16, heads=2, rngs=nnx.Rngs(0))
    (y, _, aux), (want, _, _) = jax.jit(lambda x: (layer(x, context), dense(x, context)))(x)
    np.testing.assert_allclose(y, want, atol=1e-5)
    assert float(aux["metrics"]["kept"]) == 1
    # Of 17 tokens in blocks of 4 the last block holds one, and is always kept: with three blocks of five, 9 of 17.
    layer = eliminating(0.5)
    y, _, aux = layer(x, Context(mask=Causal()))  # judging is dense
    np.testing.assert_allclose(y, want, atol=1e-5)
    assert not aux["metrics"]
    _, _, aux = layer(normal(0, 1, 17, 16), context)
    assert float(aux["metrics"]["kept"]) == pytest.approx(9 / 17)


@pytest.mark.parametrize("length", [32, 30])
def test_elimination_is_attention_among_what_is_kept(length):
    """Values and gradients of the parameters, at the positions that the tokens had."""
    x, weights = normal(0, 1, length, 16), normal(1, 1, length, 16)
    context = Context(mask=Causal(), train=True)
    graph, params, *rest = split(eliminating(0.5))
    dense = split(Attention(16, heads=2, rngs=nnx.Rngs(0))).graph
    index = kept_blocks(merge(Parts(graph, params, *rest)).importance(x), 0.5)
    kept = (np.asarray(index)[0][:, None] * 4 + np.arange(4)).ravel()
    kept = kept[kept < length]
    assert 0 < len(kept) < length and (np.diff(kept) > 1).any()

    def some(params):
        y = merge(Parts(graph, params, *rest))(x, context)[0]
        return (y * weights).sum(), y[:, kept]

    def reference(params):
        at = Context(mask=Causal(), positions=jnp.asarray(kept)[None])
        y = merge(Parts(dense, params, *rest))(x[:, kept], at)[0]
        return (y * weights[:, kept]).sum(), y

    got, want = (jax.jit(jax.grad(f, has_aux=True))(params) for f in (some, reference))
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=2e-5), got, want)


def test_eliminated_tokens_have_no_activations():
    x, context = normal(0, 2, 64, 16), Context(mask=Causal(), train=True)

    def saved(keep):
        """(bytes of activations that the backward pass of the layer keeps, function to (gradient of the sum, y))."""
        parts = split(eliminating(keep))
        run = lambda params, x: merge(Parts(parts.graph, params, parts.stats, parts.frozen))(x, context)[0]
        back = jax.eval_shape(lambda params, x: jax.vjp(run, params, x)[1], parts.params, x)
        own = {parameter.shape for parameter in jax.tree.leaves(parts.params)}
        size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(back) if leaf.shape not in own)
        total = lambda x: (run(parts.params, x).sum(), run(parts.params, x))
        return size, lambda: jax.jit(jax.grad(total, has_aux=True))(x)

    (whole, _), (half, results) = saved(1.0), saved(0.5)
    gradient, y = results()
    assert half < 0.51 * whole
    dropped = ~np.asarray(y != 0).any(-1)
    assert dropped.sum() == 64 and not np.asarray(gradient)[dropped].any()  # 2 x 64 tokens, half of them
    assert np.asarray(gradient)[~dropped].any(-1).all()
