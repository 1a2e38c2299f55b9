"""Meta-learners under transforms and on further test sets: what an inner loop may not touch, and what rows say."""

import numpy as np
import pytest

from lissom.eval import evaluate
from lissom.evaluation import few_shot
from lissom.training.building import load_plain
from lissom.training.errors import UserError
from lissom.training.runs import read_config

QAT = ({"name": "qat", "rules": ((".*", {"weights": "int8", "activations": {"format": "int8", "warm_up": 1}}),)},)
ROUNDED = ({"name": "quantize", "rules": ((".*", {"weights": "int8", "activations": "int8"}),)},)


@pytest.mark.parametrize("objective", ["maml", "reptile"])
def test_ranges_that_would_never_move_are_refused(objective, tiny_run):
    """Before the directory is touched; with running averages they move."""
    given = {"objective": objective, "transforms": QAT}
    with pytest.raises(UserError, match=r"keeps none of the network.s state, and .*/calls"):
        tiny_run("fewshot/sinusoid", **given)
    running = {f"objective_kwargs.{objective}.statistics": "running"}
    _, run = tiny_run("fewshot/sinusoid", **given, **running)
    (row, *_) = evaluate([run], floors=False)
    assert row.measurements


def test_ranges_that_training_does_not_move_are_no_state(tiny_run):
    """A learned range is a parameter."""
    learned = (
        {"name": "qat", "rules": ((".*", {"weights": "int8", "activations": {"format": "int8", "range": "learned"}}),)},
    )
    _, run = tiny_run("fewshot/sinusoid", objective="fomaml", transforms=learned)
    assert run.is_dir()


def test_activations_are_calibrated_on_queries(tiny_run):
    """Of regression and of pictures; and a kernel of whole numbers is not adapted, which the row says."""
    for recipe, objective in (("fewshot/sinusoid", "maml"), ("fewshot/glyphs", "protonet")):
        given = {"objective": objective, "evaluation.transforms": ROUNDED}
        _, run = tiny_run(recipe, f"{objective}_run", **given)
        trained, rounded = evaluate([run], floors=False)
        assert rounded.identity.transform and not any("not adapted" in note for note in trained.notes)
        told = [note for note in rounded.notes if "frozen numbers are not adapted" in note]
        assert len(told) == (objective == "maml")


def test_further_test_sets_of_episodes(tiny_run):
    """Other families and other numbers of queries are judged, by the floors too; other shapes are one sentence."""
    others = ({"families": ("ramp",)}, {"queries": 3})
    _, run = tiny_run("fewshot/sinusoid", **{"evaluation.data": others, "evaluation.floor": True})
    rows = evaluate([run])
    for row in rows:
        found = [m.conditions for m in row.measurements if m.name == "mse"]
        own, ramp, few = found
        assert own == {"examples": 20 * 20} and few == {"examples": 20 * 3, "queries": 3}
        assert ramp == {"examples": 20 * 20, "families": "('ramp',)"}
    floor = next(row for row in rows if row.identity.variant == "kernel ridge regression")
    assert len({m.value for m in floor.measurements if m.name == "mse"}) == 3
    # Its width and its ridge are those of the run's own training tasks, as the networks are.
    plain, lines = (load_plain(read_config(run), **settings) for settings in ({}, others[0]))
    expected = {name: told["mse"] for name, _, told in few_shot.rows(plain.train, lines.test)}
    of_lines = next(m for m in floor.measurements if "families" in m.conditions)
    assert of_lines.value == pytest.approx(expected["kernel ridge regression"])
    assert np.isfinite([m.value for m in rows[0].measurements if m.name == "mse"]).all()
    with pytest.raises(UserError, match=r"has input_shape \(2,\); the network is for \(1,\)"):
        tiny_run("fewshot/sinusoid", "other", **{"evaluation.data": ({"families": ("duffing",)},)})


def test_further_test_sets_of_one_that_learns_from_single_examples(tiny_run):
    """Its floors are fitted to training episodes all the same."""
    given = {"objective": "supervised", "objective_kwargs.supervised.single": True, "evaluation.floor": True}
    _, run = tiny_run("fewshot/glyphs", **given, **{"evaluation.data": ({"support_candidates": 3},)})
    network, *floors = evaluate([run])
    for row in (network, *floors):
        found = [m.conditions for m in row.measurements if m.name == "accuracy"]
        assert [c.get("support_candidates") for c in found] == [None, 3]
    assert len(floors) >= 5
