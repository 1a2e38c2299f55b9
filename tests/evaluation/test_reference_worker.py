"""The reference worker: its protocol, under this interpreter without torch, and every way in which it can fail."""

import os
import pathlib
import signal
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from lissom.evaluation.benchmarks import attention, harness
from lissom.evaluation.benchmarks.worker import VARIABLE, ReferenceWorker, WorkerError, described, loaded
from lissom.ops.testing import normal
from scripts import reference_worker

SCRIPT = pathlib.Path(__file__).parent.parent.parent / "scripts" / "reference_worker.py"


@pytest.fixture
def worker():
    with ReferenceWorker(sys.executable, SCRIPT, threads=1, timeout=60) as found:
        yield found
    assert not found.alive and not found.folder.exists()


def fake(tmp_path, body: str, timeout: float = 60) -> ReferenceWorker:
    """A worker that greets, and answers the next line as `body` says."""
    script = tmp_path / "fake.py"
    script.write_text(
        "import sys, time\nsys.stdin.readline()\n"
        'print(\'{"ok": true, "versions": {}, "devices": ["cpu"]}\', flush=True)\nsys.stdin.readline()\n' + body
    )
    return ReferenceWorker(sys.executable, script, threads=1, timeout=timeout)


def test_runs_and_gives_results(worker):
    sets = [tuple(normal(seed, (5, 4), (4, 3))) for seed in (0, 1)]
    label = worker.prepare("numpy_matmul", {}, sets)
    assert 0 < worker.run(label, 7) < 10
    for number in (0, 1, 2):  # rotated: set 0 again at call 2
        (product,) = worker.outputs(label, number)
        a, b = sets[number % 2]
        np.testing.assert_allclose(product, a @ b, rtol=1e-6)
    assert not list(worker.folder.glob("*.npy"))
    worker.drop(label)
    with pytest.raises(WorkerError, match="can't run: KeyError"):
        worker.run(label, 0)


def test_bfloat16_travels_as_its_bits(tmp_path):
    (values,) = normal(0, (3, 4), dtype=jnp.bfloat16)
    entry = described(values, tmp_path / "x.npy")
    assert entry["dtype"] == "bfloat16" and reference_worker.load(entry).dtype == np.uint16
    np.testing.assert_array_equal(loaded(entry), values)


def test_an_unknown_case_is_one_sentence(worker):
    with pytest.raises(WorkerError, match="no case 'nosuch'; the cases are numpy_matmul, torch_matmul"):
        worker.prepare("nosuch", {}, [()])
    assert worker.alive


def test_versions_are_told(worker):
    assert worker.versions["numpy"] == np.__version__
    if "torch" not in worker.versions:
        assert harness.rates_of_torch(worker, tiny=True) == {}


def test_a_worker_that_dies(worker):
    label = worker.prepare("numpy_matmul", {}, [tuple(normal(0, (2, 2), (2, 2)))])
    os.kill(worker._process.pid, signal.SIGKILL)
    for _ in range(2):  # at once, and when it is asked again
        with pytest.raises(WorkerError, match="ended with status -9"):
            worker.run(label, 0)


def test_a_worker_that_fails_says_its_last_line(tmp_path):
    with fake(tmp_path, "raise SystemExit('no memory left')") as worker, pytest.raises(WorkerError) as error:
        worker.run("case0", 0)
    assert "ended with status 1: no memory left" in str(error.value)


def test_a_worker_that_hangs_is_ended(tmp_path):
    with fake(tmp_path, "time.sleep(600)", timeout=1) as worker:
        with pytest.raises(WorkerError, match="did not answer 'run' within 1 s"):
            worker.run("case0", 0)
        assert not worker.alive


def test_a_worker_that_babbles(tmp_path):
    with fake(tmp_path, "print('hello'); time.sleep(1)") as worker, pytest.raises(WorkerError, match="is it a Python"):
        worker.run("case0", 0)


def test_no_such_interpreter():
    with pytest.raises(WorkerError, match="LISSOM_REFERENCE_PYTHON=/no/python can't be run"):
        ReferenceWorker("/no/python", SCRIPT, threads=1)


@pytest.mark.skipif(not os.environ.get(VARIABLE), reason=f"{VARIABLE} names no interpreter with torch")
def test_torch_solves_the_same_problems():
    """Every layout, mask and gradient of the entry's tiny problems passes the gate that ours must pass."""
    problems = [p for p in attention.problems("cpu", tiny=True) if "torch_sdpa" in p.references]
    with ReferenceWorker(os.environ[VARIABLE], SCRIPT, threads=1) as worker:
        done = [r for family in harness.run(problems, worker=worker, repeats=2) for r in family]
        assert {r.problem.name for r in done if r.name == "torch_sdpa"} == {p.name for p in problems}
        assert harness.rates_of_torch(worker, tiny=True).keys() == {"float32", "bfloat16", "int8", "bandwidth"}
