"""Passes derived from cascades, and predicted traffic against what compiled programs move."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lissom.evaluation import passes as p
from lissom.evaluation.program_traffic import bytes_accessed
from lissom.ops.softmax import softmax

ATTENTION = {"naive": p.ATTENTION_NAIVE, "deferred": p.ATTENTION_DEFERRED, "online": p.ATTENTION_ONLINE}
SOFTMAX = {"three_pass": p.SOFTMAX_THREE_PASS, "two_pass": p.SOFTMAX_TWO_PASS, "online": p.SOFTMAX_ONLINE}


@pytest.mark.parametrize("name, expected", [("naive", 3), ("deferred", 2), ("online", 1)])
def test_passes_of_attention_over_the_keys(name, expected):
    """The three numbers of the paper."""
    assert p.passes(ATTENTION[name], "m") == expected
    assert p.passes(ATTENTION[name], "p") == 1  # each query is on its own


def test_passes_within_a_block_of_online_attention():
    # Scores and their maximum; then exponentials with all sums.
    assert p.passes(p.ATTENTION_ONLINE, "m0") == 2


@pytest.mark.parametrize("name, expected", [("three_pass", 3), ("two_pass", 2), ("online", 2)])
def test_passes_of_softmax(name, expected):
    assert p.passes(SOFTMAX[name], "i") == expected


def test_passes_are_derived():
    """One reduction more in the way is one pass more, and one that is not in the way is none."""
    first = p.einsum("A[] = X[k]", "sum")
    second = p.einsum("B[] = X[k] A[]", "sum")
    beside = p.einsum("B[] = X[k]", "sum")
    last = p.einsum("C[] = X[k] A[] B[]", "sum")
    assert p.passes(p.Cascade("", (first,)), "k") == 1
    assert p.passes(p.Cascade("", (first, second)), "k") == 2
    assert p.passes(p.Cascade("", (first, second, last)), "k") == 3
    assert p.passes(p.Cascade("", (first, beside, last)), "k") == 2
    # Through a chain without the rank, and through a streamed value, the order is kept.
    chain = (first, p.einsum("D[] = A[]"), p.einsum("E[k] = X[k] D[]"), p.einsum("F[k] = E[k]"))
    assert p.passes(p.Cascade("", chain), "k") == 2


def test_a_running_value_is_at_hand_and_its_last_value_is_not():
    running = p.einsum("R[k+1] = R[k] X[k]")
    assert p.passes(p.Cascade("", (running, p.einsum("Y[k] = X[k] R[k+1]"))), "k") == 1
    assert p.passes(p.Cascade("", (running, p.einsum("Y[k] = X[k] R[k.last]"))), "k") == 2


def test_what_is_needed_before_it_is_whole_is_refused():
    circle = p.Cascade("circle", (p.einsum("Y[k] = X[k] S[]"), p.einsum("S[] = Y[k]", "sum")))
    with pytest.raises(ValueError, match="needed before it is whole"):
        p.passes(circle, "k")


def test_traffic_by_hand():
    sizes = {"m": 100, "p": 10, "e": 4, "f": 3, "m1": 5, "m0": 20}
    ends = 10 * 4 + 100 * 4 + 100 * 3 + 10 * 3  # Q, K, V, AV: each once
    # Naive: scores and exponentials are written in one pass and read in the next.
    assert p.traffic(p.ATTENTION_NAIVE, "m", sizes, itemsize=1) == ends + 4 * 1000
    assert p.traffic(p.ATTENTION_DEFERRED, "m", sizes, itemsize=1) == ends + 2 * 1000
    assert p.traffic(p.ATTENTION_ONLINE, "m", sizes, itemsize=1) == ends
    # What later passes need again of one query: 100 scores and 100 exponentials.
    assert p.traffic(p.ATTENTION_NAIVE, "m", sizes, itemsize=2, fast_memory=400) == 2 * ends
    assert p.traffic(p.ATTENTION_NAIVE, "m", sizes, itemsize=2, fast_memory=399) == 2 * (ends + 4000)


@pytest.mark.parametrize("name, reads", [("three_pass", 3), ("two_pass", 2), ("online", 2)])
def test_traffic_of_softmax_is_its_reads_and_one_write(name, reads):
    sizes = {"r": 7, "i": 60, "i1": 3, "i0": 20}
    assert p.traffic(SOFTMAX[name], "i", sizes, itemsize=4) == (reads + 1) * 7 * 60 * 4
    # A row in fast memory: every form reads once.
    assert p.traffic(SOFTMAX[name], "i", sizes, itemsize=4, fast_memory=60 * 4) == 2 * 7 * 60 * 4


@pytest.mark.parametrize("text", ["QK[m,p]", "QK = Q[e]", "A[m] B[m] = C[m]", "A[m] = ", "A[m] = B[m] * C[m]"])
def test_what_is_no_einsum_is_said(text):
    with pytest.raises(ValueError, match="is not of the form"):
        p.einsum(text)


def test_wrong_cascades_are_named():
    with pytest.raises(ValueError, match=r"A reduces \['k'\] by None"):
        p.Cascade("c", (p.einsum("A[] = X[k]"),))
    with pytest.raises(ValueError, match=r"A reduces \[\] by sum"):
        p.Cascade("c", (p.einsum("A[k] = X[k]", "sum"),))
    with pytest.raises(ValueError, match="A is made by 2 Einsums"):
        p.Cascade("c", (p.einsum("A[k] = X[k]"), p.einsum("A[k] = Y[k]")))
    with pytest.raises(ValueError, match="k has no recurrence"):
        p.Cascade("c", (p.einsum("A[] = X[k.last]"),))
    with pytest.raises(ValueError, match="has no rank z; it has e, f, m, p"):
        p.passes(p.ATTENTION_NAIVE, "z")
    with pytest.raises(ValueError, match="sizes lacks the ranks f"):
        p.traffic(p.ATTENTION_NAIVE, "m", {"m": 1, "p": 1, "e": 1})


# ---- against compiled programs -----------------------------------------------------------------------------

LENGTH, BLOCK, WIDTH = 2048, 256, 64
FAST = 4 * 2**20  # between a block of scores (2 MB) and all of them (16 MB)


def naive(q, k, v):
    scores = q @ k.T
    weights = jnp.exp(scores - scores.max(-1, keepdims=True))
    return (weights / weights.sum(-1, keepdims=True)) @ v


def deferred(q, k, v):
    scores = q @ k.T
    weights = jnp.exp(scores - scores.max(-1, keepdims=True))
    return (weights @ v) / weights.sum(-1, keepdims=True)


def by_blocks(q, k, v, unroll=False):
    def step(carry, block):
        (largest, total, out), (k, v) = carry, block
        scores = q @ k.T
        new = jnp.maximum(largest, scores.max(-1, keepdims=True))
        weights, rescale = jnp.exp(scores - new), jnp.exp(largest - new)
        return (new, total * rescale + weights.sum(-1, keepdims=True), out * rescale + weights @ v), None

    start = (jnp.full((len(q), 1), -jnp.inf), jnp.zeros((len(q), 1)), jnp.zeros_like(q))
    blocks = [x.reshape(-1, BLOCK, WIDTH) for x in (k, v)]
    (_, total, out), _ = jax.lax.scan(step, start, blocks, unroll=unroll)
    return out / total


FORMS = {"naive": naive, "deferred": deferred, "online": by_blocks}


def compiled(function, *shapes):
    return jax.jit(function).lower(*(jax.ShapeDtypeStruct(s, np.float32) for s in shapes)).compile()


@pytest.fixture(scope="module")
def programs():
    return {name: compiled(form, *[(LENGTH, WIDTH)] * 3) for name, form in FORMS.items()}


def test_the_three_forms_are_attention():
    q, k, v = np.random.default_rng(0).standard_normal((3, BLOCK * 2, WIDTH)).astype(np.float32)
    for form in FORMS.values():
        np.testing.assert_allclose(form(q, k, v), naive(q, k, v), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["naive", "deferred"])
def test_without_loops_and_fast_memory_the_count_is_xlas(programs, name):
    xla = programs[name].cost_analysis()["bytes accessed"]
    assert bytes_accessed(programs[name].as_text()) == pytest.approx(xla, rel=0.01)


def test_the_body_of_a_loop_counts_as_often_as_it_runs(programs):
    unrolled = compiled(lambda q, k, v: by_blocks(q, k, v, unroll=True), *[(LENGTH, WIDTH)] * 3)
    xla = unrolled.cost_analysis()["bytes accessed"]
    once = programs["online"].cost_analysis()["bytes accessed"]
    counted = bytes_accessed(programs["online"].as_text())
    assert once < 0.2 * xla
    assert counted == pytest.approx(xla, rel=0.15)


def test_predicted_traffic_orders_the_programs(programs):
    sizes = {"m": LENGTH, "p": LENGTH, "e": WIDTH, "f": WIDTH, "m1": LENGTH // BLOCK, "m0": BLOCK}
    predicted = {name: p.traffic(ATTENTION[name], "m", sizes) for name in FORMS}
    reported = {name: bytes_accessed(programs[name].as_text(), FAST) for name in FORMS}
    for more, less in itertools.pairwise(("naive", "deferred", "online")):
        assert predicted[more] > 1.5 * predicted[less]
        assert reported[more] > 1.5 * reported[less]
    # The prediction is a minimum.
    assert all(reported[name] >= predicted[name] for name in FORMS)


def test_xla_counts_cached_blocks_as_memory(programs):
    """Why the count above is not XLA's own: by that, attention by blocks would move the most."""
    unrolled = compiled(lambda q, k, v: by_blocks(q, k, v, unroll=True), *[(LENGTH, WIDTH)] * 3)
    own = {name: programs[name].cost_analysis()["bytes accessed"] for name in ("naive", "deferred")}
    assert unrolled.cost_analysis()["bytes accessed"] > own["naive"] > own["deferred"]


@pytest.mark.parametrize("name", SOFTMAX)
def test_the_programs_of_softmax_move_what_their_cascades_say(name):
    shape = (8192, 1024)
    program = compiled(lambda x: softmax(x, implementation=name), shape).as_text()
    sizes = {"r": shape[0], "i": shape[1], "i1": 1, "i0": shape[1]}
    assert bytes_accessed(program, 2**23) == pytest.approx(p.traffic(SOFTMAX[name], "i", sizes), rel=0.05)


def test_the_program_of_one_pass_reads_once():
    shape = (8192, 1024)
    program = compiled(lambda x: softmax(x, implementation="one_pass"), shape).as_text()
    assert bytes_accessed(program, 2**23) == 2 * 4 * shape[0] * shape[1]


def test_an_unknown_trip_count_is_refused():
    program = compiled(lambda x: jax.lax.while_loop(lambda x: x.sum() < 5, lambda x: x * 2, x), (100,)).as_text()
    with pytest.raises(ValueError, match="trip count of this loop is not known"):
        bytes_accessed(program)
