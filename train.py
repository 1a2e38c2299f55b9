"""Trains one recipe: uv run train.py --config=configs/vision/digits_vit.py [--config.train.steps=100 ...]

The run lies in --workdir; the same command goes on where it was stopped.
"""

import pathlib
import sys
from typing import Any

from absl import flags

from lissom.training import flags as command_line
from lissom.training.config import check, default_workdir
from lissom.training.errors import UserError, one_sentence


def train(config, workdir: str | pathlib.Path, *, overwrite: bool = False, profile: int = 0) -> dict[str, Any]:
    """Trains `config` in `workdir`, resuming what stands there; returns the last evaluation and the times.

    Keys: step, start (where this session began), traces (of the training step, by stage), compile_seconds,
    train_seconds, examples_per_second, train_flops (where all of it can be counted), train_peak_memory and
    train_temporaries (bytes of the compiled step on one device, where the backend tells) and, where the run was
    finished, the means that the objective's `evaluate` names.
    Raises UserError for what the user can mend.
    """
    check(config)
    # jax is imported behind the check: a mistake is answered in 0.3 seconds instead of 6.
    import dataclasses
    import json
    import math
    import signal
    import time

    import jax

    from lissom import data
    from lissom.compression.artefacts import check_transforms, structure_of
    from lissom.compression.starting import starting_network, transformed_network
    from lissom.evaluation import costs
    from lissom.evaluation.memory import step_memory
    from lissom.evaluation.rows import provenance
    from lissom.models.variables import flatten
    from lissom.training import processes, runs, sharding, stages
    from lissom.training.building import class_stream, epoch_examples, fresh_state, further_tests, load_dataset
    from lissom.training.checkpoints import Checkpoints
    from lissom.training.config import total_steps
    from lissom.training.logs import Logs
    from lissom.training.step import make_evaluation, mean_over, trace_step

    # ----------------------------------------------------------------- where
    processes.join()
    process, count = jax.process_index(), jax.process_count()
    workdir = pathlib.Path(workdir)
    resuming = runs.stands(workdir, config, overwrite)
    mesh = sharding.make_mesh(config.mesh)

    # ------------------------------------------------------------------ data
    dataset = load_dataset(config)
    further_tests(config, dataset)  # they are for the end, what is wrong with them is for now
    classes = class_stream(config, dataset)
    epoch = epoch_examples(config, dataset, classes)
    total = total_steps(config, epoch)
    facts = {**dataset.info, "kind": dataset.kind, "examples": len(dataset.train), "steps": total}

    def stream(stage):
        """What picks the batches of a stage."""
        batches = {"batch_size": stage.config.data.batch_size, "augment": stage.config.data.augment, "order": classes}
        return {**batches, "seed": config.seed, "process": process, "processes": count}

    if resuming and (workdir / "facts.json").is_file():
        runs.check_facts(workdir, facts, (*runs.SHAPES, "examples", "steps", "sha256"))

    # --------------------------------------------------- shapes, programs, claim
    # Everything that can be wrong with any stage is found before the directory is touched.
    plan, assemblies = zip(*stages.assembled(config, facts, epoch, mesh, structure_of), strict=True)
    check_transforms(config, facts)
    init_key, _ = jax.random.split(jax.random.key(config.seed))
    # Made where it lies: of several processes none could put it on the others' devices.
    everywhere = sharding.replicated(mesh)
    loop_key = jax.jit(lambda: jax.random.split(jax.random.key(config.seed))[1], out_shardings=everywhere)()

    traces, spent, memory = {}, {"compile": 0.0, "train": 0.0, "flops": 0.0}, {}

    def program(stage, assembly):
        """The traced step of a stage, and where its batches go."""

        def counted():
            traces[stage.name] = traces.get(stage.name, 0) + 1

        began = time.monotonic()
        batch = data.train_batch(dataset, step=stage.start, **stream(stage))
        where = sharding.batch_shardings(mesh, batch)
        shapes = sharding.global_shapes(batch, where, count)
        step = trace_step(assembly, stage.config.optim.accumulate, shapes, loop_key, counted)
        spent["compile"] += time.monotonic() - began
        return step, where

    programs = [program(stage, assembly) for stage, assembly in zip(plan, assemblies, strict=True)]
    store = Checkpoints(workdir / "checkpoints", keep=config.checkpoint.keep)
    starting = None
    if config.init_from and not (resuming and store.steps()):
        first = assemblies[0]
        batches = data.train_batches(dataset, start_step=0, **stream(plan[0]))
        network = starting_network(plan[0].config, batches)
        starting = runs.starting_values(
            first.shapes, first.stacks, first.objective.path, network, ", ".join(config.init_from)
        )
        del network
    processes.together("everything is known")
    if process == 0 and not resuming:
        runs.claim(workdir, config, overwrite)
    if process == 0:
        (workdir / "facts.json").write_text(json.dumps(facts, indent=1, default=str))
        if not (resuming and (workdir / "provenance.json").exists()):
            (workdir / "provenance.json").write_text(json.dumps(dataclasses.asdict(provenance()), indent=1))
    processes.together("claimed")

    # ----------------------------------------------------------------- state
    state, current = runs.resumed(store, plan, assemblies) if resuming else (None, 0)
    if state is None:
        state = fresh_state(assemblies[0], init_key)
        if starting is not None:
            state = runs.started(state, assemblies[0].stacks, starting)
            del starting
    start = int(state["step"])
    parameters = sum(leaf.size for leaf in flatten(state["params"]).values())

    # ------------------------------------------------------------------ loop
    unit = "tokens" if dataset.kind == "tokens" else "examples"
    logs = Logs(workdir, total, start, unit, writing=process == 0)
    logs.say(
        f"{config.recipe or config.model.name}: {parameters:,} parameters, {total} steps of "
        f"{config.data.batch_size} on {mesh.size} {jax.devices()[0].device_kind} device(s), in {workdir}"
    )
    stopped, halted, examples = [], False, 0

    def stop(number, _):
        stopped.append(signal.Signals(number).name)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # the second Ctrl-C does not wait

    previous = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    # Programs in flight on more virtual devices than there are cores starve each other's collectives until XLA aborts.
    virtual = mesh.size > 1 and jax.devices()[0].platform == "cpu"
    outcome: dict[str, float] = {}
    per_example = dataset.train[0]["inputs"].size if dataset.kind == "tokens" else 1

    began, compiled_evaluations = None, {}

    def times():
        """Of this session, which began at step `start`."""
        running = time.monotonic() - began if began else 0.0
        seconds = spent["train"] + running
        return {
            "start": start,
            "compile_seconds": spent["compile"],
            "train_seconds": seconds,
            "examples_per_second": examples / seconds if seconds else math.nan,
            **memory,
            **({} if math.isnan(spent["flops"]) else {"train_flops": spent["flops"]}),
        }

    def evaluate(index, state):
        if index not in compiled_evaluations:
            compiled_evaluations[index] = jax.jit(make_evaluation(assemblies[index]), out_shardings=everywhere)
        ways = sharding.batch_ways(mesh)
        size = -(-config.evaluation.batch_size // ways) * ways
        batches = data.eval_batches(dataset, batch_size=size, process=process, processes=count)

        def sums():
            for batch in batches:
                batch = sharding.put_batch(batch, sharding.batch_shardings(mesh, batch))
                yield compiled_evaluations[index](state["params"], state["stats"], state["frozen"], batch, loop_key)

        with sharding.on_mesh(mesh):
            return mean_over(sums())

    try:
        for index in range(current, len(plan)):
            stage, assembly = plan[index], assemblies[index]
            if index > current:
                fresh = fresh_state(assembly, jax.random.fold_in(init_key, index))
                before, batches = assemblies[index - 1], data.train_batches(dataset, start_step=0, **stream(stage))
                with sharding.on_mesh(mesh):
                    network = transformed_network(stage, before, state, batches)
                state = stages.carry(stage, before, assembly, state, fresh, network)
                del network
                logs.say(f"stage {stage.name!r}: steps {stage.start} to {stage.stop}")
            if int(state["step"]) >= stage.stop:
                continue

            traced, where = programs[index]
            batch_size, step = stage.config.data.batch_size, int(state["step"])
            frozen = state.pop("frozen")
            compiling = time.monotonic()
            with sharding.on_mesh(mesh):
                compiled = traced.lower().compile()
            spent["compile"] += time.monotonic() - compiling
            flops = costs.count_jaxpr(traced.jaxpr).flops
            flops = math.nan if flops is None else flops  # of a step; unknown of one stage is unknown of all
            for name, size in step_memory(compiled).items():  # of several stages the largest
                memory[name] = max(size, memory.get(name, 0))

            batches = data.train_batches(dataset, start_step=step, **stream(stage))
            pending, began, mark, mark_step = [], time.monotonic(), time.monotonic(), step
            while step < stage.stop and not halted:
                if profile and step == start + min(5, total - start - 1):
                    jax.profiler.start_trace(str(workdir / "profile"))
                batch = sharding.put_batch(next(batches), where)
                with jax.transfer_guard("disallow"):
                    state, metrics = compiled(state, frozen, batch, loop_key)
                step += 1
                spent["flops"] += flops
                if virtual:
                    jax.block_until_ready(metrics)
                pending.append((step, metrics))
                if profile and step == min(start + min(5, total - start - 1) + profile, stage.stop):
                    jax.block_until_ready(state)
                    jax.profiler.stop_trace()
                    profile = 0
                examples += batch_size
                # Looked at once a step, so that what stops the loop is also what saves; several processes agree on it
                # where they log.
                if count == 1:
                    halted = bool(stopped)
                elif step % config.log.every == 0:
                    halted = processes.any_of(bool(stopped))
                at_end = step == stage.stop or halted
                saving = at_end or (config.checkpoint.every and step % config.checkpoint.every == 0)
                if step % config.log.every == 0 or saving:
                    values = [(at, jax.device_get(entry)) for at, entry in pending]
                    pending = []
                    for at, entry in values:
                        if not (math.isfinite(entry["loss"]) and math.isfinite(entry["gradient_norm"])):
                            whole = store.steps()
                            last = f"the last good checkpoint is step {whole[0]}" if whole else "there is no checkpoint"
                            raise UserError(
                                f"the loss is {float(entry['loss'])} at step {at}, the gradient's norm "
                                f"{float(entry['gradient_norm'])}; {last} in {workdir}: lower "
                                "config.optim.learning_rate or clip_norm, or look for values in "
                                "the data that are not finite"
                            )
                    now = time.monotonic()
                    rate = (step - mark_step) / max(now - mark, 1e-9)
                    mark, mark_step = now, step
                    logs.write(step, values[-1][1])
                    logs.progress(
                        step,
                        float(values[-1][1]["loss"]),
                        rate * batch_size * per_example,
                        (total - step) / rate,
                    )
                asked = config.evaluation.every and step % config.evaluation.every == 0
                learned = classes is not None and step in classes.ends  # a task: forgetting is told from here on
                if (asked or learned) and step < total:
                    paused = time.monotonic()
                    logs.write(step, evaluate(index, {**state, "frozen": frozen}), "test")
                    began += time.monotonic() - paused
                    mark += time.monotonic() - paused
                if saving:
                    logs.write(step, times(), "times")  # a run that is killed after this has its cost recorded
                    store.save(step, {**state, "frozen": frozen}, assembly.stacks, {"stage": stage.name})
            spent["train"], began = spent["train"] + time.monotonic() - began, None
            state["frozen"] = frozen
            if halted:
                break

        # ----------------------------------------------------------- the end
        store.wait()
        step = int(state["step"])
        if halted:
            by = stopped[0] if stopped else "a signal to another process"
            logs.say(f"stopped by {by} at step {step} of {total}; saved in {workdir}")
        else:
            outcome = evaluate(len(plan) - 1, state)
            logs.write(step, outcome, "test")
        if step > start:
            logs.write(step, times(), "times")
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        logs.close()
        store.close()
    return {"step": step, "traces": traces, **times(), **outcome}


def main(argv: list[str]) -> None:
    """The command line."""
    flags.DEFINE_string("workdir", None, "where the run lies; runs/<recipe>[_<mode>] if not given")
    flags.DEFINE_bool("overwrite", False, "start anew where another run stands")
    flags.DEFINE_integer("profile", 0, "trace this many steps for TensorBoard's profiler", lower_bound=0)
    with one_sentence():
        spec, config = command_line.config_from(command_line.parse(argv))
        workdir = pathlib.Path(flags.FLAGS.workdir or default_workdir(spec))
        result = train(config, workdir, overwrite=flags.FLAGS.overwrite, profile=flags.FLAGS.profile)
        import jax

        if jax.process_count() == 1:
            from lissom.eval import report_run

            report_run(workdir, result)
        elif jax.process_index() == 0:  # what measures is one process
            print(f"the run lies in {workdir}; to measure it: eval.py --runs={workdir}")


if __name__ == "__main__":
    main(sys.argv)
