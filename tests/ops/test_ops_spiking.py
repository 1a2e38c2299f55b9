"""Spiking neurons: the implementations in XLA's operations against the reference, and that against numbers by hand."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lissom.ops import testing
from lissom.ops.spiking import OP, State, spike_scan, xla
from lissom.ops.spiking.cases import TINY
from lissom.ops.spiking.surrogates import SURROGATES
from tests.ops.neurons import whole

PLAIN = [name for name in OP.implementations if not name.startswith("pallas")]  # kernels have files of their own
FORMS = [name for name in PLAIN if name != "reference"]
NEURONS = {
    "if": {},
    "lif": {"decay": 0.9},
    "parametric": {"decay": np.array([0.3, 0.6, 0.9]), "threshold": np.array([[0.5], [1.0]])},
    "adaptive": {"decay": 0.8, "adaptation_decay": 0.9, "adaptation_step": 0.25},
    "synaptic": {"decay": 0.8, "current_decay": np.array([0.2, 0.5, 0.7])},
    "both": {"decay": 0.8, "current_decay": 0.5, "adaptation_decay": 0.9, "adaptation_step": 0.25},
}


@pytest.fixture(autouse=True)
def short_segments(monkeypatch):
    """So that tiny problems have several, and a rest in front of them."""
    monkeypatch.setattr(xla, "SEGMENT", 4)


def trajectory(current, implementation="reference", **settings):
    """(spikes, potentials behind each step) of one neuron, step by step."""
    spikes, potentials, state = [], [], None
    for now in current:
        s, state = spike_scan(jnp.array([now], jnp.float32), state, implementation=implementation, **settings)
        spikes.append(int(s[0]))
        potentials.append(float(state.v))
    return spikes, potentials


# ---- the reference, by hand -----------------------------------------------------------------------------------------


def test_without_spikes_a_leaky_neuron_is_a_geometric_sum():
    """v_t = I (1 - 0.5^t) / (1 - 0.5), which nears 2 I and stays below the threshold."""
    spikes, potentials = trajectory([0.375] * 6, decay=0.5)
    assert spikes == [0] * 6
    np.testing.assert_allclose(potentials, [0.75 * (1 - 0.5**t) for t in range(1, 7)])


def test_hard_and_soft_resets_by_hand():
    """I = 0.75, decay 1, threshold 1. Hard: 0.75, 1.5 -> 0, and again. Soft: 0.75, 1.5 -> 0.5, 1.25 -> 0.25, 1 -> 0."""
    assert trajectory([0.75] * 4) == ([0, 1, 0, 1], [0.75, 0, 0.75, 0])
    assert trajectory([0.75] * 4, reset="soft") == ([0, 1, 1, 1], [0.75, 0.5, 0.25, 0])
    assert trajectory([0.75] * 4, reset="none") == ([0, 1, 1, 1], [0.75, 1.5, 2.25, 3])
    assert trajectory([0.75] * 3, reset_to=-0.5) == ([0, 1, 0], [0.75, -0.5, 0.25])
    testing.show_equal("spiking", "reference")


def test_a_soft_reset_keeps_count():
    """Without a leak the spikes of T steps are floor(T I): nothing is lost."""
    spikes, _ = spike_scan(jnp.full((40, 1), 0.3125), reset="soft")
    assert int(spikes.sum()) == int(40 * 0.3125)


def test_synaptic_current_by_hand():
    """One pulse of 1 decays by halves: i = 1, 1/2, 1/4; v = 1 -> spike -> 0, then 1/2, 3/4."""
    assert trajectory([1.0, 0, 0], current_decay=0.5) == ([1, 0, 0], [0, 0.5, 0.75])


def test_adaptation_by_hand():
    """Each spike lifts the threshold by 1, which halves from step to step: 1, 2, 1 + 1/2, ..."""
    spikes, _ = trajectory([1.5] * 4, decay=0.0, adaptation_decay=0.5, adaptation_step=1.0)
    # a = 0 -> spike, a = 1: threshold 2; a = 1/2: 1.5 -> spike, a = 5/4: 2.25.
    assert spikes == [1, 0, 1, 0]


@pytest.mark.parametrize("implementation", PLAIN)
def test_the_corners(implementation):
    run = lambda current, **settings: spike_scan(current, implementation=implementation, **settings)[0]
    silent, loud = jnp.zeros((6, 3)), jnp.full((6, 3), 5.0)
    assert not run(silent, decay=0.9).any() and run(loud, decay=0.9).all()
    assert run(silent, threshold=0.0).all()  # at the threshold it spikes
    current = jax.random.normal(jax.random.key(0), (6, 3))
    np.testing.assert_array_equal(run(current, decay=0.0), current >= 1)
    np.testing.assert_array_equal(run(current, decay=1.0, reset="none"), jnp.cumsum(current, 0) >= 1)
    np.testing.assert_array_equal(run(current[:1]), current[:1] >= 1)


# ---- all forms ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
@pytest.mark.parametrize("implementation", FORMS)
@pytest.mark.parametrize("name", TINY)
def test_equals_reference(name, implementation, dtype):
    case = TINY[name]
    (current,) = testing.normal(0, (case.t, *case.neurons), dtype=dtype)
    call = lambda i, current: tuple(jax.tree.leaves(spike_scan(current, **case.settings, implementation=i)))
    testing.check_case(OP, call, {"current": current}, implementation, dtype)


@pytest.mark.parametrize("implementation", FORMS)
@pytest.mark.parametrize(("neuron", "reset"), [*itertools.product(NEURONS, ["hard", "soft", "none"])])
def test_every_neuron_and_reset(neuron, reset, implementation):
    """Spikes are the same, and the gradients of all that can be learned up to rounding; attached and not."""
    current = 0.5 + jax.random.normal(jax.random.key(0), (11, 2, 3))
    for attached, surrogate in ((False, "arctan"), (True, "triangle")):
        settings = {"reset": reset, "attached": attached, "surrogate": surrogate}
        settings |= {"reset_to": -0.25} if reset == "hard" else {}
        expected = whole("reference", NEURONS[neuron], settings, current)
        found = whole(implementation, NEURONS[neuron], settings, current)
        np.testing.assert_array_equal(found[0][0], expected[0][0])
        assert 0 < expected[0][0].mean() < 1
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5, rtol=2e-5), found, expected)


def test_attached_and_detached_differ():
    current = 0.5 + jax.random.normal(jax.random.key(0), (11, 2, 3))
    of = lambda attached: whole("reference", NEURONS["lif"], {"attached": attached}, current)[1][0]
    assert not np.allclose(of(True), of(False))


@pytest.mark.parametrize("implementation", PLAIN)
@pytest.mark.parametrize("neuron", ["lif", "both"])
def test_a_stream_in_parts_is_the_whole(neuron, implementation):
    current = 0.5 + jax.random.normal(jax.random.key(0), (11, 2, 3))
    run = lambda current, state: spike_scan(current, state, **NEURONS[neuron], implementation=implementation)
    spikes, state = run(current, None)
    first, between = run(current[:4], None)
    second, after = run(current[4:], between)
    np.testing.assert_array_equal(jnp.concatenate([first, second]), spikes)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), after, state)


def test_little_is_kept_between_the_passes(monkeypatch):
    """Beside the current: an eighth of it."""
    monkeypatch.undo()
    current = jnp.zeros((32, 1000))
    _, pull = jax.vjp(lambda x: spike_scan(x, decay=0.9, implementation="xla")[0], current)
    kept = sum(leaf.size for leaf in jax.tree.leaves(pull) if hasattr(leaf, "size"))
    assert current.size < kept <= current.size * (1 + 1 / 8) + 10


# ---- surrogates -----------------------------------------------------------------------------------------------------

AREAS = {"arctan": 1, "sigmoid": 1, "boxcar": 1, "gaussian": 1, "triangle": 1 / 2, "fast_sigmoid": 2 / 2}


@pytest.mark.parametrize("name", AREAS)
def test_areas(name):
    """With slope 2, as the table of surrogates says."""
    x = np.linspace(-4000, 4000, 8_000_001)
    values = np.asarray(SURROGATES[name].derivative(jnp.asarray(x), 2.0), np.float64)
    assert np.trapezoid(values, x) == pytest.approx(AREAS[name], rel=1e-2)


def test_surrogates_by_hand():
    at = lambda name, x, k: float(SURROGATES[name].derivative(jnp.float32(x), k))
    assert at("fast_sigmoid", -0.1, 10.0) == pytest.approx(1 / 4)
    assert at("superspike", 0.01, 100.0) == pytest.approx(1 / 4)
    assert at("arctan", 1 / np.pi, 2.0) == pytest.approx(1 / 2)
    assert at("sigmoid", 0.0, 4.0) == pytest.approx(1)
    assert [at("boxcar", x, 2.0) for x in (-0.24, 0.24, 0.26)] == [2, 2, 0]
    assert [at("triangle", x, 2.0) for x in (0.25, 0.6)] == [0.5, 0]
    assert at("straight_through", 7.0, 3.0) == 1


@pytest.mark.parametrize("name", SURROGATES)
def test_the_gradient_is_the_surrogate(name):
    """One step: ds/dI is its derivative at I - threshold, with its default slope and with another."""
    derivative, slope = SURROGATES[name]
    for given, k in ((None, slope), (0.7, 0.7)):
        found = jax.grad(lambda x, k=given: spike_scan(x[None], surrogate=name, slope=k)[0][0])(jnp.float32(0.6))
        np.testing.assert_allclose(found, derivative(jnp.float32(0.6 - 1), k), rtol=1e-5)


# ---- requests that do not fit ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"reset": "half"}, "reset is one of hard, soft, none"),
        ({"surrogate": "step"}, "surrogate is one of arctan"),
        ({"slope": 0.0}, "slope is above 0"),
        ({"adaptation_decay": 0.5}, "come together"),
        ({"decay": np.ones(4)}, r"decay broadcasts to the neurons \(2, 3\)"),
        ({"state": State(jnp.zeros(3))}, r"state.v has the shape \(2, 3\)"),
        ({"state": State(jnp.zeros((2, 3))), "current_decay": 0.5}, "state.i is missing"),
        ({"state": State(jnp.zeros((2, 3)), a=jnp.zeros((2, 3)))}, "state.a is of no use"),
        ({"implementation": "cuda"}, "spiking has no 'cuda'"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        spike_scan(jnp.zeros((4, 2, 3)), **settings)


@pytest.mark.parametrize("current", [jnp.zeros((4, 2), int), jnp.zeros((0, 2)), jnp.float32(1)])
def test_bad_currents(current):
    with pytest.raises(ValueError, match="current is"):
        spike_scan(current)


def test_on_a_mesh_as_on_one_device():
    from lissom.ops import dispatch

    current = 0.5 + jax.random.normal(jax.random.key(0), (6, 8, 3))
    decay = jnp.array([0.5, 0.7, 0.9])
    f = jax.jit(jax.grad(lambda current, decay: (spike_scan(current, decay=decay)[0] ** 2).sum(), (0, 1)))
    expected = f(current, decay)
    mesh = jax.make_mesh((8,), ("data",), (jax.sharding.AxisType.Auto,))
    with jax.set_mesh(mesh), dispatch.partition(mesh, batch="data"):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), f(current, decay), expected)


def test_a_current_that_is_no_number():
    current = jnp.array([[2.0], [jnp.nan], [2.0], [2.0]])
    for name in PLAIN:
        assert spike_scan(current, implementation=name)[0][:, 0].tolist() == [1, 0, 0, 0]
