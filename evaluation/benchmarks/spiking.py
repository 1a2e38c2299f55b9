"""Problems of the op `spiking`: a layer of neurons over time, forward, and forward and backward.

References: `scan` is the equations, differentiated by jax. `spyx` (extra `benchmarks`) and, in the worker, `snntorch`
and `spikingjelly` are other libraries' leaky neurons as they come, which differ in detail (spyx and snntorch compare
the potential before the step, or reset a step later): another problem of the same size, so that no gate checks them.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from lissom.evaluation.benchmarks.problem import InProcess, InWorker, Oracle, Problem, this_platform
from lissom.evaluation.ceilings import Work
from lissom.ops import spiking as op
from lissom.ops.spiking import spike_scan
from lissom.ops.spiking.cases import REAL, TINY, Case

OP = op.OP

CPU = ("cpu", "conv", "event_frames", "adaptive", "synaptic")
ACCELERATOR = ("gpu", "gpu_soft", "conv", "event_frames")
CHECKED = 256


def problems(platform: str, tiny: bool = False) -> list[Problem]:
    """What is measured on a platform ("cpu", "gpu", "tpu")."""
    if tiny:
        return [_problem(name, case, "float32", backward) for name, case in TINY.items() for backward in (False, True)]
    dtype = "float32" if platform == "cpu" else "bfloat16"
    names = CPU if platform == "cpu" else ACCELERATOR
    return [_problem(name, REAL[name], dtype, backward) for name in names for backward in (False, True)]


def _problem(name: str, case: Case, dtype: str, backward: bool) -> Problem:
    size, count = jnp.dtype(dtype).itemsize, case.t * int(np.prod(case.neurons))
    # Forward it reads currents and writes spikes; backward it reads currents and cotangents and writes gradients.
    work = Work(0, size * count * (5 if backward else 2), 0, dtype)
    forward = lambda name: lambda x: spike_scan(x, **case.settings, implementation=name)[0]
    return Problem(
        op=OP.name,
        name=f"{name}_backward" if backward else name,
        setting={
            "shape": f"T{case.t} " + "x".join(map(str, case.neurons)),
            "neuron": ", ".join(f"{key}={value}" for key, value in case.settings.items()) or "decay=1",
            "dtype": dtype,
            "passes": "forward and backward" if backward else "forward",
        },
        make_inputs=functools.partial(_make_inputs, case, dtype, backward),
        ours=lambda name: _passes(forward(name), backward),
        implementations=tuple(name for name in OP.runs_on(this_platform()) if name != "reference"),
        references=_references(case, backward),
        work=work,
        oracle=_oracle(case, backward),
    )


def _make_inputs(case: Case, dtype: str, backward: bool, key: jax.Array):
    keys = jax.random.split(key, 1 + backward)
    return tuple(jax.random.normal(k, (case.t, *case.neurons), jnp.float32).astype(dtype) for k in keys)


def _passes(forward, backward: bool):
    def both(x, cotangent):
        spikes, pull = jax.vjp(forward, x)
        return spikes, *pull(cotangent)

    return both if backward else lambda x: (forward(x),)


def _references(case: Case, backward: bool) -> dict[str, InProcess | InWorker]:
    scan = lambda x: spike_scan(x, **case.settings, implementation="reference")[0]
    found: dict[str, InProcess | InWorker] = {"scan": InProcess(_passes(scan, backward))}
    if set(case.settings) == {"decay"}:  # which the others have too
        options = {"decay": case.settings["decay"], "backward": backward}
        found["snntorch"] = InWorker("snntorch_leaky", options, same=False)
        found["spikingjelly"] = InWorker("spikingjelly_lif", options, same=False)
        if len(case.neurons) > 1:
            found["spyx"] = InProcess(_passes(functools.partial(_spyx, case), backward), same=False)
    return found


def _spyx(case: Case, x: jax.Array) -> jax.Array:
    import spyx.nn
    from flax import nnx

    layer = spyx.nn.LIF(case.neurons[1:], beta=case.settings["decay"], rngs=nnx.Rngs(0))
    return spyx.nn.run(layer, x)[0]


def _oracle(case: Case, backward: bool) -> Oracle:
    """The reference, on some neurons: they don't depend on each other. So few that none of them comes so near to the
    threshold that its spike is a matter of rounding."""
    count = int(np.prod(case.neurons))
    checked = np.unique(np.linspace(0, count - 1, min(count, CHECKED)).astype(int))
    pick = lambda x: np.asarray(x).reshape(case.t, count)[:, checked]

    def compute(inputs, dtype):
        part = [jnp.asarray(pick(x).astype(dtype)) for x in inputs]
        run = lambda x: spike_scan(x, **case.settings, implementation="reference")[0]
        return [np.asarray(x) for x in jax.jit(_passes(run, backward))(*part)]

    note = None if len(checked) == count else f"checked on {len(checked)} of {count} neurons"
    return Oracle(compute, lambda results: [pick(x) for x in results], note)
