"""Generated trajectories: they solve the equations of their environments, which both splits share."""

import numpy as np
import pytest
from scipy.integrate import solve_ivp

from lissom.data import load
from lissom.data.augmentations import augmentations
from lissom.data.dynamics import FAMILIES, dynamics, environment, integrated, solve
from lissom.data.errors import DataError

FEW = {"environments": 2, "length": 9, "train_size": 24, "test_size": 12}


@pytest.mark.parametrize("name", FAMILIES)
def test_trajectories_solve_the_equation(name):
    """scipy's integrator, from the same first state: float32 is what is left of the difference."""
    family, seed = FAMILIES[name], 3
    content = dynamics(families=(name,), environments=2, length=20, train_size=4, test_size=2, seed=seed)
    for states, at in zip(content.train["inputs"], content.train["environment"], strict=True):
        states = states.astype(np.float64) * family.deviation + family.mean
        p = environment(name, at, seed)
        field = lambda _, x, p=p: family.field(x, p)
        times = 0.2 * np.arange(20)
        exact = solve_ivp(field, (0, times[-1]), states[0], t_eval=times, rtol=1e-10, atol=1e-12).y.T
        np.testing.assert_allclose(states, exact, atol=2e-5)
        assert np.abs(states[1:] - states[0]).max() > 0.05


def test_fields_by_hand():
    """At x = (2, 3) and p = (0.5, 0.25, ...)."""
    expected = {
        "oscillator": (3, -0.5 * 2 - 0.25 * 3),
        "van_der_pol": (3, 0.5 * (1 - 4) * 3 - 2),
        "duffing": (3, 0.5 * 2 - 0.25 * 8 - 0.125 * 3),
        "lotka_volterra": (0.5 * 2 - 0.25 * 6, 0.125 * 6 - 1.0 * 3),
        "selkov": (-2 + 0.5 * 3 + 12, 0.25 - 0.5 * 3 - 12),
        "brusselator": (0.5 + 12 - 1.25 * 2, 0.25 * 2 - 12),
    }
    for name, (x, y) in expected.items():
        p = np.array([0.5, 0.25, 0.125, 1.0])
        np.testing.assert_allclose(FAMILIES[name].field(np.array([2.0, 3.0]), p), (x, y))


def test_the_integrators_error_is_of_fourth_order():
    """x' = -x, one step of h at a time: halving h divides the error by 16."""
    error = lambda length, h: abs(integrated(lambda x: -x, np.ones((1, 1)), length, h)[0, -1, 0] - np.exp(-0.01))
    # Steps of at most 0.01 are taken whole: 0.01 in one, and in two.
    coarse, fine = error(2, 0.01), error(3, 0.005)
    assert coarse == pytest.approx(0.01**5 / 120, rel=0.05)
    assert coarse / fine == pytest.approx(16, rel=0.05)


@pytest.mark.parametrize("name", FAMILIES)
def test_states_are_standardised(name):
    content = dynamics(families=(name,), environments=200, train_size=200, test_size=1000, seed=5)
    states = content.test["inputs"].reshape(-1, 2)
    np.testing.assert_allclose(states.mean(0), 0, atol=0.1)
    np.testing.assert_allclose(states.std(0), 1, atol=0.1)


def test_splits_share_environments_and_no_trajectory():
    content = dynamics(**FEW)
    for split in (content.train, content.test):
        np.testing.assert_array_equal(split["environment"][:12], range(12))
        np.testing.assert_array_equal(split["families"].argmax(1), split["environment"] // 2)
        assert (split["families"].sum(1) == 1).all()
    assert not np.isin(content.train["inputs"], content.test["inputs"]).any()
    # Two environments of a family have other parameters.
    for name in FAMILIES:
        assert (environment(name, 0, 0) != environment(name, 1, 0)).all()


def test_a_trajectory_depends_on_its_place_and_its_environment_alone():
    one = dynamics(**FEW)
    more = dynamics(**{**FEW, "train_size": 30, "test_size": 15})
    longer, other = dynamics(**{**FEW, "length": 12}), dynamics(**FEW, seed=1)
    np.testing.assert_array_equal(one.train["inputs"], more.train["inputs"][:24])
    np.testing.assert_array_equal(one.test["inputs"], more.test["inputs"][:12])
    np.testing.assert_array_equal(one.test["inputs"], longer.test["inputs"][:, :9])
    assert not np.isin(one.train["inputs"], other.train["inputs"]).any()
    # Trajectory 8 is of the first environment of its family, whether that stands alone or behind four others.
    alone = dynamics(**{**FEW, "families": ("selkov",)})
    assert list(FAMILIES)[4] == "selkov" and one.train["environment"][8] == 8 and alone.train["environment"][8] == 0
    np.testing.assert_array_equal(alone.train["inputs"][8], one.train["inputs"][8])


def test_loaded_fields():
    data = load("dynamics", **FEW)
    names, parameters = zip(*data.info["systems"], strict=True)
    assert names[:4] == ("oscillator",) * 2 + ("van_der_pol",) * 2
    assert parameters[3] == environment("van_der_pol", 1, 0).tolist()
    states, of = data.test.arrays["inputs"], data.test.arrays["environment"]
    np.testing.assert_allclose(solve(states, of, data.info["systems"], 0.2), states, atol=2e-5)
    assert data.kind == "trajectory"
    assert {name: data.info[name] for name in ("environments", "interval", "input_shape")} == {
        "environments": 12,
        "interval": 0.2,
        "input_shape": (9, 2),
    }
    assert {k: (v.shape, v.dtype) for k, v in data.test[1].items()} == {
        "inputs": ((9, 2), np.float32),
        "environment": ((), np.int32),
        "families": ((6,), np.float32),
    }


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"families": ()}, "families must name at least one family"),
        ({"families": ("selkow",)}, "dynamics has no family 'selkow'; did you mean 'selkov'"),
        ({"families": ("selkov", "selkov")}, "families names 'selkov' twice"),
        ({"environments": 0}, "environments must be at least 1, got 0"),
        ({"length": 1}, "length must be at least 2, got 1"),
        ({"interval": 0.0}, "interval must be above 0, got 0.0"),
        ({"train_size": 47}, "train_size must be at least 48, one of each environment, got 47"),
        ({"test_size": 0}, "test_size must be at least 48, one of each environment, got 0"),
    ],
)
def test_bad_settings_give_a_sentence(settings, words):
    with pytest.raises(DataError, match=words):
        load("dynamics", **settings)


def test_trajectories_are_not_augmented():
    with pytest.raises(DataError, match="changes images, signals and frames, and this dataset is of trajectories"):
        augmentations("noise", "trajectory")
