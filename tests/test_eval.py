"""eval.py: what it takes and skips, what its report holds, and the floors and ceilings of a task."""

import dataclasses
import json
import os
import pathlib
import shutil
import subprocess
import sys

import pytest

from lissom.eval import check_writable, evaluate, find_runs, overrides_of, read_metrics, render, task_name, write
from lissom.training.errors import UserError

ROOT = pathlib.Path(__file__).parent.parent


def values(row):
    return {m.name: m.value for m in row.measurements}


def test_finds_runs_at_any_depth_and_reports(tiny_run, tmp_path):
    _, one = tiny_run("vision/mnist1d_cnn", "deep/down/one")
    _, two = tiny_run("vision/mnist1d_cnn", "two", **{"model.kernel": 5, "evaluation.floor": True, "seed": 3})
    (tmp_path / "empty").mkdir()
    said = []
    assert find_runs([str(tmp_path / "*")], said.append) == [one, two]
    assert len(said) == 1 and "empty" in said[0]
    rows = evaluate([two, one], variants={str(one): "narrow", str(two): "wide"})
    assert [(r.identity.label, r.identity.transform, r.identity.role) for r in rows] == [
        ("wide", None, "variant"),
        ("wide", "int8_weights", "variant"),
        ("narrow", None, "variant"),
        ("narrow", "int8_weights", "variant"),
        ("1-nearest neighbour", None, "floor"),
        ("linear", None, "floor"),
    ]
    assert rows[0].identity.overrides["model.kernel"] == 5
    # MNIST-1D's paper puts the linear model at 32 % with 4,000 training examples.
    assert values(rows[5])["accuracy"] == pytest.approx(0.32, abs=0.04)
    kinds = {(m.name, m.kind) for m in rows[0].measurements}
    assert {("accuracy", "measured"), ("latency_p50", "measured"), ("peak_memory", "compiled")} <= kinds
    # Of rounded weights the logits are others; of weights that were exported and reloaded they are the same.
    assert ["logit_error" in values(row) for row in rows[:4]] == [False, True, False, True]
    assert 0 < values(rows[1])["logit_error"] < 1
    assert {"train_flops", "train_peak_memory", "train_temporaries"} <= set(values(rows[0])) - set(values(rows[1]))
    assert values(rows[0])["train_flops"] > 2 * values(rows[0])["flops"]
    write(rows, tmp_path / "out")
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"rows.jsonl", "table.md", "table.csv", "pareto.png"}
    lines = [json.loads(line) for line in (tmp_path / "out" / "rows.jsonl").read_text().splitlines()]
    assert len(lines) == 6 and lines[0]["provenance"]["hardware"]["cores"]
    text = render(rows)
    assert "wide + int8_weights" in text and "1-nearest neighbour (floor)" in text


def test_runs_of_one_label_are_told_apart(tiny_run):
    _, one = tiny_run("vision/mnist1d_cnn", "one")
    _, two = tiny_run("vision/mnist1d_cnn", "two")
    rows = evaluate([one, two], notes={str(two): ["tuned at the edge"]}, floors=False)
    labels = {(r.identity.label, r.identity.transform) for r in rows}
    assert len(labels) == 4
    assert [r.notes for r in rows] == [(), (), ("tuned at the edge",), ("tuned at the edge",)]
    assert f"- {rows[2].identity.label}: tuned at the edge.\n" in render(rows)


def test_a_stopped_run_is_skipped(tiny_run):
    _, run = tiny_run("vision/mnist1d_cnn")
    facts = json.loads((run / "facts.json").read_text())
    (run / "facts.json").write_text(json.dumps({**facts, "steps": 9}))
    said = []
    with pytest.raises(UserError, match="no directory with a finished run"):
        find_runs([str(run)], said.append)
    assert "stopped at step 3 of 9" in said[0]


def test_flops_of_a_cnn_by_hand(tiny_run):
    """tiny: 40 samples, two convolutions of kernel 3 and stride 2 to 4 channels, 10 classes. Multiply-adds: 20 x 4 x
    (3 x 1), 10 x 4 x (3 x 4), 40 x 10; 'SAME' padding of stride 2 on even lengths leaves one tap of each outside."""
    _, run = tiny_run("vision/mnist1d_cnn")
    row = evaluate([run], floors=False)[0]
    taps = (20 * 3 - 1) * 1 * 4 + (10 * 3 - 1) * 4 * 4 + 40 * 10
    assert values(row)["flops"] == 2 * taps
    parameters = (3 * 1 * 4 + 4) + (3 * 4 * 4 + 4) + (40 * 10 + 10)
    assert values(row)["parameters"] == parameters
    assert values(row)["parameter_bytes"] == 4 * parameters


def test_ceiling(tiny_run):
    settings = {
        "data.name": "cue_match",
        "evaluation.floor": True,
        "data.kwargs": {"cue_match": {"train_size": 200, "test_size": 100, "length": 32, "items": 4}},
    }
    _, run = tiny_run("vision/mnist1d_cnn", **settings)
    rows = evaluate([run])
    assert rows[-1].identity.role == "ceiling" and values(rows[-1])["accuracy"] == 1.0
    assert rows[0].identity.task == "cue_match(items=4, length=32, test_size=100, train_size=200)"


def test_floors_of_frames(tiny_run):
    """Frames train the convolutional network, time as one more axis, and have the floors of one label an example."""
    settings = {"train_size": 40, "test_size": 20, "size": 16, "steps": 4, "classes_of": "direction"}
    of = {"data.name": "moving_digits", "evaluation.floor": True, "data.kwargs": {"moving_digits": settings}}
    _, run = tiny_run("vision/mnist1d_cnn", **of)
    rows = evaluate([run])
    floors = [row.identity.label for row in rows if row.identity.role == "floor"]
    assert floors == ["1-nearest neighbour", "linear"]
    # Channels 4, 4, kernel 3 x 3 x 3, stride 2: of 4 x 16 x 16 there is left 1 x 4 x 4.
    assert values(rows[0])["parameters"] == (27 * 2 * 4 + 4) + (27 * 4 * 4 + 4) + (16 * 4 * 4 + 4)


def test_costs_of_spiking_networks_and_their_twins(tiny_run):
    _, spiking = tiny_run("vision/digits_snn", "spiking")
    settings = {"model.neuron": "clip_floor", "model.time_steps": 1}
    _, twin = tiny_run(
        "vision/digits_snn", "twin", **settings, **{"evaluation.transforms": ({"name": "int8_weights"},)}
    )
    ours, theirs, rounded = (values(row) for row in evaluate([spiking, twin]))
    # Its model has numbers of 8 bits, whether they are stored so or not.
    assert rounded["inference_energy"] == theirs["inference_energy"]
    assert 0 < ours["firing_rate"] < 1 and ours["synaptic_operations"] > 0
    assert "firing_rate" not in theirs and "synaptic_operations" not in theirs
    for found in (ours, theirs):
        assert 0 < found["operation_energy"] < found["inference_energy"] < 1e-3


def test_ceiling_and_floors_of_sets(tiny_run):
    """A fit by expectation maximisation is nearer to the true mixture than one Gaussian, and both are rows."""
    settings = {"test_size": 40, "train_size": 20, "size": 200, "deviations": (0.2, 0.3), "concentration": 10.0}
    _, run = tiny_run(
        "sets/gaussian_mixtures", **{"evaluation.floor": True, "data.kwargs": {"gaussian_mixtures": settings}}
    )
    rows = evaluate([run])
    assert [(row.identity.label, row.identity.role) for row in rows[1:]] == [
        ("one Gaussian", "floor"),
        ("expectation maximisation", "floor"),
        ("true mixture", "ceiling"),
    ]
    network, one, fitted, true = map(values, rows)
    assert network["log_likelihood"] == -network["loss"] and network["adjusted_rand"] is not None
    for row in (network, one, fitted, true):
        assert row["likelihood_gap"] == pytest.approx(true["log_likelihood"] - row["log_likelihood"], abs=1e-4)
    assert one["adjusted_rand"] == 0 and true["adjusted_rand"] > 0.8
    assert true["log_likelihood"] > fitted["log_likelihood"] - 0.3 > one["log_likelihood"]


def test_floors_of_trajectories(tiny_run):
    """A system moves away from its first state, and moves as from the nearest first state that was seen."""
    settings = {"length": 12, "train_size": 480, "test_size": 96, "environments": 2}
    _, run = tiny_run("dynamics/mixer", **{"evaluation.floor": True, "data.kwargs": {"dynamics": settings}})
    rows = evaluate([run])
    assert [(row.identity.label, row.identity.role) for row in rows[1:]] == [
        ("first state stays", "floor"),
        ("1-nearest neighbour", "floor"),
        ("true system", "ceiling"),
    ]
    network, stays, nearest, true = map(values, rows)
    assert true["trajectory_error"] < 1e-9  # of first states that were rounded to float32
    assert nearest["trajectory_error"] < 0.5 * stays["trajectory_error"]
    assert network["trajectory_error"] == network["loss"] and 1 / 6 <= network["purity"] <= 1
    assert network["skipped_updates"] is not None and network["latency_p50"] > 0


def test_streams_have_floors_further_tests_and_a_state(tiny_run):
    """Three test sets, each with first and last accuracy; the cache is h and c of two layers, and three lengths."""
    settings = {"length": 20, "tasks": 4, "test_size": 100, "spread": 0.1}
    _, run = tiny_run(
        "fewshot/gpicl",
        **{"evaluation.floor": True, "data.kwargs": {"in_context": settings}, "model.mixer": "lstm"},
        **{"evaluation.decode_length": 30},
    )
    rows = evaluate([run])
    assert [(row.identity.label, row.identity.role) for row in rows[1:]] == [
        ("1-nearest neighbour in context", "floor"),
        ("nearest centroid in context", "floor"),
        ("chance", "floor"),
    ]
    for name in ("accuracy", "first_accuracy", "last_accuracy", "loss"):
        found = [m.conditions for m in rows[0].measurements if m.name == name]
        others = {"tested": "seen"}, {"tested": "other", "other_base": "digits"}
        assert found == [{"examples": 100, **more} for more in ({}, *others)]
    (cache,) = (m for m in rows[0].measurements if m.name == "cache_bytes")
    assert cache.value == 4 * (2 * 2 * 16 + 3) and cache.conditions == {"length": 20}
    block = 2 * 16 * 64 + 64 + 16 * 16 + (16 * 64 + 64) + (64 * 16 + 16) + 2 * 32
    assert values(rows[0])["parameters"] == (21 * 16 + 16) + 2 * block + 32 + (16 * 5 + 5)
    (decoded,) = (m for m in rows[0].measurements if m.name == "decode_p50")
    assert decoded.value > 0 and decoded.conditions == {"batch": 1, "length": 30}
    for floor in rows[1:]:  # on all three test sets
        for name in ("accuracy", "first_accuracy", "last_accuracy"):
            found = [{"examples": 100, **m.conditions} for m in floor.measurements if m.name == name]
            assert found == [{"examples": 100, **more} for more in ({}, *others)]
    for floor in rows[1:3]:  # clusters this tight are known once they were seen; pictures of digits are not
        of = {test: {} for test in ("unseen", "seen", "other")}
        for m in floor.measurements:
            of[m.conditions.get("tested", "unseen")][m.name] = m.value
        for test in ("unseen", "seen"):
            assert of[test]["last_accuracy"] > 0.9 > of[test]["accuracy"] > 0.6 > of[test]["first_accuracy"] + 0.2
        assert of["other"]["accuracy"] < of["unseen"]["accuracy"] and of["other"]["first_accuracy"] < 0.4
    assert "last accuracy" in render(rows)


def test_names():
    from lissom.training.config import load_recipe, overridden

    config = overridden(load_recipe("configs/language/recall_lm.py"), [("model.width", "96"), ("seed", "4")])
    assert overrides_of(config) == {"model.width": 96}
    # A field may be asked for though it is the recipe's.
    named = overrides_of(config, ["optim.learning_rate"])
    assert named == {"model.width": 96, "optim.learning_rate": config.optim.learning_rate}
    # What the recipe has no entry for is named as it was given.
    deep = overridden(config, [("model.mixer_kwargs.window.window", "7")])
    assert overrides_of(deep) == {"model.width": 96, "model.mixer_kwargs.window.window": 7}
    assert task_name(config) == "sequences(length=64, pairs=8, task=recall, train_size=50000, vocab_size=64)"


def test_profile(tmp_path):
    from lissom.train import train
    from lissom.training.config import load_recipe, overridden

    config = overridden(load_recipe("configs/vision/mnist1d_cnn.py:tiny"), [("mesh.data", 1)])
    train(config, tmp_path / "run", profile=1)
    assert list((tmp_path / "run" / "profile").rglob("*.xplane.pb"))


def test_a_row_is_of_the_machine_that_measured_and_says_who_trained(tiny_run):
    _, run = tiny_run("vision/mnist1d_cnn")
    for row in evaluate([run]):
        assert row.trained is None  # the same machine and sources: there is nothing to tell
    recorded = json.loads((run / "provenance.json").read_text())
    machine = {"cpu": "Z80", "cores": 1, "memory_bytes": 65536, "accelerator": "H900", "accelerators": 8}
    other = {**recorded, "commit": "c0ffee" * 6 + "abcd", "dirty": True, "hardware": machine, "date": "1976-07-01"}
    (run / "provenance.json").write_text(json.dumps(other))
    here, rows = json.loads(json.dumps(dataclasses.asdict(row.provenance))), evaluate([run])
    for row in rows:
        found = json.loads(json.dumps(dataclasses.asdict(row.provenance)))
        assert {**found, "date": 0} == {**here, "date": 0} and found["date"] > "2020"
        assert row.trained.hardware == machine and row.trained.dirty and row.trained.date == "1976-07-01"
    text = render(rows)
    assert "train seconds, 8 x H900 [" in text
    assert f"latency p50, batch 1, {here['hardware']['cpu']}" in text
    assert text.splitlines()[2].startswith(here["hardware"]["cpu"])
    assert "trained at commit c0ffeec0f with changes (measured at" in text and "on 8 x H900" in text


BYTES = """
import hashlib
import numpy as np
from lissom.data.dataset import ArraySource, Dataset

def text():
    rows = np.random.default_rng(0).integers(0, 256, (64, 17)).astype(np.uint8)
    info = {"vocab_size": 256, "input_shape": (16,), "sha256": hashlib.sha256(rows.tobytes()).hexdigest()}
    return Dataset("bytes", "tokens", *[ArraySource("tokens", {"text": rows})] * 2, info)
"""


def test_the_checksum_of_the_data_is_in_the_row(tiny_run, tmp_path, monkeypatch):
    (tmp_path / "bytes_of_mine.py").write_text(BYTES)
    monkeypatch.syspath_prepend(tmp_path)
    _, run = tiny_run("language/stdlib_lm", **{"data.name": "bytes_of_mine:text", "evaluation.floor": True})
    facts = json.loads((run / "facts.json").read_text())
    rows = evaluate([run])
    assert {row.identity.role for row in rows} == {"variant", "floor"}
    assert all(row.provenance.data == {"sha256": facts["sha256"]} and row.trained is None for row in rows)
    # As with another patch version of Python, whose library is another text: what was trained on is not what is
    # measured on.
    (run / "facts.json").write_text(json.dumps({**facts, "sha256": "0" * 64}))
    rows = evaluate([run])
    assert rows[0].provenance.data == {"sha256": facts["sha256"]} and rows[0].trained.data == {"sha256": "0" * 64}
    assert f"on data of sha256 000000000 (measured on sha256 {facts['sha256'][:9]})" in render(rows)


def test_meta_tokens_are_of_the_method_and_lengths_are_of_the_row(tiny_run):
    """With and without in one table; what was judged at another length says so; decoding and FLOPs are of whole
    sequences, meta-tokens among them."""
    few = {"data.kwargs.sequences.train_size": 64, "data.kwargs.sequences.test_size": 64}
    few |= {"evaluation.decode_length": 45}
    _, one = tiny_run("language/meta_tokens_lm", "one", **few)
    _, two = tiny_run("language/meta_tokens_lm", "two", **few, **{"data.meta_tokens": "none"})
    rows = evaluate([one, two])
    assert len({row.identity.task for row in rows}) == 1
    assert [row.identity.transform for row in rows] == [None, "yarn", "zero_meta_positions"] * 2
    found = {(m.name, m.conditions.get("length")): m.value for m in rows[0].measurements}
    assert {("token_accuracy", None), ("token_accuracy", 30), ("loss", None), ("loss", 30)} <= set(found)
    assert found["loss", None] != found["loss", 30]
    # 15 tokens, a meta-token behind each of 3 lists and one in front of each of 2 questions.
    assert ("cache_bytes", 15 + 3 + 2) in found and ("decode_p50", 45) in found
    plain = {(m.name, m.conditions.get("length")): m.value for m in rows[3].measurements}
    assert ("cache_bytes", 15) in plain and plain["flops", None] < found["flops", None]
    assert "token accuracy, length 30, tokens 128 [%]" in render(rows)


def test_learned_positions_as_many_as_the_data_has(tiny_run):
    few = {"data.kwargs.sequences.train_size": 64, "data.kwargs.sequences.test_size": 64}
    _, run = tiny_run("language/recall_lm", **few, **{"model.learned_positions": 64, "evaluation.transforms": ()})
    found = values(evaluate([run], floors=False)[0])
    # Lengths of two layers and of the network stand beside.
    assert found["cache_bytes"] == 64 * found["cache_bytes_per_token"] + 3 * 4 and found["decode_p50"] > 0


def test_layers_without_a_form_are_said_in_a_sentence(tiny_run):
    from lissom.training.errors import UserError

    for mixer, words in {"bilevel": "is for images", "neighborhood": "with a stride have no causal form"}.items():
        kwargs = {"neighborhood": {"stride": 2}} if mixer == "neighborhood" else {"bilevel": {}}
        with pytest.raises(UserError, match=words):
            tiny_run("language/recall_lm", **{"model.mixer": mixer, "model.mixer_kwargs": kwargs})


def test_a_test_set_for_another_network_is_refused(tiny_run):
    from lissom.training.errors import UserError

    other = ({"vocab_size": 80},)
    with pytest.raises(UserError, match="vocab_size 81; the network is for 25"):
        tiny_run("language/meta_tokens_lm", **{"evaluation.data": other})
    with pytest.raises(UserError, match=r"holds \{'length': 30\} twice"):
        tiny_run("language/meta_tokens_lm", **{"evaluation.data": ({"length": 30}, {"length": 30})})


def test_corrupted_test_sets_and_their_mean(tiny_run, tmp_path):
    """Each is a test set of the row; tables show their mean, and the difference of means to the first variant."""
    few = {"data.kwargs.mnist1d.train_size": 200, "data.kwargs.mnist1d.test_size": 100}
    of = {"evaluation.corruptions": ("blur", "erase"), "evaluation.severities": (2, 5)}
    runs = [tiny_run("vision/mnist1d_cnn", name, **few, **of, seed=seed)[1] for seed, name in enumerate("ab")]
    rows = evaluate(runs, variants={str(run): run.name for run in runs}, floors=False)
    for row in rows:
        found = {
            (m.conditions["corruption"], m.conditions["severity"]): m
            for m in row.measurements
            if m.name == "accuracy" and "corruption" in m.conditions
        }
        assert list(found) == [("blur", 2), ("blur", 5), ("erase", 2), ("erase", 5)]
        assert all(m.conditions["examples"] == 100 for m in found.values())
        (mean,) = (m for m in row.measurements if m.name == "corruption_accuracy")
        assert mean.value == pytest.approx(sum(m.value for m in found.values()) / 4)
        assert mean.conditions == {"of": "blur erase", "severities": "2 5", "examples": 100}
    text, head = render(rows), "corruption accuracy, examples 100, of blur erase, severities 2 5 [%]"
    assert head in text and "corruption accuracy" in text.partition(head)[2] and "corruption blur" not in text
    write(rows, tmp_path / "out")
    assert "corruption=blur examples=100 severity=5" in (tmp_path / "out" / "table.csv").read_text()


def test_tokens_are_not_corrupted(tiny_run):
    with pytest.raises(UserError, match="of images and signals, and dataset 'sequences' is of kind 'tokens'"):
        tiny_run("language/recall_lm", **{"evaluation.corruptions": ("blur",)})


def damage_checkpoint(run):
    """Turns a byte of every file that holds an array."""
    for file in (run / "checkpoints").rglob("*"):
        if file.is_file() and "/d/" in str(file):
            content = bytearray(file.read_bytes())
            content[len(content) // 2] ^= 0xFF
            file.write_bytes(content)


def rewrite(name, change):
    return lambda run: (run / name).write_text(change((run / name).read_text()))


def edit(name, **values):
    return rewrite(name, lambda text: json.dumps({**json.loads(text), **values}))


def without_dataset(run):
    config = json.loads((run / "config.json").read_text())
    config["data"]["name"] = "gone_dataset"
    (run / "config.json").write_text(json.dumps(config))


DAMAGES = {
    "config_cut": (rewrite("config.json", lambda text: text[:99]), "config.json can't be read"),
    "config_empty": (rewrite("config.json", lambda _: "{}"), "config.json can't be read"),
    "config_list": (rewrite("config.json", lambda _: "[1]"), "config.json can't be read"),
    "config_model": (rewrite("config.json", lambda text: text.replace('"cnn"', '"gone"')), "unknown model 'gone'"),
    "facts_cut": (rewrite("facts.json", lambda text: text[:30]), "facts.json can't be read"),
    "facts_list": (rewrite("facts.json", lambda _: "[]"), "facts.json can't be read"),
    "facts_gone": (lambda run: (run / "facts.json").unlink(), "facts.json can't be read"),
    "facts_steps": (edit("facts.json", steps=None), "facts.json can't be read"),
    "facts_classes": (edit("facts.json", classes=7), "with classes 7, which by now is 10"),
    "provenance_cut": (rewrite("provenance.json", lambda text: text[:-3]), "provenance.json can't be read"),
    "provenance_list": (rewrite("provenance.json", lambda _: "[]"), "provenance.json can't be read"),
    "provenance_other": (edit("provenance.json", hardware=3), "provenance.json can't be read"),
    "provenance_gone": (lambda run: (run / "provenance.json").unlink(), "provenance.json can't be read: No such file"),
    "metrics_gone": (lambda run: (run / "metrics.jsonl").unlink(), "metrics.jsonl can't be read: No such file"),
    "metrics_middle": (rewrite("metrics.jsonl", lambda text: text[9:]), "metrics.jsonl can't be read: line 1"),
    "metrics_word": (rewrite("metrics.jsonl", lambda text: text + "[]\n"), "is no record of a step"),
    "metrics_times": (
        rewrite("metrics.jsonl", lambda text: text.replace("compile_seconds", "seconds")),
        "metrics.jsonl can't be read",
    ),
    "checkpoint": (damage_checkpoint, "has no whole checkpoint"),
    "checkpoint_gone": (lambda run: shutil.rmtree(run / "checkpoints"), "it has no checkpoint"),
    "dataset": (without_dataset, "gone_dataset"),
}


def test_damaged_runs_are_skipped_and_said(tiny_run, tmp_path):
    _, good = tiny_run("vision/mnist1d_cnn", "good")
    for name, (damage, _) in DAMAGES.items():
        shutil.copytree(good, tmp_path / "runs" / name)
        damage(tmp_path / "runs" / name)
    shutil.copytree(good, tmp_path / "runs" / "good")
    said = []
    rows = evaluate(find_runs([str(tmp_path / "runs" / "*")], said.append), skip=said.append)
    assert {row.identity.recipe for row in rows} == {"configs/vision/mnist1d_cnn.py:tiny"} and len(rows) == 2
    assert len(said) == len(DAMAGES)
    for name, (_, words) in DAMAGES.items():
        (line,) = [line for line in said if line.startswith(f"skipped {tmp_path / 'runs' / name}:")]
        assert words in line and "\n" not in line
    # Where one run is asked for, as train.py and compare.py do, it is an error; and so is none that is left.
    for name in ("dataset", "provenance_cut", "metrics_middle"):
        with pytest.raises(ValueError, match=DAMAGES[name][1]):
            evaluate([tmp_path / "runs" / name])
    with pytest.raises(UserError, match="none of 1 runs can be measured"):
        evaluate([tmp_path / "runs" / "provenance_cut"], skip=said.append)


def test_a_line_that_a_kill_cut_off_is_tolerated(tmp_path):
    whole = [{"step": 1, "kind": "train", "loss": 2.0}, {"step": 2, "kind": "test", "loss": 1.0}]
    text = "".join(json.dumps(line) + "\n" for line in whole)
    for end in ("", '{"step": 3, "ki', "{", json.dumps(whole[0])[:-1]):
        (tmp_path / "metrics.jsonl").write_text(text + end)
        assert read_metrics(tmp_path) == whole
    (tmp_path / "metrics.jsonl").write_text(text + '{"step": 3, "ki\n')
    with pytest.raises(UserError, match="line 3 is no record"):
        read_metrics(tmp_path)


def test_out_is_checked_before_anything_is_measured(tmp_path):
    (tmp_path / "file").write_text("mine")
    for out in ("file", "file/deep/er"):
        with pytest.raises(UserError, match="file is a file"):
            check_writable(tmp_path / out, "--out")
    # The kernel's own directory refuses everybody, root too.
    with pytest.raises(UserError, match="--out=/proc/new can't be written"):
        check_writable("/proc/new", "--out")
    check_writable(tmp_path / "a" / "b", "--out")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_the_command_line_skips_and_refuses(tiny_run, tmp_path):
    _, run = tiny_run("vision/mnist1d_cnn", "runs/one", **{"evaluation.transforms": ()})
    shutil.copytree(run, tmp_path / "runs" / "two")
    (tmp_path / "runs" / "two" / "provenance.json").write_text("{")
    (tmp_path / "file").write_text("mine")
    command = lambda *words: subprocess.run(
        [sys.executable, str(ROOT / "eval.py"), *words], cwd=tmp_path, capture_output=True, text=True, env=os.environ
    )
    done = command("--runs=runs/*", "--out=out")
    assert done.returncode == 0, done.stderr
    assert "skipped runs/two: runs/two/provenance.json can't be read" in done.stderr
    assert len((tmp_path / "out" / "rows.jsonl").read_text().splitlines()) == 1
    done = command("--runs=runs/one", "--out=file")
    assert done.returncode == 2 and done.stderr == "error: --out=file must be a directory, and file is a file\n"


def test_floors_labels_and_patterns(tiny_run, capsys):
    """Floors where one run wants them, in any order; labels keep overrides; patterns without a match are said."""
    plain = {"evaluation.transforms": ()}
    _, one = tiny_run("vision/digits_vit", "one", **plain, **{"model.mixer": "none"})
    _, two = tiny_run("vision/digits_vit", "two", **plain, **{"model.mixer": "none", "log.every": 2})
    _, three = tiny_run("vision/digits_vit", "three", **plain, **{"evaluation.floor": True})
    for runs in ([one, two, three], [three, two, one]):
        rows = evaluate(runs)
        assert sum(row.identity.role == "floor" for row in rows) == 2
        labels = {row.identity.label for row in rows if row.identity.role == "variant"}
        assert sum("model.mixer=none" in label and "log.every" not in label for label in labels) == 2
    said = []
    assert find_runs([str(one), "/nowhere/*"], said.append) == [one]
    assert said == ["skipped /nowhere/*: it matches nothing"]


def test_a_staged_run_is_named_by_what_was_given(tiny_run):
    stages = ({"name": "a", "duration": 2}, {"name": "b", "duration": 1, "overrides": {"optim.learning_rate": 0.5}})
    _, run = tiny_run("vision/digits_vit", stages=stages)
    overrides = evaluate([run], floors=False)[0].identity.overrides
    assert "optim.learning_rate" not in overrides and "stages" in overrides
