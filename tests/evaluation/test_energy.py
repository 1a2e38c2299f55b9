"""Modelled energy, by hand."""

import pytest

from lissom.evaluation.energy import access, energy
from lissom.models.spiking.layers import Work

PICO = 1e-12


def work(**changes):
    given = {"products": 1000, "passes": 1, "steps": 1, "weights": 100, "inputs": 50, "outputs": 20, "binary": False}
    given |= {"events": changes.get("binary", False), "states": 0, "multiplications": 0, "floats": False}
    return Work(**{**given, **changes})


def test_access_is_interpolated():
    assert access(64, 100) == access(64, 8 * 1024) == 10
    assert access(8, 8 * 1024) == 1.25
    assert access(64, 20 * 1024) == 15  # half-way from 8 to 32 kB
    assert access(64, 1024 * 1024) == 100
    assert access(64, 1024 * 1024 + 1) == 1300


def test_a_dense_layer():
    found = energy([work()], [0.0])
    assert found.operations == pytest.approx(1000 * (0.2 + 0.1) * PICO)
    assert found.traffic == pytest.approx((1000 * 2 * 1.25 + 20 * 1.25) * PICO)
    floats = energy([work(floats=True)], [0.0])
    assert floats.operations == pytest.approx(1000 * (3.7 + 0.9) * PICO)
    assert floats.traffic == pytest.approx((1000 * 2 * 5 + 20 * 5) * PICO)
    # What the inputs are has no part in it.
    assert energy([work()], [700.0]) == found


def test_numbers_as_events():
    """Sums of spikes are multiplied, where they are not 0, also where they come once."""
    layer = work(events=True, states=1)
    found, dense = energy([layer], [300.0]), energy([layer._replace(events=False)], [300.0])
    assert found.operations == pytest.approx((300 * (0.2 + 0.1) + 20 * 0.1) * PICO)
    assert dense.operations == pytest.approx((1000 * (0.2 + 0.1) + 20 * 0.1) * PICO)
    # They come in any order, as spikes do (20 products each), and bring 8 bits more than an address.
    assert found.traffic == pytest.approx((300 * (1.25 + 10) + 15 * 2 * 6.25 + 20 * 10) * PICO)
    spikes = energy([layer._replace(binary=True)], [300.0])
    assert found.traffic - spikes.traffic == pytest.approx(15 * 2 * 1.25 * PICO)
    # A head of such numbers has no neurons.
    assert energy([work(events=True)], [300.0]).operations == pytest.approx(300 * (0.2 + 0.1) * PICO)


def test_a_spiking_layer():
    """1,000 products in 2 steps of 50 inputs: 10 a spike. 300 synaptic operations are 30 spikes."""
    layer = work(binary=True, states=1, passes=2, steps=2)
    found = energy([layer], [300.0])
    assert found.operations == pytest.approx((300 * 0.1 + 40 * 0.1) * PICO)
    # A weight, a potential twice; a spike's address twice; each potential twice a step.
    assert found.traffic == pytest.approx((300 * (1.25 + 10) + 30 * 10 + 40 * 10) * PICO)
    leaking = energy([layer._replace(multiplications=1)], [300.0])
    assert leaking.operations - found.operations == pytest.approx(40 * 3.1 * PICO)
    assert leaking.traffic == found.traffic
    # A current beside the potential: two states, each added to, read and written.
    current = energy([layer._replace(states=2)], [300.0])
    assert current.operations - found.operations == pytest.approx(40 * 0.1 * PICO)
    assert current.traffic - found.traffic == pytest.approx(40 * 10 * PICO)
    silent = energy([layer], [0.0])
    assert silent.operations == pytest.approx(40 * 0.1 * PICO)
    assert silent.traffic == pytest.approx(40 * 10 * PICO)


def test_the_first_layer_of_a_spiking_network():
    """The same numbers at all of 4 steps are multiplied once, their currents written once and read four times."""
    found = energy([work(states=1, passes=1, steps=4)], [300.0])
    assert found.operations == pytest.approx((1000 * 0.3 + 80 * 0.1) * PICO)
    assert found.traffic == pytest.approx((1000 * 2.5 + 20 * 5 * 5 + 80 * 10) * PICO)
    # Events that are numbers come at each step, and only those that are not 0.
    events = energy([work(states=1, passes=4, steps=4, events=True)], [300.0])
    assert events.operations == pytest.approx((300 * 0.3 + 80 * 0.1) * PICO)


def test_layers_add_up():
    layers = [work(states=1, passes=1, steps=4), work(binary=True, passes=4, steps=4), work()]
    whole = energy(layers, [10.0, 20.0, 30.0])
    parts = [energy([layer], [count]) for layer, count in zip(layers, (10.0, 20.0, 30.0), strict=True)]
    assert whole.operations == pytest.approx(sum(part.operations for part in parts))
    assert whole.traffic == pytest.approx(sum(part.traffic for part in parts))
