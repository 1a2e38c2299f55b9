"""Layers of spiking neurons, by name: tests take `TINY`, benchmarks `REAL`."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Case:
    """t steps of neurons; settings: of `spike_scan`."""

    t: int
    neurons: tuple[int, ...]
    origin: str
    settings: Mapping = field(default_factory=dict)


LIF = {"decay": 0.9}
REAL = {
    "cpu": Case(32, (1, 2**20), "the CPU target", LIF),
    "gpu": Case(32, (8, 2**19), "the GPU target", LIF),
    "gpu_soft": Case(32, (8, 2**19), "the same, soft reset", {**LIF, "reset": "soft"}),
    "conv": Case(4, (32, 32, 32, 64), "a convolution's output at four steps", LIF),
    "event_frames": Case(100, (16, 2048), "many steps of a small layer", LIF),
    "adaptive": Case(100, (16, 2048), "adaptive neurons", {**LIF, "adaptation_decay": 0.97, "adaptation_step": 0.2}),
    "synaptic": Case(100, (16, 2048), "current-based neurons", {**LIF, "current_decay": 0.8}),
}

TINY = {
    "if": Case(7, (2, 3), "no leak"),
    "lif": Case(9, (2, 5), "cpu", LIF),
    "lif_soft": Case(9, (2, 5), "gpu_soft", {**LIF, "reset": "soft"}),
    "adaptive": Case(11, (3, 2), "adaptive", {**LIF, "adaptation_decay": 0.9, "adaptation_step": 0.3}),
    "synaptic": Case(8, (2, 2, 2), "synaptic", {**LIF, "current_decay": 0.7, "reset": "soft"}),
    "one_step": Case(1, (4,), "T = 1", LIF),
    "one_neuron": Case(13, (), "no batch", LIF),
}
