"""The client of scripts/reference_worker.py: references that live in another interpreter, one call at a time."""

import itertools
import json
import os
import pathlib
import selectors
import shutil
import subprocess
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

VARIABLE = "LISSOM_REFERENCE_PYTHON"

RECYCLE = {"MALLOC_MMAP_THRESHOLD_": str(32 << 20), "MALLOC_TRIM_THRESHOLD_": str(1 << 40)}
"""Has glibc keep freed pages (blocks of up to 32 MB): the worker too writes results over older results."""


class WorkerError(RuntimeError):
    """The worker refused, died or did not answer; the message is a sentence."""


class ReferenceWorker:
    """Starts `script` under `python`, with `threads` threads, and asks it. No answer within `timeout` seconds ends
    it."""

    def __init__(self, python: str, script: pathlib.Path, *, threads: int, timeout: float = 300.0):
        self.timeout = timeout
        self.folder = pathlib.Path(tempfile.mkdtemp(prefix="lissom_reference_"))
        self._errors = open(self.folder / "stderr", "w+", encoding="utf-8")  # noqa: SIM115 (closed in `close`)
        self._numbers = itertools.count()
        self._rest = b""
        environment = {**os.environ, **RECYCLE, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
        try:
            self._process = subprocess.Popen(
                [python, "-u", str(script)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                env=environment,
                bufsize=0,
            )
        except OSError as error:
            self._errors.close()
            shutil.rmtree(self.folder, ignore_errors=True)
            raise WorkerError(f"{VARIABLE}={python} can't be run: {error.strerror}") from error
        try:
            facts = self.ask("hello", threads=threads)
        except WorkerError:
            self.close()
            raise
        self.versions: dict[str, str] = facts["versions"]
        self.devices: list[str] = facts["devices"]

    @property
    def alive(self) -> bool:
        """Whether the process still runs."""
        return self._process.poll() is None

    def ask(self, do: str, **request: Any) -> dict[str, Any]:
        """The answer to a request; WorkerError says why there is none."""
        try:
            self._process.stdin.write((json.dumps({"do": do, **request}) + "\n").encode())
        except (BrokenPipeError, ValueError):
            raise WorkerError(self._death()) from None
        line = self._line(do)
        try:
            answer = json.loads(line)
            fine = answer.pop("ok")
        except (ValueError, KeyError, AttributeError):
            raise WorkerError(f"the reference worker answered {do!r} with {line[:80]!r}: is it a Python?") from None
        if not fine:
            raise WorkerError(f"the reference worker can't {do}: {answer['error']}")
        return answer

    def prepare(self, case: str, options: dict[str, Any], inputs: Sequence[Sequence[np.ndarray]]) -> str:
        """Gives the worker the inputs of a case; returns the label by which it is asked to run. An array among the
        options is sent along."""
        label = f"case{next(self._numbers)}"
        files = (self.folder / f"{label}_in{number}.npy" for number in itertools.count())
        describe = lambda value: described(value, next(files)) if isinstance(value, np.ndarray) else value
        sent = {name: describe(value) for name, value in options.items()}
        sets = [[describe(array) for array in arrays] for arrays in inputs]
        try:
            self.ask("prepare", label=label, case=case, options=sent, inputs=sets)
        finally:
            for file in self.folder.glob(f"{label}_in*.npy"):
                file.unlink()
        return label

    def run(self, label: str, number: int, calls: int = 1) -> float:
        """Seconds of a call, on set `number` of the inputs."""
        return self.ask("run", label=label, number=number, calls=calls)["seconds"]

    def outputs(self, label: str, number: int = 0) -> list[np.ndarray]:
        """What it computed."""
        answer = self.ask("outputs", label=label, number=number, folder=str(self.folder))
        results = [loaded(entry) for entry in answer["outputs"]]
        for entry in answer["outputs"]:
            os.unlink(entry["file"])
        return results

    def drop(self, label: str) -> None:
        """Frees what `prepare` gave."""
        self.ask("drop", label=label)

    def close(self) -> None:
        """Ends the process, and removes its folder."""
        self._process.stdin.close()
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._errors.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def __enter__(self) -> "ReferenceWorker":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _line(self, do: str) -> bytes:
        deadline = time.monotonic() + self.timeout
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            while b"\n" not in self._rest:
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    self._process.kill()
                    self._process.wait()
                    raise WorkerError(f"the reference worker did not answer {do!r} within {self.timeout:g} s")
                more = os.read(self._process.stdout.fileno(), 1 << 16)
                if not more:
                    raise WorkerError(self._death())
                self._rest += more
        line, _, self._rest = self._rest.partition(b"\n")
        return line

    def _death(self) -> str:
        status = self._process.wait()
        self._errors.flush()
        said = (self.folder / "stderr").read_text(errors="replace").strip().splitlines()
        return f"the reference worker ended with status {status}" + (f": {said[-1]}" if said else "")


def described(array: np.ndarray, file: pathlib.Path) -> dict[str, str]:
    """Writes an array, and describes it as the protocol does."""
    # numpy's files know no bfloat16.
    np.save(file, array.view(np.uint16) if array.dtype == jnp.bfloat16 else array)
    return {"file": str(file), "dtype": str(array.dtype)}


def loaded(entry: dict[str, str]) -> np.ndarray:
    """The array of a description."""
    array = np.load(entry["file"])
    return array.view(jnp.bfloat16) if entry["dtype"] == "bfloat16" else array
