"""Two processes, one run: they train what one process trains, write one directory, agree to stop, and resume."""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys

import numpy as np

from lissom.training.checkpoints import Checkpoints
from tests.training.test_loop import ROOT, arrays, wait_for

RECIPE = "--config=configs/language/recall_lm.py:tiny"


def start(workdir, *flags, processes=2):
    """Starts the processes of one run, each with two virtual devices."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    started = []
    for process in range(processes):
        join = {"coordinator_address": f"localhost:{port}", "num_processes": processes, "process_id": process}
        flag = "--xla_force_host_platform_device_count=2 --xla_backend_optimization_level=0"
        env = {**os.environ, "XLA_FLAGS": flag, "LISSOM_DISTRIBUTED": json.dumps(join)}
        command = [sys.executable, str(ROOT / "train.py"), RECIPE, f"--workdir={workdir}", *flags]
        started.append(subprocess.Popen(command, cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True))
    return started


def finish(started):
    try:
        said = [process.communicate(timeout=150)[1] for process in started]
    finally:  # one that waits for another which is gone
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0] * len(started), said
    return said


def test_two_processes_are_one(tmp_path, tiny_run):
    flags = (
        "--config.mesh.data=1",
        "--config.mesh.fsdp=4",
        "--config.train.steps=4",
        "--config.checkpoint.every=2",
        "--config.checkpoint.keep=5",
    )
    two = tmp_path / "two"
    said = finish(start(two, *flags))
    assert "in " + str(two) in said[0] and "parameters" not in said[1]
    settings = {"train.steps": 4, "checkpoint.every": 2, "checkpoint.keep": 5}
    _, one = tiny_run("language/recall_lm", "one", **settings, **{"mesh.fsdp": 4})
    expected = arrays(one, 4)
    for name, value in arrays(two, 4).items():
        np.testing.assert_allclose(value, expected[name], atol=2e-4, err_msg=name)
    # The checksums of both processes stand there, each of its own shards; a wrong one of the second is found.
    theirs = two / "checksums" / "4" / "1.json"
    crc = json.loads(theirs.read_text())
    split = next(name for name, shards in crc.items() if len(shards) > 0 and "" not in shards)
    index = next(iter(crc[split]))
    assert index not in json.loads((theirs.parent / "0.json").read_text())[split]
    crc[split][index] ^= 1
    theirs.write_text(json.dumps(crc))
    said = finish(start(two, *flags))
    assert sorted(path.name for path in (two / "checksums").iterdir()) == ["2", "4"]
    assert f"the checksum of {split}" in said[1] and "step 2" in said[0]
    np.testing.assert_allclose(arrays(two, 4)[split], expected[split], atol=2e-4)
    # Arrays that can't be read: no process waits inside of orbax for another that gave up.
    for file in (two / "checkpoints" / "4" / "state" / "d").iterdir():
        raw = file.read_bytes()
        file.write_bytes(raw[: len(raw) // 2] + bytes(len(raw) - len(raw) // 2))
    said = finish(start(two, *flags))
    assert any("step 4" in line and "damaged and skipped" in line for line in "".join(said).splitlines())
    np.testing.assert_allclose(arrays(two, 4)[split], expected[split], atol=2e-4)


def test_sigterm_to_one_stops_both(tmp_path):
    run = tmp_path / "run"
    started = start(run, "--config.train.steps=1000000", "--config.log.every=5")
    metrics = run / "metrics.jsonl"
    wait_for(lambda: metrics.exists() and metrics.stat().st_size, started[0])
    started[1].send_signal(signal.SIGTERM)
    said = finish(started)
    assert "stopped by a signal to another process" in said[0]
    assert Checkpoints(pathlib.Path(run) / "checkpoints").steps()[0] > 0


def test_a_mesh_that_the_processes_do_not_divide(tmp_path):
    started = start(tmp_path / "run", "--config.mesh.data=1", "--config.mesh.tensor=4")
    for process in started:
        said = process.communicate(timeout=150)[1]
        assert process.returncode == 2 and "multiple of the 2 processes" in said
    assert not (tmp_path / "run").exists()
