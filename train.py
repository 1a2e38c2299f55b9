"""Trains one recipe: uv run train.py --config=configs/vision/digits_vit.py [--config.train.steps=100 ...]

The run lies in --workdir; the same command goes on where it was stopped.
"""

import pathlib
import sys
from typing import Any

from absl import flags

from lissom.training import flags as command_line
from lissom.training.config import check, default_workdir
from lissom.training.errors import one_sentence


def train(config, workdir: str | pathlib.Path, *, overwrite: bool = False, profile: int = 0) -> dict[str, Any]:
    """Trains `config` in `workdir`, resuming what stands there; returns the last evaluation and the times.

    Keys: step, start (where this session began), traces (of the training step, by stage), compile_seconds,
    train_seconds, examples_per_second, train_flops (where all of it can be counted), train_peak_memory and
    train_temporaries (bytes of the compiled step on one device, where the backend tells) and, where the run was
    finished, the means that the objective's `evaluate` names.
    Raises UserError for what the user can mend, and SystemExit(0) where SIGTERM or Ctrl-C came when there was no step
    left to stop behind: what goes on with other runs would not know of it.
    """
    check(config)
    # jax is imported behind the check: a mistake is answered in 0.3 seconds instead of 6.
    import dataclasses
    import json

    import jax

    from lissom.compression.artefacts import check_transforms, structure_of
    from lissom.compression.starting import starting_network, transformed_network
    from lissom.evaluation import costs
    from lissom.evaluation.memory import step_memory
    from lissom.evaluation.rows import provenance
    from lissom.models.variables import flatten
    from lissom.training import processes, runs, sharding, stages
    from lissom.training.building import fresh_state, further_tests
    from lissom.training.checkpoints import Checkpoints
    from lissom.training.logs import Logs
    from lissom.training.session import Costs, Session
    from lissom.training.setup import set_up

    # ----------------- what can be wrong with any stage is found before the directory is touched
    processes.join()
    first_process = jax.process_index() == 0
    workdir = pathlib.Path(workdir)
    resuming = runs.stands(workdir, config, overwrite)

    def fits(dataset, facts):
        further_tests(config, dataset)  # they are for the end, what is wrong with them is for now
        if resuming and (workdir / "facts.json").is_file():
            runs.check_facts(workdir, facts, (*runs.SHAPES, "examples", "steps", "sha256"))

    setup = set_up(config, structure_of, fits)
    check_transforms(config, setup.facts)
    plan, assemblies, spent, traces = setup.plan, setup.assemblies, Costs(), {}
    init_key, _ = jax.random.split(jax.random.key(config.seed))
    # Made where it lies: of several processes none could put it on the others' devices.
    everywhere = sharding.replicated(setup.mesh)
    loop_key = jax.jit(lambda: jax.random.split(jax.random.key(config.seed))[1], out_shardings=everywhere)()

    def counted(stage):
        traces[stage.name] = traces.get(stage.name, 0) + 1

    with spent.compilation():
        programs = [setup.traced(i, loop_key, lambda stage=stage: counted(stage)) for i, stage in enumerate(plan)]
    store = Checkpoints(workdir / "checkpoints", keep=config.checkpoint.keep)
    starting = None
    if config.init_from and not (resuming and store.steps()):
        first = assemblies[0]
        network = starting_network(plan[0].config, setup.batches(plan[0], 0))
        starting = runs.starting_values(
            first.shapes, first.stacks, first.objective.path, network, ", ".join(config.init_from)
        )
        del network

    # ---------------------------------------------------------------------- directory
    processes.together("everything is known")
    if first_process and not resuming:
        runs.claim(workdir, config, overwrite)
    if first_process:
        (workdir / "facts.json").write_text(json.dumps(setup.facts, indent=1, default=str))
        if not (resuming and (workdir / "provenance.json").exists()):
            (workdir / "provenance.json").write_text(json.dumps(dataclasses.asdict(provenance()), indent=1))
    processes.together("claimed")

    # -------------------------------------------------------------------------- state
    state, current = runs.resumed(store, plan, assemblies) if resuming else (None, 0)
    if state is None:
        state = fresh_state(assemblies[0], init_key)
        if starting is not None:
            state = runs.started(state, assemblies[0].stacks, starting)
            del starting
    spent.start = int(state["step"])

    def opened(index, state):
        """The state that a stage begins with, of that at the end of the one before."""
        stage, before, assembly = plan[index], assemblies[index - 1], assemblies[index]
        fresh = fresh_state(assembly, jax.random.fold_in(init_key, index))
        with sharding.on_mesh(setup.mesh):
            network = transformed_network(stage, before, state, setup.batches(stage, 0))
        return stages.carry(stage, before, assembly, state, fresh, network)

    # --------------------------------------------------------------------------- loop
    unit = "tokens" if setup.dataset.kind == "tokens" else "examples"
    logs = Logs(workdir, setup.steps, spent.start, unit, writing=first_process)
    parameters = sum(leaf.size for leaf in flatten(state["params"]).values())
    logs.say(
        f"{config.recipe or config.model.name}: {parameters:,} parameters, {setup.steps} steps of "
        f"{config.data.batch_size} on {setup.mesh.size} {jax.devices()[0].device_kind} device(s), in {workdir}"
    )
    session = Session(
        *(setup, programs, loop_key),
        workdir=workdir,
        logs=logs,
        store=store,
        costs=spent,
        measure=lambda traced, compiled: (costs.count_jaxpr(traced.jaxpr).flops, step_memory(compiled)),
        profile=profile,
    )
    outcome: dict[str, float] = {}
    try:
        with session.stopping():
            for index in range(current, len(plan)):
                if index > current:
                    state = opened(index, state)
                    logs.say(f"stage {plan[index].name!r}: steps {plan[index].start} to {plan[index].stop}")
                state = session.stage(index, state)
                if session.stopped:
                    break
            store.wait()
            step = int(state["step"])
            if session.stopped:
                logs.say(f"stopped by {session.stopped} at step {step} of {setup.steps}; saved in {workdir}")
            else:
                outcome = session.evaluate(len(plan) - 1, state)
                logs.write(step, outcome, "test")
            if step > spent.start:
                logs.write(step, spent.shown(), "times")
        if session.signals and not session.stopped:
            logs.say(f"{session.signals[0]} came behind the last step: {workdir} is finished")
            raise SystemExit(0)
    finally:
        logs.close()
        store.close()
    return {"step": step, "traces": traces, **spent.shown(), **outcome}


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
