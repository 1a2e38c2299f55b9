"""Modelled energy of one example: operations and memory traffic, times published energies.

Nothing here is measured but the synaptic operations. Energies are those of a 45 nm process at 0.9 V (Horowitz 2014,
"Computing's energy problem", ISSCC, figure 1.1.9), in pJ:

    addition          32-bit 0.1, float32 0.9
    multiplication    8-bit 0.2, 32-bit 3.1, float32 3.7
    64 bits of a cache of 8 kB 10, of 32 kB 20, of 1 MB 100;  of DRAM 1,300 (its lower end)

An access costs its bits / 64 of that, with the size of the memory interpolated linearly, as Lemaire et al. 2022
(arXiv:2210.13107) do; below 8 kB it is that of 8 kB, above 1 MB DRAM. Each layer has a memory of its own for its
weights, its inputs and its potentials.

What is moved, for both kinds of layer without reuse between operations, weights and numbers at 8 bits, or floats:

    dense     of each multiplication a weight and an input are read; sums stay in a register; each output is written
    spiking   of each synaptic operation a weight is read, and a 32-bit potential read and written: events come in any
              order. Each spike is written and read as a 32-bit address, and where events carry numbers (counts of a
              sensor, sums of spikes) with 8 bits more, by which the weight is multiplied. At each step all that each
              neuron keeps (its potential, a current or an adaptation) is read, added to and written, and multiplied as
              often as it asks

A first layer that sees the numbers of a picture is a dense one, whose sums are written as 32-bit currents and read at
every step. A dense layer is not given the zeros of its inputs to skip; a spiking one lives off them. Where a recurrent
layer sees numbers, its own spikes are taken for numbers too.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from lissom.models.spiking.layers import Work

PICO = 1e-12
ADD = {32: 0.1, "float": 0.9}
MULTIPLY = {8: 0.2, 32: 3.1, "float": 3.7}
CACHES = ((8 * 1024, 10.0), (32 * 1024, 20.0), (1024 * 1024, 100.0))
DRAM = 1300.0
LINE = 64  # bits of the access that these are the energies of
POTENTIAL = 32  # bits of potentials, sums and addresses
NUMBER = 8  # bits of weights and of numbers that are no floats
FLOAT = 32


class Energy(NamedTuple):
    """In joules, of one example."""

    operations: float
    traffic: float


def access(bits: int, bytes_held: float) -> float:
    """pJ of reading or writing so many bits of a memory that holds so many bytes."""
    sizes, costs = zip(*CACHES, strict=True)
    line = DRAM if bytes_held > sizes[-1] else float(np.interp(bytes_held, sizes, costs))
    return line * bits / LINE


def energy(work: Sequence[Work], synaptic_operations: Sequence[float]) -> Energy:
    """Of all layers; `synaptic_operations` are those of each layer for a mean example."""
    operations = traffic = 0.0
    for layer, synapses in zip(work, synaptic_operations, strict=True):
        found = _spiking(layer, float(synapses)) if layer.states or layer.events else _dense(layer)
        operations, traffic = operations + found[0], traffic + found[1]
    return Energy(operations * PICO, traffic * PICO)


def _dense(layer: Work) -> tuple[float, float]:
    bits, product = (
        (FLOAT, MULTIPLY["float"] + ADD["float"]) if layer.floats else (NUMBER, MULTIPLY[NUMBER] + ADD[POTENTIAL])
    )
    read = access(bits, layer.weights * bits / 8) + access(bits, layer.inputs * bits / 8)
    written = layer.outputs * layer.steps * access(bits, layer.outputs * bits / 8)
    return layer.products * product, layer.products * read + written


def _spiking(layer: Work, synapses: float) -> tuple[float, float]:
    held, state = layer.weights * NUMBER / 8, layer.outputs * POTENTIAL / 8
    weight, potential = access(NUMBER, held), 2 * access(POTENTIAL, state)
    if layer.events:
        number = 0 if layer.binary else NUMBER
        operations = synapses * (ADD[POTENTIAL] + (MULTIPLY[NUMBER] if number else 0))
        # A spike goes to about as many outputs as any other.
        spikes = synapses * layer.inputs * layer.passes / layer.products
        event = access(POTENTIAL + number, layer.inputs * (POTENTIAL + number) / 8)
        traffic = synapses * (weight + potential) + spikes * 2 * event
    else:
        operations = layer.products * (MULTIPLY[NUMBER] + ADD[POTENTIAL])
        traffic = layer.products * (weight + access(NUMBER, layer.inputs * NUMBER / 8))
        traffic += layer.outputs * (layer.passes + layer.steps) * access(POTENTIAL, state)
    updates = layer.outputs * layer.steps
    operations += updates * (layer.states * ADD[POTENTIAL] + layer.multiplications * MULTIPLY[POTENTIAL])
    return operations, traffic + updates * layer.states * potential
