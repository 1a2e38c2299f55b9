"""The training step of a mixture whose experts lie on several devices, for machines that are described and not there:
lowered for H200s, compiled for eight chips of a TPU (libtpu: the second command of .ci/run)."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.experimental import topologies
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from lissom.models.context import Context
from lissom.models.moe.layer import MoE
from lissom.models.shapes import BATCH
from lissom.models.variables import logical_axes, merge, split
from lissom.ops import dispatch, testing
from lissom.training import sharding

WIDTH, EXPERTS, K, SEQUENCES, LENGTH = 512, 16, 2, 16, 256
SIZES = {"data 2, expert 4": (2, 1, 4, 1, 1), "expert 4, tensor 2": (1, 1, 4, 2, 1)}
AUTO = (AxisType.Auto,) * len(sharding.AXES)


def step(mesh):
    """(a layer's values and gradients as a function, its arguments as shapes that say where they lie)."""
    settings = {"experts": EXPERTS, "k": K, "shared": 1, "expansion": 3.0, "dtype": jnp.bfloat16}
    module = nnx.eval_shape(lambda: MoE(WIDTH, **settings, rngs=nnx.Rngs(0)))
    parts, axes = split(module), logical_axes(module)
    rows = NamedSharding(mesh, PartitionSpec(BATCH))

    def run(params, stats, x, dy):
        def layer(params, x):
            y, aux = merge(parts._replace(params=params, stats=stats))(x, Context(train=True))
            return y, sum(aux["losses"].values())

        (y, _), pull = jax.vjp(layer, params, x)
        return y, pull((dy, jnp.ones(())))

    shape = lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)
    placed = lambda tree: jax.tree.map(shape, tree, sharding.tree_shardings(tree, axes, mesh))
    x = jax.ShapeDtypeStruct((SEQUENCES, LENGTH, WIDTH), jnp.bfloat16, sharding=rows)
    return run, (placed(parts.params), placed(parts.stats), x, x)


@pytest.mark.parametrize(("sizes", "name"), [*zip(SIZES, ("xla", "pallas_gpu"))])
def test_lowers_for_h200s(sizes, name):
    h200 = AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="gpu")
    mesh = AbstractMesh(SIZES[sizes], sharding.AXES, AUTO, abstract_device=h200)
    run, args = step(mesh)
    with jax.sharding.use_abstract_mesh(mesh), dispatch.use(name):
        program = jax.jit(run).trace(*args).lower(lowering_platforms=("cuda",)).as_text(debug_info=True)
    assert testing.show_lowered(program, "cuda") == {("grouped_matmul", name)}
    assert "all_to_all" in program


@pytest.mark.tpu_compile
@pytest.mark.parametrize(("sizes", "name"), [*zip(SIZES, ("ragged_dot", "pallas_tpu"))])
def test_compiles_for_eight_chips_and_overlaps_the_shared_expert(sizes, name):
    """Products of the shared expert, forward or backward, stand between a start of an exchange and its end."""
    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x4").devices
    mesh = Mesh(np.array(devices).reshape(SIZES[sizes]), sharding.AXES, axis_types=AUTO)
    run, args = step(mesh)
    with sharding.on_mesh(mesh), dispatch.use(name):
        lowered = jax.jit(run).lower(*args)
    program = lowered.compile(compiler_options={"xla_tpu_enable_async_all_to_all": "true"}).as_text()
    assert testing.show_lowered(program, "tpu", "compiles") == {("grouped_matmul", name)}
    assert overlapped(program)


def overlapped(program: str) -> list[str]:
    """The matmuls outside of the experts that are scheduled while rows are under way."""
    under_way, found = set(), []
    for line in program[program.index("\nENTRY") :].splitlines():
        if started := re.search(r"(%all-to-all-start[\w.]*) = ", line):
            under_way.add(started[1])
        elif done := re.search(r"all-to-all-done\(.*(%all-to-all-start[\w.]*)\)", line):
            under_way.remove(done[1])
        elif under_way and re.search(r'op_name="jit\(run\)/(jvp|transpose\(jvp\(\)\)).{0,4}/dot_general', line):
            found.append(line)
    assert not under_way
    return found
