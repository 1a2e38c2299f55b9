"""training_steps.py: the step of train.py, timed beside others."""

import pytest

from lissom.training.config import load_recipe, overridden
from lissom.training.variants import config_of, grid
from scripts import training_steps
from tests.scripts.lines import command_line

TINY = "configs/vision/digits_resnet.py:tiny"


def values(row):
    return {entry.name: entry.value for entry in row.measurements}


def test_a_step_is_that_of_a_run(tiny_run):
    result, _ = tiny_run("vision/digits_resnet")
    step = training_steps.step_of(overridden(load_recipe(TINY), [("mesh.data", 1)]))
    assert step.flops == result["train_flops"] / result["step"]
    assert step.memory["train_temporaries"] == result["train_temporaries"]
    assert step.sample(0) > 0 and step.sample(1) > 0  # what it gave back is what it goes on with


def test_a_stage_counts_with_its_transforms():
    rules = ((".*", {"weights": "int4", "activations": {"format": "int4", "warm_up": 1}}),)
    stages = ({"duration": 1}, {"duration": 2, "overrides": {"transforms": ({"name": "qat", "rules": rules},)}})
    staged = overridden(load_recipe(TINY), [("stages", stages), ("train.steps", 3)])
    float_, few = (training_steps.step_of(config) for config in (load_recipe(TINY), staged))
    assert few.memory["train_temporaries"] != float_.memory["train_temporaries"]


def test_rows_are_of_one_process_and_relative_to_the_first():
    variants = grid(["model.widths=(8,16),(32,64)"])
    rows = training_steps.rows_of({v.label: config_of(v, load_recipe(TINY)) for v in variants}, 5)
    small, large = map(values, rows)
    assert [row.identity.label for row in rows] == [v.label for v in variants]
    assert small["speedup"] == 1 and large["speedup"] == small["step_p50"] / large["step_p50"]
    assert large["train_flops"] > 8 * small["train_flops"]


def test_the_command_line(tmp_path, capsys):
    with command_line(training_steps):
        words = [f"--config={TINY}", "--vary=mode=tiny", "--also=more: data.batch_size=32", "--repeats=2"]
        training_steps.main(["training_steps.py", *words, f"--out={tmp_path}/steps"])
    assert "more" in capsys.readouterr().out and (tmp_path / "steps" / "rows.jsonl").is_file()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "--config=RECIPE is missing"),
        ([f"--config={TINY}", "--repeats=1"], "--repeats=1 must be at least 2"),
        ([f"--config={TINY}", "--vary=mode=tyni"], "tyni"),
        ([f"--config={TINY}", "--vary=model.wdth=1"], "no field 'model.wdth'"),
    ],
)
def test_mistakes_are_one_sentence(words, told, capsys):
    with pytest.raises(SystemExit) as end, command_line(training_steps):
        training_steps.main(["training_steps.py", *words])
    assert end.value.code == 2 and told in capsys.readouterr().err
