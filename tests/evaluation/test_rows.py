"""Rows: what is refused, and what survives the way to disk and back."""

import dataclasses
import math
import multiprocessing
import subprocess

import numpy as np
import pytest

from lissom.evaluation import rows
from lissom.evaluation.rows import Identity, Measurement, Provenance, Row, measure


def row(seed=0, value=0.5):
    identity = Identity("vision/digits_vit", "digits", seed, {"model.mixer": "window"}, "int8")
    provenance = Provenance("abc", False, {"cpu": "Z80", "cores": 1}, {"jax": "0.11.2"}, "2026-01-01T00:00:00+00:00")
    return Row(identity, provenance, (measure("accuracy", value), measure("latency_p50", None, batch=1)))


def test_unknown_name_names_the_nearest():
    with pytest.raises(ValueError, match="nearest is 'latency_p50'"):
        measure("latency_p5", 1.0)


@pytest.mark.parametrize("value", [math.nan, math.inf, np.float32("nan")])
def test_nan_is_refused(value):
    with pytest.raises(ValueError, match="finite"):
        measure("loss", value)


def test_unit_kind_and_role_are_checked():
    with pytest.raises(ValueError, match="kept in 's'"):
        Measurement("latency_p50", 3.0, "ms")
    with pytest.raises(ValueError, match="modelled"):
        measure("flops", 3, "guessed")
    with pytest.raises(TypeError, match="not str"):
        measure("flops", "3")
    with pytest.raises(ValueError, match="floor"):
        Identity("r", "t", role="baseline")


def test_rows_come_back_as_they_went(tmp_path):
    path = tmp_path / "deep" / "rows.jsonl"
    rows.write_rows(path, [row(0)])
    rows.append_row(path, row(1, np.float64(0.25)))
    assert rows.read_rows(path) == [row(0), row(1, 0.25)]
    assert '"value": null' in path.read_text()
    assert not list(path.parent.glob("*.partial"))


def test_training_elsewhere_notes_and_data_come_back(tmp_path):
    trained = Provenance("abc", True, {"accelerator": "H900"}, {"jax": "0.12"}, None, {"sha256": "00"})
    there = dataclasses.replace(row(), trained=trained, notes=("a sentence",))
    rows.write_rows(tmp_path / "rows.jsonl", [there])
    assert rows.read_rows(tmp_path / "rows.jsonl") == [there]


def test_rows_of_before_there_were_such_fields_are_read():
    line = (
        '{"identity": {"recipe": "r", "task": "t", "seed": 0, "overrides": {}, "transform": null, "variant": null, '
        '"role": "variant"}, "provenance": {"commit": "abc", "dirty": false, "hardware": {"cpu": "Z80"}, "versions": '
        '{}, "date": null}, "measurements": [{"name": "flops", "value": 7, "unit": "FLOP", "kind": "compiled", '
        '"conditions": {"batch": 1}}]}'
    )
    provenance = Provenance("abc", False, {"cpu": "Z80"})
    assert rows.from_json(line) == Row(Identity("r", "t", 0), provenance, (measure("flops", 7, "compiled", batch=1),))
    with pytest.raises(TypeError, match="seeds"):
        rows.from_json(line.replace('"measurements"', '"seeds": 1, "measurements"'))


@pytest.mark.parametrize(
    "change, words",
    [
        ({}, None),
        ({"date": "1999-01-01"}, None),
        ({"commit": "0123456789"}, "trained at commit 012345678 (measured at abc)"),
        ({"dirty": True}, "trained at commit abc with changes (measured at abc)"),
        ({"hardware": {"cpu": "6502", "cores": 2}}, "trained on 6502, 2 cores"),
        ({"hardware": {"cpu": "Z80", "cores": 1, "memory_bytes": 9}}, "trained on another Z80, 1 core"),
        ({"versions": {"jax": "0.10", "tpu": "1"}},
         "trained with jax 0.10 (measured with 0.11.2), tpu 1 (measured with unknown)"),
        ({"data": {"sha256": "0123456789"}}, "trained on data of sha256 012345678 (measured on unknown sha256)"),
    ],
)  # fmt: skip
def test_in_which_way_training_was_elsewhere(change, words):
    here = row().provenance
    trained = rows.elsewhere(dataclasses.replace(here, **change), here)
    assert (trained is None) == (words is None)
    assert rows.trained_note(dataclasses.replace(row(), trained=trained)) == words


@pytest.mark.parametrize("data", [[], {"hardware": 3}, {"versions": "x"}, {"who": 1}, {"data": None}])
def test_what_is_no_provenance(data):
    with pytest.raises(ValueError, match=r"no provenance|sequence"):
        rows.provenance_of(data)


def test_a_damaged_line_is_named(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows.write_rows(path, [row(0), row(1)])
    path.write_text(path.read_text()[:-9])
    with pytest.raises(ValueError, match="line 2"):
        rows.read_rows(path)


def _append_many(path, start):
    for seed in range(start, start + 50):
        rows.append_row(path, row(seed))


def test_processes_append_whole_lines(tmp_path):
    path = tmp_path / "rows.jsonl"
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_append_many, args=(path, start)) for start in (0, 50)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert sorted(r.identity.seed for r in rows.read_rows(path)) == list(range(100))


def test_git_state_of_clean_dirty_and_untracked_sources(tmp_path):
    assert rows.git_state(tmp_path) == (None, None)
    git = lambda *a: subprocess.run(
        ["git", "-C", str(tmp_path), "-c", "user.name=n", "-c", "user.email=e", *a], check=True, capture_output=True
    )
    git("init")
    assert rows.git_state(tmp_path) == (None, None)  # a repository that does not track these sources
    (tmp_path / "a.py").write_text("a = 1\n")
    git("add", "a.py")
    git("commit", "-m", "m")
    commit, dirty = rows.git_state(tmp_path)
    assert len(commit) == 40 and dirty is False
    (tmp_path / "table.md").write_text("a result")
    assert rows.git_state(tmp_path) == (commit, False)
    (tmp_path / "b.py").write_text("b = 1\n")
    assert rows.git_state(tmp_path) == (commit, True)


def test_provenance_knows_this_machine():
    found = rows.provenance()
    assert found.versions["jax"].startswith("0.") and found.versions["python"].startswith("3.")
    assert found.hardware["cores"] >= 1
    assert rows.package_version("no-such-package-here") is None
    rows.to_json(Row(Identity("r", "t"), found, ()))
