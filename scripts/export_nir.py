"""Writes the plain spiking network of a finished run as a graph of NIR, which other simulators and chips read.

    uv run --extra nir scripts/export_nir.py --runs=runs/digits_snn [--dt=1.0] --out=runs/digits_snn/network.nir

What NIR can say, and what a step of `--dt` means in its equations, stands in `models/spiking/nir_graphs.py`; what it
can't say is refused. The file is read back, and the network that it holds judged beside the run's on the test set:
they differ by the folding of BatchNorm alone, whose rounding may move a spike that stands on the edge.
"""

import pathlib
import sys

from absl import flags

from lissom.training.errors import UserError, one_sentence


def run(path: pathlib.Path | str, out: pathlib.Path, *, dt: float = 1.0) -> dict[str, float]:
    """Writes the file; {"examples", "agreement": share of them that both answer alike, "accuracy": of what was read
    back}."""
    import jax
    import numpy as np

    from lissom import data
    from lissom.compression.artefacts import structure_of
    from lissom.models.spiking.network import SpikingNet
    from lissom.models.spiking.nir_graphs import from_nir, needed_nir, to_nir
    from lissom.models.variables import merge
    from lissom.training.building import load_dataset
    from lissom.training.runs import load_network, read_config, read_facts
    from lissom.training.stages import final_config

    config, network = final_config(read_config(path)), merge(load_network(path, structure_of))
    if not isinstance(network, SpikingNet):
        raise UserError(f"{path} holds no plain spiking network, but a {type(network).__name__}")
    kinds = ("encoding", "encoding_kwargs", "decoding", "decoding_kwargs", "time_steps")
    try:
        nir = needed_nir()
        graph = to_nir(network, dt=dt)
        out.parent.mkdir(parents=True, exist_ok=True)
        partial = out.with_name(f"{out.name}.partial")
        nir.write(partial, graph)
        given = {kind: config.model.get(kind) for kind in kinds}
        plain = {kind: getattr(value, "to_dict", lambda value=value: value)() for kind, value in given.items()}
        settings = {kind: value for kind, value in plain.items() if value is not None}
        back = from_nir(nir.read(partial), dt=dt, input_shape=read_facts(path)["input_shape"], **settings)
        partial.replace(out)
    except OSError as error:
        raise UserError(f"--out={out} can't be written: {error.strerror or error}") from error
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error
    dataset, told = load_dataset(config), []
    ours, theirs = jax.jit(lambda x: network(x)[0].argmax(-1)), jax.jit(lambda x: back(x)[0].argmax(-1))
    for batch in data.eval_batches(dataset, batch_size=config.evaluation.batch_size):
        inputs, kept = batch["inputs"], batch["mask"] > 0
        one, two = np.asarray(ours(inputs)), np.asarray(theirs(inputs))
        told.append(np.stack([one == two, two == batch["labels"]])[:, kept])
    agreement, accuracy = np.concatenate(told, 1).mean(1).tolist()
    found = {"examples": len(dataset.test), "agreement": agreement, "accuracy": accuracy}
    print(f"{out}: {len(graph.nodes)} nodes, {out.stat().st_size} bytes; read back it answers {agreement:.2%} of "
          f"{found['examples']} test examples as the run does, and {accuracy:.2%} right")  # fmt: skip
    return found


def main(argv: list[str]) -> None:
    """The command line."""
    flags.DEFINE_multi_string("runs", [], "the directory of one run")
    flags.DEFINE_float("dt", 1.0, "the time of a step, in the unit of the graph's time constants")
    flags.DEFINE_string("out", None, "the file, which ends in .nir")
    with one_sentence():
        from lissom.eval import given_runs

        runs, given = given_runs(argv, "export_nir.py"), flags.FLAGS
        if len(runs) != 1:
            raise UserError(f"--runs={','.join(given.runs)} names {len(runs)} runs, and a file holds one network")
        if not given.out:
            raise UserError("--out=FILE.nir is missing")
        run(runs[0], pathlib.Path(given.out), dt=given.dt)


if __name__ == "__main__":
    main(sys.argv)
