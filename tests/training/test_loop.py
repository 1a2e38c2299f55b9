"""The loop's promises: resumed == uninterrupted, many devices == one, damage is named, nothing is lost."""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from lissom.training.checkpoints import Checkpoints
from lissom.training.errors import UserError
from lissom.training.session import Session
from tests.cases import slow, some
from tests.families import FAMILIES

ROOT = pathlib.Path(__file__).parent.parent.parent


def arrays(workdir, step):
    """The saved arrays of a step, by name."""
    import orbax.checkpoint as ocp

    def read(path, names):
        kinds = {name: ocp.RestoreArgs(restore_type=np.ndarray) for name in names}
        with ocp.PyTreeCheckpointer() as reader:
            return reader.restore(path, args=ocp.args.PyTreeRestore(item=dict.fromkeys(names, 0), restore_args=kinds))

    record = Checkpoints(workdir / "checkpoints").record(step)
    frozen = record["frozen"].get("crc", {})
    found = read(workdir / "checkpoints" / str(step) / "state", [name for name in record["crc"] if name not in frozen])
    return found | (read(workdir / "frozen" / record["frozen"]["directory"], list(frozen)) if frozen else {})


def same(one, other):
    assert one.keys() == other.keys()
    return [name for name in one if not np.array_equal(one[name], other[name])]


# One of each kind of data, and of what is saved: running averages, layers in a scan, memories, branches, carved layers.
RESUMED = ("vit", "resnet", "keyed_experts", "sequence_scan", "sets", "in_context", "dynamics", "meta_sgd")
RESUMED += ("contrastive", "language", "branches", "read_me", "spiking")


@pytest.mark.parametrize("family", some(FAMILIES, RESUMED))
def test_resumed_is_uninterrupted(family, tiny_run, tmp_path):
    recipe, overrides = FAMILIES[family]
    settings = {**overrides, "train.steps": 4, "checkpoint.every": 2, "checkpoint.keep": 5}
    _, whole = tiny_run(recipe, "whole", **settings)
    shutil.copytree(whole, tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "checkpoints" / "4")
    result, cut = tiny_run(recipe, "cut", **settings)
    assert result["step"] == 4
    assert same(arrays(whole, 4), arrays(cut, 4)) == []
    assert same(arrays(whole, 2), arrays(whole, 4)) != []


def test_resumed_on_a_mesh(tiny_run, tmp_path):
    """A scanned stack is saved a layer at a time and must come back in its place on the mesh."""
    recipe, overrides = FAMILIES["sequence_scan"]
    settings = {**overrides, "train.steps": 4, "checkpoint.every": 2, "mesh.data": 2, "mesh.fsdp": 2}
    _, whole = tiny_run(recipe, "whole", **settings)
    shutil.copytree(whole, tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "checkpoints" / "4")
    _, cut = tiny_run(recipe, "cut", **settings)
    assert same(arrays(whole, 4), arrays(cut, 4)) == []


def test_nothing_is_thrown_away_where_every_checkpoint_is_damaged(tiny_run):
    settings = {"model.width": 64, "model.mixer": "none"}
    _, workdir = tiny_run("vision/digits_vit", **settings)
    _damage(workdir, "truncated")
    with pytest.raises(UserError, match="--overwrite"):
        tiny_run("vision/digits_vit", **settings)
    assert Checkpoints(workdir / "checkpoints").steps() == [3]


MESHES = [{"data": 8}, {"fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2}]


ON_DEVICES = ("vit", "resnet", "sequence_scan", "language", "block_transformer", "meta", "episodes")
# Of the meta-learners each has its own way through a mesh: normalisation by the task, conjugate gradients, no gradient,
# memories that all devices share.
META = {
    "maml, normalised": ("fewshot/glyphs", {}),
    "imaml": ("fewshot/sinusoid", {"objective": "imaml"}),
    "reptile": ("fewshot/glyphs", {"objective": "reptile"}),
    "contrastive": FAMILIES["contrastive"],
}


@pytest.mark.parametrize(
    ("family", "meshes"),
    [
        # For what is not split over experts, `expert` is an axis of the batch as `data` is: once is enough.
        ("language", [*MESHES, {"data": 2, "expert": 4}]),
        *((family, MESHES[-1:]) for family in ON_DEVICES if family != "language"),
        *(slow(family, MESHES[:-1]) for family in ON_DEVICES if family != "language"),
        *(slow(family, MESHES[-1:]) for family in META),
    ],
)
def test_eight_devices_are_one(family, meshes, tiny_run):
    recipe, overrides = META[family] if family in META else FAMILIES[family]
    # Not Adam: where a gradient is zero but for rounding it would make a whole step of the rounding.
    overrides = {**overrides, "optim.name": "sgd", "optim.learning_rate": 0.1}
    _, one = tiny_run(recipe, "one", **overrides)
    single = arrays(one, 3)
    for i, mesh in enumerate(meshes):
        sizes = {f"mesh.{axis}": size for axis, size in {"data": 1, **mesh}.items()}
        _, many = tiny_run(recipe, f"mesh{i}", **overrides, **sizes)
        for name, value in arrays(many, 3).items():
            if value.dtype == np.float32 and not name.startswith("opt"):
                np.testing.assert_allclose(value, single[name], atol=2e-4, err_msg=f"{mesh} {name}")


def test_parameters_and_moments_are_split(tiny_run):
    from lissom.training import sharding
    from lissom.training.building import assemble, fresh_state
    from lissom.training.config import load_recipe, overridden

    config = overridden(load_recipe("configs/language/recall_lm.py:tiny"), [("mesh.data", 1), ("mesh.fsdp", 8)])
    mesh = sharding.make_mesh(config.mesh)
    state = fresh_state(assemble(config, {"vocab_size": 64}, 3, mesh), jax.random.key(0))
    kernel = state["params"]["blocks"][0]["ffn"]["up"]["kernel"]
    assert kernel.addressable_shards[0].data.size * 8 == kernel.size
    moments = [leaf for leaf in jax.tree.leaves(state["opt"]) if leaf.shape == kernel.shape]
    assert moments and all(leaf.addressable_shards[0].data.size * 8 == leaf.size for leaf in moments)


def test_accumulation_is_the_whole_batch(tiny_run):
    _, one = tiny_run("vision/mnist1d_transformer", "one")
    _, four = tiny_run("vision/mnist1d_transformer", "four", **{"optim.accumulate": 4})
    whole, parts = arrays(one, 3), arrays(four, 3)
    for name in whole:
        if name.startswith("params"):
            np.testing.assert_allclose(parts[name], whole[name], atol=1e-4, err_msg=name)


def test_accumulation_weighs_tokens():
    """Micro-batches with 1 and 3 scored tokens: the gradient of the whole batch is the mean over four tokens."""
    from lissom.training import sharding
    from lissom.training.building import assemble, fresh_state
    from lissom.training.config import load_recipe, overridden
    from lissom.training.step import make_step

    config = overridden(load_recipe("configs/language/recall_lm.py:tiny"), [("optim.name", "sgd")])
    assembly = assemble(config, {"vocab_size": 64}, 3, sharding.make_mesh({"data": 1}))
    tokens = np.random.default_rng(0).integers(0, 64, (2, 8)).astype(np.int32)
    weights = np.zeros((2, 8), np.float32)
    weights[0, :1], weights[1, 2:5] = 1, 1
    batch = {"inputs": tokens, "labels": tokens[:, ::-1], "weights": weights, "mask": np.ones(2, np.float32)}
    results = []
    for accumulate in (1, 2):
        state = fresh_state(assembly, jax.random.key(0))
        frozen = state.pop("frozen")
        results.append(make_step(assembly, accumulate)(state, frozen, batch, jax.random.key(1)))
    for one, other in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)


def _damage(workdir, how):
    files = list((workdir / "checkpoints" / "3" / "state" / "d").iterdir())
    for file in files:
        raw = bytearray(file.read_bytes())
        if how == "truncated":
            raw = raw[: len(raw) // 2]
        else:
            for at in range(len(raw) // 4, len(raw), max(len(raw) // 4, 1)):
                raw[at] ^= 0x10
        file.write_bytes(raw)


@pytest.mark.parametrize("how", ["truncated", "flipped"])
def test_damaged_checkpoint_is_named_and_skipped(how, tiny_run, capsys):
    settings = {"checkpoint.every": 1, "checkpoint.keep": 5, "model.width": 64, "model.mixer": "none"}
    _, workdir = tiny_run("vision/digits_vit", **settings)
    before = arrays(workdir, 3)
    _damage(workdir, how)
    result, _ = tiny_run("vision/digits_vit", **settings)
    said = capsys.readouterr().err
    assert "step 3" in said and "damaged and skipped" in said and "resuming" in said
    assert result["step"] == 3 and same(before, arrays(workdir, 3)) == []


def test_flipped_bit_names_the_leaf(tmp_path):
    """Orbax compresses, so a flipped bit on the disk mostly fails to decode; a changed value must fail as well."""
    store = Checkpoints(tmp_path)
    store.save(1, {"params": {"w": jax.numpy.arange(4.0)}}, {}, {})
    store.close()
    record = tmp_path / "1" / "record" / "metadata"
    values = json.loads(record.read_text())
    values["crc"]["params.w"][""] ^= 1
    record.write_text(json.dumps(values))
    said = []
    assert store.newest({"params": {"w": jax.ShapeDtypeStruct((4,), np.float32)}}, {}, said.append) is None
    assert "params.w" in said[0]


def test_nan_stops_with_the_step(tiny_run):
    with pytest.raises(UserError, match=r"the loss is (nan|inf) at step \d"):
        tiny_run(
            "vision/mnist1d_cnn",
            **{"optim.learning_rate": 1e30, "optim.name": "sgd", "train.steps": 20, "optim.clip_norm": 0.0},
        )


def test_times_of_a_killed_session_are_kept(tiny_run):
    """What a kill leaves: a checkpoint of step 2 with its times, and lines of steps after it."""
    from lissom.eval import _training_times, read_metrics

    settings = {"train.steps": 4, "checkpoint.every": 2, "checkpoint.keep": 5, "log.every": 1}
    _, run = tiny_run("vision/mnist1d_cnn", **settings)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    lost = [line for line in lines if line["step"] <= 3 and line["kind"] != "test"]
    first = next(line for line in lost if line["kind"] == "times")
    assert first["step"] == 2
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lost))
    shutil.rmtree(run / "checkpoints" / "4")
    tiny_run("vision/mnist1d_cnn", **settings)
    again = read_metrics(run)
    assert [line["step"] for line in again if line["kind"] == "train"] == [1, 2, 3, 4]
    second = [line for line in again if line["kind"] == "times" and line["start"] == 2][-1]
    whole = _training_times(run)
    assert whole["train_seconds"] == first["train_seconds"] + second["train_seconds"]
    assert whole["train_flops"] == 2 * second["train_flops"] > 0
    # The state is an argument that the new one is written over.
    assert whole["train_peak_memory"] == second["train_peak_memory"] > whole["train_temporaries"] > 0


def test_a_signal_behind_the_last_step_ends_the_process(tmp_path, monkeypatch):
    """Else a script with many runs would go on with the next one. The run itself is finished."""
    from lissom.eval import finished, read_metrics
    from lissom.train import train
    from lissom.training.config import load_recipe, overridden

    evaluate = Session.evaluate

    def signalled(*args):
        signal.raise_signal(signal.SIGTERM)
        return evaluate(*args)

    monkeypatch.setattr(Session, "evaluate", signalled)
    config = overridden(load_recipe("configs/vision/mnist1d_cnn.py:tiny"), [("mesh.data", 1)])
    with pytest.raises(SystemExit) as end:
        train(config, tmp_path / "run")
    assert end.value.code == 0 and finished(tmp_path / "run")
    assert any(entry["kind"] == "test" for entry in read_metrics(tmp_path / "run"))


@pytest.mark.parametrize("stages", [(2, 6), (6, 2)])
def test_profile_of_stages(stages, tmp_path):
    """The trace begins with the sixth step, whichever stage that is of, and ends with its stage at the latest."""
    from lissom.train import train
    from lissom.training.config import load_recipe, overridden

    config = overridden(load_recipe("configs/vision/mnist1d_cnn.py:tiny"), [("mesh.data", 1), ("train.steps", 8)])
    entries = tuple({"name": f"s{i}", "duration": steps} for i, steps in enumerate(stages))
    train(overridden(config, [("stages", entries)]), tmp_path / "run", profile=10)
    assert list((tmp_path / "run" / "profile").rglob("*.xplane.pb"))


def test_data_that_changed_since(tmp_path):
    from lissom.train import train
    from lissom.training.config import load_recipe, overridden

    folder = tmp_path / "rows"
    folder.mkdir()

    def write(count):
        rng = np.random.default_rng(0)
        for split in ("train", "test"):
            inputs, labels = rng.random((count, 8, 8, 1), np.float32), rng.integers(0, 10, count)
            np.savez(folder / f"{split}.npz", inputs=inputs, labels=labels)

    def run(name="run", settings=()):
        config = load_recipe("configs/vision/digits_vit.py:tiny")
        train(overridden(config, [("data.name", str(folder)), ("mesh.data", 1), *settings]), tmp_path / name)

    write(64)
    run()
    write(32)
    with pytest.raises(UserError, match="examples 64, which by now is 32"):
        run()
    # Also where the stages would not fit: what has changed is said, not what comes of it.
    epochs = [("train.epochs", 2), ("stages", ({"name": "all", "duration": 8},))]
    write(64)
    run("epochs", epochs)
    write(32)
    with pytest.raises(UserError, match="examples 64, which by now is 32"):
        run("epochs", epochs)


def test_frozen_is_saved_once(tmp_path):
    store = Checkpoints(tmp_path / "checkpoints", keep=3)
    state = {"params": {"w": jax.numpy.arange(4.0)}, "frozen": {"t": jax.numpy.arange(1000.0)}}
    for step in range(1, 4):
        store.save(step, {**state, "params": {"w": state["params"]["w"] + step}}, {}, {})
    store.wait()
    assert len(list((tmp_path / "frozen").iterdir())) == 1
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)
    found = store.load(2, shapes, {})
    np.testing.assert_array_equal(found["frozen"]["t"], state["frozen"]["t"])
    np.testing.assert_array_equal(found["params"]["w"], state["params"]["w"] + 2)
    store.save(4, {**state, "frozen": {"t": state["frozen"]["t"] + 1}}, {}, {})
    store.close()
    assert len(list((tmp_path / "frozen").iterdir())) == 2
    assert store.load(4, shapes, {})["frozen"]["t"][0] == 1
    shutil.rmtree(tmp_path / "frozen" / store.record(4)["frozen"]["directory"])
    said = []
    assert store.newest(shapes, {}, said.append)[0] == 3
    assert "step 4" in said[0] and "frozen" in said[0]


def _command(workdir, *extra):
    # One device: eight virtual ones would only slow the process down.
    env = {**os.environ, "XLA_FLAGS": "--xla_backend_optimization_level=0"}
    return subprocess.Popen(
        [
            sys.executable,
            str(ROOT / "train.py"),
            "--config=configs/vision/digits_vit.py:tiny",
            f"--workdir={workdir}",
            "--config.model.mixer=none",
            *extra,
        ],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        env=env,
    )


def wait_for(condition, process):
    for _ in range(600):
        if condition():
            return
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.1)
    raise AssertionError("the run did not get there in a minute")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda n: n.name)
def test_a_signal_saves_and_exits_0(number, tmp_path):
    process = _command(tmp_path / "run", "--config.train.steps=1000000", "--config.log.every=100")
    wait_for(
        lambda: (tmp_path / "run" / "metrics.jsonl").exists() and (tmp_path / "run" / "metrics.jsonl").stat().st_size,
        process,
    )
    process.send_signal(number)
    assert process.wait(60) == 0
    assert f"stopped by {number.name}" in process.stderr.read()
    assert Checkpoints(tmp_path / "run" / "checkpoints").steps()[0] > 0


def test_kill_9_leaves_a_loadable_run(tmp_path, capsys):
    from lissom.training.runs import load_network

    process = _command(tmp_path / "run", "--config.train.steps=1000000", "--config.checkpoint.every=1")
    folder = tmp_path / "run" / "checkpoints"
    wait_for(lambda: folder.exists() and len(Checkpoints(folder).steps()) > 1, process)
    # Wait for the middle of a save: a directory that is not yet renamed to its step.
    wait_for(lambda: any(not p.name.isdigit() for p in folder.iterdir()), process)
    process.kill()
    process.wait()
    # It says which step it has read, so it has read one.
    with pytest.raises(UserError, match=r"not finished: its newest whole checkpoint is of step [1-9]"):
        load_network(tmp_path / "run")


def test_a_record_that_a_kill_cut_off(tmp_path):
    from lissom.training.logs import Logs

    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "kind": "train"}\n{"step": 2, "ki')
    logs = Logs(tmp_path, 3, 1)
    logs.write(2, {"loss": 0.5})
    logs.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
