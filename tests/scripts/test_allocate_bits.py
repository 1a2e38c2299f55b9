"""Bits for the layers of a trained run, and the rows of what is stored."""

import re

import numpy as np
import pytest

from lissom.compression.artefacts import reload, structure_of
from lissom.compression.transforms import build_transforms
from lissom.evaluation.tables import tables
from lissom.models.variables import merge
from lissom.training.errors import UserError
from lissom.training.runs import load_network, read_config
from scripts import allocate_bits
from tests.scripts.lines import command_line

ASKED = allocate_bits.Asked(("uniform", "hessian"), ("int2", "int8"), "int8", (), (), 2, 2)


def values(row):
    return {
        entry.name: entry.value for entry in row.measurements if not entry.conditions.keys() - {"batch", "examples"}
    }


def test_rows_are_of_what_was_allotted(tiny_run, capsys):
    _, path = tiny_run("vision/digits_resnet")
    mixed = allocate_bits.problem_of(path, ASKED).mixed
    budget = int(mixed.sizes.sum(0).mean()) + mixed.fixed
    rows = allocate_bits.rows_of([path], ASKED._replace(budgets=(budget,)))
    assert [row.identity.transform for row in rows] == [
        None,
        f"quantize uniform {budget}",
        f"quantize hessian {budget}",
    ]
    trained, uniform, hessian = map(values, rows)
    assert uniform["parameter_bytes"] == mixed.sizes.sum(0)[0] + mixed.fixed < hessian["parameter_bytes"] <= budget
    assert uniform["allocation_passes"] == 0 < hessian["allocation_passes"] and "allocation_passes" not in trained
    assert trained["bit_operations"] > hessian["bit_operations"]  # 16 bits against 8
    printed = capsys.readouterr().err
    assert (
        f"hessian {budget}: {hessian['parameter_bytes']:,} bytes" in printed and "stem)$', {'weights': 'int" in printed
    )
    assert tables(rows)
    chosen = allocate_bits.allocations(path, ASKED._replace(budgets=(budget,)))[f"hessian {budget}"]
    entry, allocation, _ = chosen
    assert len(allocation.choice) == len(mixed.paths) and build_transforms([entry])
    for path, at in zip(mixed.paths, allocation.choice, strict=True):  # each layer has the one rule that was chosen
        (settings,) = [settings for pattern, settings in entry["rules"] if re.search(pattern, path)]
        assert settings["weights"] == mixed.options[at].weights


def test_bisection_keeps_the_accuracy_of_what_is_stored(tiny_run):
    """On the examples, of the stored network."""
    result, path = tiny_run("vision/digits_resnet", **{"train.steps": 60})
    del result
    asked = ASKED._replace(methods=("hessian",), accuracies=(0.9, 0.5))
    rows = allocate_bits.rows_of([path], asked)
    assert [row.identity.transform for row in rows] == [
        None,
        "quantize hessian accuracy 0.9",
        "quantize hessian accuracy 0.5",
    ]
    problem = allocate_bits.problem_of(path, asked)
    stored = merge(reload(path / "exports" / "quantize hessian accuracy 0.9"))
    logits = [stored(batch["inputs"])[0] for batch in problem.batches]
    right = [(x.argmax(-1) == batch["labels"]).mean() for x, batch in zip(logits, problem.batches, strict=True)]
    exact = problem.value("accuracy")(problem.mixed.choice())
    assert exact > 0.3 and np.mean(right) >= 0.9 * exact - 1e-6
    # With less to keep, fewer bits; and the network that is stored is the one that was looked at.
    found = {label: chosen.allocation.choice for label, chosen in allocate_bits.allocations(path, asked).items()}
    assert sum(found["hessian accuracy 0.5"]) <= sum(found["hessian accuracy 0.9"])
    chosen = allocate_bits.allocations(path, asked)["hessian accuracy 0.9"]
    seen = problem.mixed.run(np.asarray(chosen.allocation.choice), problem.batches[0])
    np.testing.assert_allclose(seen, logits[0], atol=1e-3)


def test_a_text_network_is_allotted_too(tiny_run):
    _, path = tiny_run("language/stdlib_lm")
    asked = ASKED._replace(methods=("random",), accuracies=(0.5,))
    ((_, allocation, _),) = allocate_bits.allocations(path, asked).values()
    problem = allocate_bits.problem_of(path, asked)
    assert "embed" in problem.mixed.paths and allocation.passes >= 2
    kept = problem.value("accuracy")(np.asarray(allocation.choice))
    assert kept >= 0.5 * problem.value("accuracy")(problem.mixed.choice()) > 0


def test_domains_are_held_apart(tiny_run):
    _, path = tiny_run("language/domains_moe", **{"model.ffn": "swiglu"})
    asked = ASKED._replace(methods=("decoupled",), domains=("python", "english"))
    problem = allocate_bits.problem_of(path, asked)
    assert [{*batch["domains"].argmax(-1).tolist()} for (batch,) in problem.kinds] == [{0}, {2}]
    budget = int(problem.mixed.sizes.sum(0).mean()) + problem.mixed.fixed
    ((_, allocation, _),) = allocate_bits.allocations(path, asked._replace(budgets=(budget,))).values()
    assert 0 < sum(allocation.choice) < len(allocation.choice)
    with pytest.raises(UserError, match="'domain_text' has no 'latin', but python, c"):
        allocate_bits.problem_of(path, asked._replace(domains=("latin", "python")))


def test_first_tokens_stay_exact_where_bits_are_chosen(tiny_run):
    """What is stored is what was looked at, and its first token has only the weights' rounding."""
    _, path = tiny_run("language/stdlib_lm")
    asked = ASKED._replace(methods=("divergence",), options=("int8",), exact_first=1, budgets=(10**6,))
    allocate_bits.rows_of([path], asked)
    problem = allocate_bits.problem_of(path, asked)
    mixed, batch = problem.mixed, problem.batches[0]
    choice = np.zeros(len(mixed.paths), np.int32)
    assert all(rule["activations"]["exact_first"] == 1 for _, rule in mixed.rules(choice))
    stored = merge(reload(path / "exports" / "quantize divergence 1000000"))(batch["inputs"])[0]
    seen = np.asarray(mixed.run(choice, batch))
    weights = allocate_bits.problem_of(path, asked._replace(activations="none", exact_first=0)).mixed
    of_weights = np.asarray(weights.run(choice, batch))
    for found in (seen, stored):
        np.testing.assert_allclose(found[:, 0], of_weights[:, 0], rtol=1e-4, atol=1e-3)
    # Rounding in float32 moves a few activations by a step.
    assert np.abs(stored - seen).mean() < 0.1 * np.abs(seen - of_weights).mean()


def test_ranges_are_measured_without_data(tiny_run):
    """Of each way a row, of the network that was looked at; the same bytes, other ranges."""
    _, path = tiny_run("vision/digits_resnet")
    asked = ASKED._replace(methods=("uniform",), options=("int4",), budgets=(10**6,), ranges=("training", "noise"))
    rows = allocate_bits.rows_of([path], asked)
    assert [row.identity.transform for row in rows] == [
        None,
        "quantize uniform 1000000",
        "quantize uniform 1000000 noise",
    ]
    _, training, noise = map(values, rows)
    assert training["parameter_bytes"] == noise["parameter_bytes"] and training["loss"] != noise["loss"]
    assert training["calibration_seconds"] > 0
    problem = allocate_bits.problem_of(path, asked, "noise")
    stored = merge(reload(path / "exports" / "quantize uniform 1000000 noise"))
    seen = problem.mixed.run(np.zeros(len(problem.mixed.paths), np.int32), problem.batches[0])
    np.testing.assert_allclose(stored(problem.batches[0]["inputs"])[0], seen, atol=1e-3)


def test_networks_are_trained_on_with_their_bits(tiny_run, tmp_path):
    _, path = tiny_run("vision/digits_resnet")
    asked = ASKED._replace(methods=("hessian",), fine_tune=3, fine_tune_rate=0.5, workdir=str(tmp_path / "on"))
    budget = int(allocate_bits.problem_of(path, asked).mixed.sizes.sum(0).mean())
    rows = allocate_bits.rows_of([path], asked._replace(budgets=(budget,)))
    assert [(row.identity.variant, row.identity.transform) for row in rows] == [
        ("digits_resnet", None),
        ("digits_resnet", f"quantize hessian {budget}"),
        (f"digits_resnet, hessian {budget}, 3 steps", None),
        (f"digits_resnet, hessian {budget}, 3 steps", "packed"),
    ]
    _, rounded, _, tuned = map(values, rows)
    assert rounded["parameter_bytes"] == tuned["parameter_bytes"] and rounded["loss"] != tuned["loss"]
    (run,) = (tmp_path / "on").glob("*")
    config, before = read_config(run), read_config(path)
    assert config.init_from == (str(path),) and config.train.to_dict() == {"steps": 3} and not config.stages
    assert config.optim.learning_rate == 0.5 * before.optim.learning_rate
    # It begins with what was trained, and what is finished is not trained again.
    written = (run / "metrics.jsonl").stat().st_mtime_ns
    still = asked._replace(budgets=(budget,), fine_tune=1, fine_tune_rate=1e-9)
    chosen = next(iter(allocate_bits.allocations(path, still).values()))
    kernel = lambda run: load_network(run, structure_of).params["stem"]["kernel"]
    np.testing.assert_allclose(kernel(allocate_bits.fine_tuned(path, chosen, still)), kernel(path), atol=1e-6)
    again = asked._replace(budgets=(budget,))
    assert allocate_bits.fine_tuned(path, next(iter(allocate_bits.allocations(path, again).values())), again) == run
    assert (run / "metrics.jsonl").stat().st_mtime_ns == written


def test_runs_of_several_recipes_are_told_apart(tiny_run, tmp_path):
    """Seeds of one recipe and its settings are one line, trained on or not; others stand apart, and so do twins."""
    _, first = tiny_run("vision/digits_resnet", "first")
    _, second = tiny_run("vision/digits_resnet", "second", seed=1)
    _, other = tiny_run("vision/digits_resnet", "other", **{"optim.learning_rate": 0.05})
    asked = ASKED._replace(methods=("uniform",), budgets=(10**6,), workdir=str(tmp_path / "on"))
    rows = allocate_bits.rows_of([first, second, other], asked._replace(fine_tune=1))
    lines = [row.identity.label for row in rows if row.identity.transform is None and row.identity.role == "variant"]
    assert lines[0] == lines[1] != lines[2] and lines[3] == lines[4] != lines[5]
    assert lines[3].startswith(lines[0]) and lines[5].startswith(lines[2]) and "learning_rate=0.05" in lines[2]
    of_runs = [row for row in rows if str(row.identity.transform).startswith("quantize")]
    assert len(of_runs) == 3 and all("allocation_seconds" in values(row) for row in of_runs)
    _, twin = tiny_run("vision/digits_resnet", "twin")
    twins = [row.identity.label for row in allocate_bits.rows_of([first, twin], asked)[:4]]
    assert len(set(twins)) == 2 and str(twin) in twins[-1]


def test_methods_that_choose_alike_have_rows_each(tiny_run, tmp_path):
    _, path = tiny_run("vision/digits_resnet")
    asked = ASKED._replace(methods=("uniform", "random"), budgets=(10**6,), fine_tune=1, workdir=str(tmp_path / "on"))
    rows = allocate_bits.rows_of([path], asked)
    lines = [(row.identity.variant, row.identity.transform) for row in rows[3:]]
    one, two = (f"digits_resnet, {method} 1000000, 1 steps" for method in ("uniform", "random"))
    assert lines[:4] == [(one, None), (one, "packed"), (two, None), (two, "packed")]
    assert [values(row)["loss"] for row in rows[3:5]] == [values(row)["loss"] for row in rows[5:7]]
    assert len(list((tmp_path / "on").glob("*"))) == 1 and all(row.identity.role == "floor" for row in rows[7:])


def test_what_cannot_be_trained_on_is_said_first(tiny_run):
    _, path = tiny_run("vision/digits_resnet", **{"data.order": "by_class"})
    with pytest.raises(UserError, match="by one class after the other"):
        allocate_bits.rows_of([path], ASKED._replace(fine_tune=2))


def test_a_scanned_stack_is_trained_on_as_a_loop(tiny_run, tmp_path):
    _, path = tiny_run("language/stdlib_lm", **{"model.stack": "scan"})
    asked = ASKED._replace(methods=("uniform",), budgets=(10**6,), fine_tune=1, workdir=str(tmp_path / "on"))
    (chosen,) = allocate_bits.allocations(path, asked).values()
    assert read_config(allocate_bits.fine_tuned(path, chosen, asked)).model.stack == "loop"


def test_mistakes_are_one_sentence(tiny_run):
    _, path = tiny_run("vision/digits_resnet")
    with pytest.raises(UserError, match=r"exact_first is for the network 'language', and not for a ResNet"):
        allocate_bits.problem_of(path, ASKED._replace(exact_first=1))
    with pytest.raises(
        UserError, match=r"--bytes=N is missing: of .* all layers alike take int2 [0-9,]+, int8 [0-9,]+"
    ):
        allocate_bits.allocations(path, ASKED)
    with pytest.raises(UserError, match=r"--bytes=10 is below [0-9,]+, the fewest that .*: all layers alike take int2"):
        allocate_bits.allocations(path, ASKED._replace(budgets=(10,)))
    _, text = tiny_run("language/stdlib_lm", "text")
    with pytest.raises(UserError, match="this network has none"):
        allocate_bits.allocations(text, ASKED._replace(methods=("distilled",), budgets=(10**6,)))
    _, trained = tiny_run("vision/digits_qat", "qat")
    with pytest.raises(UserError, match=r"qat: the network is quantized already"):
        allocate_bits.problem_of(trained, ASKED)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "--run=DIRECTORY is missing"),
        (["--run=x", "--method=hesian"], "--method: 'hesian' must be one of uniform, random, hessian"),
        (["--run=x", "--options=int3"], "--options: 'int3' must be one of int8"),
        (["--run=x", "--activations=all"], "--activations: 'all' must be one of"),
        (["--run=x", "--bytes=1e4"], "--bytes=1e4 must be whole numbers"),
        (["--run=x", "--bytes=10", "--accuracy=0.9"], "are two questions"),
        (["--run=x", "--accuracy=0.9"], "chooses between two --options"),
        (["--run=x", "--accuracy=0.9,a"], "--accuracy=0.9,a must be shares, above 0 and at most 1"),
        (["--run=x", "--accuracy=1.1"], "--accuracy=1.1 must be shares"),
        (["--run=x", "--accuracy=0.9", "--method=uniform"], "--method: 'uniform' must be one of random"),
        (["--run=x", "--method=decoupled"], "takes two --domains"),
        (["--run=x", "--domains=a,b"], "no other method takes any"),
        (["--run=x", "--samples=1"], "--samples=1 must be at least 2"),
        (["--run=x", "--batches=0"], "--batches=0 must be at least 1"),
        (["--run=x", "--activations=uint8"], "--activations: 'uint8' must be one of int8"),
        (["--run=x", "--exact_first=-1"], "--exact_first=-1 is a number of tokens"),
        (["--run=x", "--exact_first=1", "--activations=none"], "whose activations are not rounded"),
        (["--run=x", "--ranges=real"], "--ranges: 'real' must be one of training, distilled, noise"),
        (["--run=x", "--ranges=noise", "--activations=none"], "--activations=none rounds none"),
        (["--run=x", "--ranges="], "--ranges= must be one or several of training, distilled, noise"),
        (["--run=x", "--workdir=x"], "--workdir is for networks that are trained on"),
        (["--run=x", "--ranges=noise", "--fine_tune=5"], "--fine_tune needs the training data"),
        (["--run=x", "--fine_tune=-1"], "--fine_tune=-1 must be a number of steps"),
        (["--run=x", "--fine_tune=1", "--fine_tune_rate=0"], "--fine_tune_rate=0.0 must be above 0"),
        (["--run=nowhere", "--bytes=10"], "--run=nowhere matches nothing"),
        (["--config=configs/vision/digits_resnet.py"], "takes no --config"),
    ],
)
def test_wrong_flags_are_one_sentence(words, told, capsys):
    with pytest.raises(SystemExit) as end, command_line(allocate_bits):
        allocate_bits.main(["allocate_bits.py", *words])
    said = capsys.readouterr().err
    assert end.value.code == 2 and said.count("\n") == 1 and told in said
