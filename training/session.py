"""The loop: a run from the state it stands at to its end, or to where it is stopped."""

import contextlib
import math
import pathlib
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax

from lissom import data
from lissom.training import processes, sharding
from lissom.training.checkpoints import Checkpoints
from lissom.training.errors import UserError
from lissom.training.logs import Logs
from lissom.training.setup import Setup
from lissom.training.step import make_evaluation, mean_over

PROFILED_FROM = 5  # steps of a session before those that are profiled: the first ones are slower


@dataclass
class Costs:
    """What a session, which began at step `start`, has cost: seconds, examples, operations (nan where they can't be
    counted: unknown of one stage is unknown of all), and bytes of the largest of its compiled steps."""

    start: int = 0
    compiling: float = 0.0
    training: float = 0.0  # without the stage that runs
    began: float | None = None  # the stage that runs, less its pauses
    examples: int = 0
    flops: float = 0.0
    memory: dict[str, int] = field(default_factory=dict)

    @contextlib.contextmanager
    def compilation(self) -> Iterator[None]:
        """What is done inside is compiling."""
        began = time.monotonic()
        yield
        self.compiling += time.monotonic() - began

    def compiled(self, memory: dict[str, int]) -> None:
        """A step of so many bytes will run."""
        for name, size in memory.items():
            self.memory[name] = max(size, self.memory.get(name, 0))

    def stage_ends(self) -> None:
        self.training, self.began = self.training + time.monotonic() - self.began, None

    def shown(self) -> dict[str, float]:
        """As the metrics and the result of a run have it."""
        seconds = self.training + (time.monotonic() - self.began if self.began else 0.0)
        return {
            "start": self.start,
            "compile_seconds": self.compiling,
            "train_seconds": seconds,
            "examples_per_second": self.examples / seconds if seconds else math.nan,
            **self.memory,
            **({} if math.isnan(self.flops) else {"train_flops": self.flops}),
        }


class Profile:
    """A trace of `steps` steps of a session for TensorBoard, none of 0; it ends with the stage that it began in."""

    def __init__(self, directory: pathlib.Path, steps: int, start: int, total: int):
        self._directory, self._steps = directory, steps
        self._first = start + min(PROFILED_FROM, total - start - 1)
        self._last = self._first + steps
        self._running = False

    def before(self, step: int) -> None:
        """Called before step number `step`, of which the first is 0."""
        if self._steps and step == self._first:
            jax.profiler.start_trace(str(self._directory))
            self._running = True

    def after(self, steps: int, stop: int, state: Any) -> None:
        """Called when `steps` steps are made, of the `stop` that the stage ends with."""
        if self._running and steps == min(self._last, stop):
            jax.block_until_ready(state)
            self.close()

    def close(self) -> None:
        """Ends a trace that is still running."""
        if self._running:
            jax.profiler.stop_trace()
        self._running = False


class Session:
    """Trains the stages of a run, one `stage` after the other, inside `stopping`.

    programs: of each stage the traced step, and where its batches go; `key` is what all of them are given.
    measure: (traced step, compiled step) -> (operations of a step or None, bytes by name).
    """

    def __init__(
        self,
        setup: Setup,
        programs: Sequence[tuple[Any, Any]],
        key: jax.Array,
        *,
        workdir: pathlib.Path,
        logs: Logs,
        store: Checkpoints,
        costs: Costs,
        measure: Callable[[Any, Any], tuple[float | None, dict[str, int]]],
        profile: int = 0,
    ):
        self.setup, self.costs = setup, costs
        self._programs, self._key, self._measure = programs, key, measure
        self._workdir, self._logs, self._store = workdir, logs, store
        self._profile = Profile(workdir / "profile", profile, costs.start, setup.steps)
        self.signals: list[str] = []
        self._evaluations: dict[int, Callable] = {}
        dataset = setup.dataset
        self._per_example = dataset.train[0]["inputs"].size if dataset.kind == "tokens" else 1
        # Programs in flight on more virtual devices than there are cores starve each other's collectives until XLA
        # aborts.
        self._virtual = setup.mesh.size > 1 and jax.devices()[0].platform == "cpu"
        self.stopped = ""  # by what, where something has

    @contextlib.contextmanager
    def stopping(self) -> Iterator[None]:
        """Inside, SIGTERM and the first Ctrl-C end the stage that runs behind its step (of several processes behind the
        next one that is logged), and it is saved. What came is in `signals`. A trace that still runs ends here."""

        def stop(number, _):
            self.signals.append(signal.Signals(number).name)
            signal.signal(signal.SIGINT, signal.default_int_handler)  # the second Ctrl-C does not wait

        previous = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
            self._profile.close()

    def evaluate(self, index: int, state: dict[str, Any]) -> dict[str, float]:
        """The means that the objective of a stage names, over the test set."""
        setup = self.setup
        if index not in self._evaluations:
            everywhere = sharding.replicated(setup.mesh)
            self._evaluations[index] = jax.jit(make_evaluation(setup.assemblies[index]), out_shardings=everywhere)
        evaluation, ways = self._evaluations[index], sharding.batch_ways(setup.mesh)
        size = -(-setup.config.evaluation.batch_size // ways) * ways
        ours = {"process": jax.process_index(), "processes": jax.process_count()}

        def sums():
            for batch in data.eval_batches(setup.dataset, batch_size=size, **ours):
                batch = sharding.put_batch(batch, sharding.batch_shardings(setup.mesh, batch))
                yield evaluation(state["params"], state["stats"], state["frozen"], batch, self._key)

        with sharding.on_mesh(setup.mesh):
            return mean_over(sums())

    def stage(self, index: int, state: dict[str, Any]) -> dict[str, Any]:
        """The state at the end of a stage, or where it was `stopped`. The given one is used up."""
        setup, stage, assembly = self.setup, self.setup.plan[index], self.setup.assemblies[index]
        step = int(state["step"])
        if step >= stage.stop:
            return state
        compiled, flops, where = self._compiled(index)
        frozen = state.pop("frozen")
        every, batch_size = setup.config.log.every, stage.config.data.batch_size
        batches, pending = setup.batches(stage, step), []
        self.costs.began = mark = time.monotonic()
        mark_step = step
        while step < stage.stop and not self.stopped:
            self._profile.before(step)
            batch = sharding.put_batch(next(batches), where)
            with jax.transfer_guard("disallow"):
                state, metrics = compiled(state, frozen, batch, self._key)
            step += 1
            self.costs.flops += flops
            self.costs.examples += batch_size
            if self._virtual:
                jax.block_until_ready(metrics)
            pending.append((step, metrics))
            self._profile.after(step, stage.stop, state)
            self.stopped = self._asked_to_stop(step)
            at_end = step == stage.stop or self.stopped
            saving = at_end or _due(step, setup.config.checkpoint.every)
            if step % every == 0 or saving:
                last, pending = self._checked(pending), []
                now = time.monotonic()
                rate = (step - mark_step) / max(now - mark, 1e-9)
                mark, mark_step = now, step
                self._logs.write(step, last)
                per_second = rate * batch_size * self._per_example
                self._logs.progress(step, float(last["loss"]), per_second, (setup.steps - step) / rate)
            # Behind a task of a stream by class forgetting is told.
            learned = setup.classes is not None and step in setup.classes.ends
            if (learned or _due(step, setup.config.evaluation.every)) and step < setup.steps:
                paused = time.monotonic()
                self._logs.write(step, self.evaluate(index, {**state, "frozen": frozen}), "test")
                pause = time.monotonic() - paused
                self.costs.began += pause
                mark += pause
            if saving:
                # A run that is killed after this has its cost recorded.
                self._logs.write(step, self.costs.shown(), "times")
                self._store.save(step, {**state, "frozen": frozen}, assembly.stacks, {"stage": stage.name})
        self.costs.stage_ends()
        return {**state, "frozen": frozen}

    def _compiled(self, index: int) -> tuple[Callable, float, Any]:
        """(the compiled step of a stage, its operations, where its batches go)."""
        traced, where = self._programs[index]
        with self.costs.compilation(), sharding.on_mesh(self.setup.mesh):
            compiled = traced.lower().compile()
        flops, memory = self._measure(traced, compiled)
        self.costs.compiled(memory)
        return compiled, math.nan if flops is None else flops, where

    def _asked_to_stop(self, step: int) -> str:
        """By what, or nothing. Looked at once a step, so that what stops the loop is also what saves; several processes
        agree on it where they log."""
        mine = self.signals[0] if self.signals else ""
        if jax.process_count() == 1:
            return mine
        if step % self.setup.config.log.every or not processes.any_of(bool(mine)):
            return ""
        return mine or "a signal to another process"

    def _checked(self, pending: Sequence[tuple[int, dict]]) -> dict[str, Any]:
        """The metrics of the last step; a UserError where one of them has no finite loss and gradient."""
        for step, metrics in [(step, jax.device_get(metrics)) for step, metrics in pending]:
            if not (math.isfinite(metrics["loss"]) and math.isfinite(metrics["gradient_norm"])):
                whole = self._store.steps()
                last = f"the last good checkpoint is step {whole[0]}" if whole else "there is no checkpoint"
                raise UserError(
                    f"the loss is {float(metrics['loss'])} at step {step}, the gradient's norm "
                    f"{float(metrics['gradient_norm'])}; {last} in {self._workdir}: lower config.optim.learning_rate "
                    "or clip_norm, or look for values in the data that are not finite"
                )
        return metrics


def _due(step: int, every: int) -> bool:
    """Whether a step is one of every so many, of which 0 is none."""
    return bool(every) and step % every == 0
