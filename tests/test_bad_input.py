"""What a user gets wrong is answered in one sentence, exit code 2, before jax is imported where that can be."""

import json
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
VIT = "--config=configs/vision/digits_vit.py:tiny"
STREAM = "--config=configs/vision/digits_stream.py:tiny"
LM = "--config=configs/language/recall_lm.py:tiny"
SETS = "--config=configs/sets/gaussian_mixtures.py:tiny"
SYSTEMS = "--config=configs/dynamics/mixer.py:tiny"


def run(script, *args, cwd, **env):
    import os

    return subprocess.run(
        [sys.executable, str(ROOT / script), *args],
        cwd=cwd,
        capture_output=True,
        text=True,
        env={**os.environ, **env},
    )


# jax is made unimportable: these answers must not need it.
EARLY = [
    ((), ["--config=RECIPE is missing", "configs/vision/digits_vit.py", "configs/language/stdlib_lm.py"]),
    (("--config=configs/vision/digits_vitt.py",), ["no recipe", "digits_vit.py"]),
    ((VIT + "y",), ["unknown mode 'tinyy'", "tiny"]),
    ((VIT, "--config.model.mixerr=none"), ["mixerr", "did you mean 'mixer'"]),
    ((VIT, "--config.model.mixer=attentoin"), ["unknown mixer 'attentoin'", "did you mean 'attention'"]),
    ((SETS, "--config.model.encoder=umcb"), ["unknown encoder 'umcb'", "did you mean 'umbc'"]),
    ((SYSTEMS, "--config.model.gate=mixr"), ["unknown gate 'mixr'", "did you mean 'mixer'"]),
    ((VIT, "--config.optim.name=adam"), ["unknown optimizer 'adam'", "adamw"]),
    ((VIT, "--config.train.steps=three"), ["train.steps='three'", "whole number"]),
    ((VIT, "--config.optim.accumulate=3"), ["multiple of", "accumulate=3"]),
    ((VIT, "--config.train=5"), ["config.train='5'", "table of settings"]),
    ((VIT, "--config.train.epochs=many"), ["epochs='many'", "is not a number"]),
    ((VIT, "--config.stages=x"), ["config.stages holds 'x'"]),
    ((VIT, "--config.model.dtype=floaty"), ["dtype='floaty'", "bfloat16"]),
    ((VIT, "--config.optim.decay=["), ["optim.decay='['", "no pattern"]),
    ((VIT, "--config.optim.warmup=3"), ["warmup=3.0", "at most 1"]),
    ((VIT, "--config.evaluation.decode_length=-1"), ["decode_length", "at least 0"]),
    ((LM, "--config.evaluation.decode_length=1"), ["decode_length=1 must be 0 or at least 2"]),
    (
        (LM, "--config.evaluation.decode_length=4", "--config.model.name=block_transformer"),
        ["decode_length=4 must be 0 or at least 5"],
    ),
    (
        (LM, "--config.evaluation.decode_length=65", "--config.model.learned_positions=64"),
        ["decode_length=65", "at most", "learned_positions=64"],
    ),
    ((VIT, "--config.evaluation.latency_batches=0,1"), ["latency_batches holds 0", "at least 1"]),
    ((VIT, "--config.evaluation.corruptions=blurr"), ["no corruption 'blurr'", "did you mean 'blur'"]),
    ((VIT, "--config.evaluation.severities=3,6"), ["1, 2, 3, 4 or 5, not 6"]),
    ((VIT, "--config.evaluation.severities=0"), ["severities holds 0", "at least 1"]),
    ((VIT, "--config.evaluation.corruptions=blur", "--config.evaluation.severities=()"), ["at least one severity"]),
    ((VIT, "--config.checkpoint.keep=0"), ["keep=0", "at least 1"]),
    ((VIT, "--config.train.steps=2", "--config.train.epochs=1"), ["train.steps", "train.epochs", "contradict"]),
    ((VIT, "--config.seed=1e30"), ["seed=", "at most"]),
    ((VIT, "--config.model.mixer_kwargs={'attention': 5}"), ["mixer_kwargs holds 5", "table of settings"]),
    ((VIT, "--config.data.kwargs={'digits': 5}"), ["data.kwargs holds 5"]),
    ((VIT, "--config.data.order=by_clas"), ["order='by_clas'", "did you mean 'by_class'"]),
    ((VIT, "--config.data.task_steps=5"), ["task_steps=5 does nothing", "order='by_class'"]),
    ((VIT, "--config.data.replay=2"), ["replay=2.0", "at most 1"]),
    ((STREAM, "--config.data.replay=0.5"), ["replay=0.5", "replay_size=0", "must be set together"]),
    ((STREAM, "--config.data.classes_per_task=0"), ["classes_per_task=0", "at least 1"]),
    (
        (STREAM, "--config.stages=({'duration': 1.0, 'overrides': {'data.batch_size': 8}},)"),
        ["stages[0] overrides data.batch_size", "cuts tasks"],
    ),
    ((VIT, "--nonsense=1"), ["nonsense"]),
    ((VIT, "stray"), ["'stray' is no flag"]),
]


@pytest.mark.parametrize("args,words", EARLY, ids=lambda v: str(v)[:60])
def test_before_jax(args, words, tmp_path):
    (tmp_path / "jax.py").write_text("raise SystemExit('jax was imported')")
    done = run("train.py", *args, cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in done.stderr
    assert not (tmp_path / "runs").exists()


SMALL_STROKES = ("size=16", "steps=2", "train_size=40", "test_size=20")
LATE = [
    (("--config.mesh.data=16",), ["needs 16 devices"]),
    (("--config.mesh.data=8", "--config.data.batch_size=12"), ["batch_size=12", "multiple of 8"]),
    (("--config.model.mixer_kwargs.window.windoww=3",), ["windoww", "window"]),
    (("--config.model.heads=3",), ["heads=3"]),
    (("--config.model.size=",), ["needs width", "depth", "config.model.size"]),
    (("--config.objective=language_modelling",), ["tokens data", "digits", "image"]),
    (("--config.objective=mixture_likelihood",), ["learns from set data", "digits", "image"]),
    (("--config.model.name=in_context", "--config.model.size=tiny"), ["in_context", "needs features", "digits"]),
    (("--config.objective=trajectories",), ["learns from trajectory data", "digits", "image"]),
    (("--config.objective=distillation",), ["distillation", "teacher"]),
    (("--config.model.mixer_kwargs.attention.implementation=cudnn",), ["cudnn", "CUDA plugin"]),
    (("--config.model.mixer_kwargs.attention.implementation=flash",), ["has no 'flash'"]),
    (("--config.mesh.data=1", "--config.mesh.tensor=4"), ["heads", "2 entries", "4 shards"]),
    (("--config.data.name=mnist1d",), ["reads examples [rows, columns, channels]", "[40, 1]"]),
    (
        ("--config.data.name=moving_digits", "--config.data.kwargs.moving_digits.tau=2.0"),
        ["tau=2.0 belongs to binning='surface', and binning is 'counts'"],
    ),
    (
        ("--config.data.name=pen_strokes", *(f"--config.data.kwargs.pen_strokes.{s}" for s in SMALL_STROKES)),
        ["reads examples [rows, columns, channels]", "[2, 16, 16, 1]"],
    ),
    (("--config.data.name=mnist99",), ["mnist99"]),
    (("--config.data.name=json:dumps",), ["json:dumps", "cannot be called"]),
    (("--config.model.ffn_kwargs.mlp.expansion=inf",), ["expansion='inf'", "must be a number"]),
    (("--config.evaluation.transforms=({'name': 'int8_weights', 'rules': [('nosuch', {})]},)",), ["matches no layer"]),
    (("--config.init_from=nowhere",), ["nowhere"]),
    (("--config.data.order=by_class", "--config.train.epochs=2"), ["the stream by class has", "task_steps"]),
    (
        ("--config.data.order=by_class", "--config.data.replay=0.01", "--config.data.replay_size=5"),
        ["replay=0.01 of batch_size=16 is 0 rows"],
    ),
]


@pytest.mark.parametrize("args,words", LATE, ids=lambda v: str(v)[:60])
def test_train(args, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    from lissom.train import train
    from lissom.training import flags as command_line
    from lissom.training.errors import one_sentence

    with pytest.raises(SystemExit) as error, one_sentence():
        pairs = [(word.partition("=")[0][len("--config.") :], word.partition("=")[2]) for word in args]
        _, config = command_line.config_from([("", VIT.partition("=")[2]), *pairs])
        train(config, tmp_path / "run")
    assert error.value.code == 2
    said = capsys.readouterr().err
    for word in words:
        assert word in said.splitlines()[-1]
    if "init_from" not in args[0]:
        assert not (tmp_path / "run").exists()


def test_another_config_stands_there(tmp_path):
    from lissom.training.config import load_recipe, overridden
    from lissom.training.errors import UserError
    from lissom.training.runs import claim, stands

    one = load_recipe(VIT.partition("=")[2])
    run = tmp_path / "run"
    assert stands(run, one, False) is False
    claim(run, one, False)
    assert stands(run, one, False) is True and stands(run, one, True) is False
    assert stands(run, overridden(one, [("log.every", 7), ("checkpoint.every", 5)]), False) is True
    other = overridden(one, [("seed", "1")])
    with pytest.raises(UserError, match=r"seed: 0 -> 1.*--overwrite"):
        stands(run, other, False)
    assert json.loads((run / "config.json").read_text())["seed"] == 0
    assert stands(run, other, True) is False
    (run / "checkpoints").mkdir()
    (run / "config.json").unlink()
    with pytest.raises(UserError, match=r"no config\.json"):
        stands(run, one, False)
    claim(run, one, True)
    assert not (run / "checkpoints").exists()


def test_eval_finds_nothing(tmp_path):
    done = run("eval.py", "--runs=nothing/*", cwd=tmp_path)
    assert done.returncode == 2 and "matches nothing" in done.stderr and done.stderr.count("\n") == 1


def test_run_without_checkpoint(tmp_path, capsys):
    from lissom.eval import find_runs
    from lissom.training.config import load_recipe
    from lissom.training.errors import UserError
    from lissom.training.runs import claim

    claim(tmp_path / "run", load_recipe(VIT.partition("=")[2]), False)
    (tmp_path / "other").mkdir()
    said = []
    with pytest.raises(UserError, match="no directory with a finished run"):
        find_runs([str(tmp_path / "*")], said.append)
    assert any("no checkpoint" in line for line in said) and any("no run" in line for line in said)


def test_disk_fills(tmp_path):
    """A limit on the size of a file is how a full disk looks to the writer, without a disk to fill."""
    limit = (
        "import resource, signal, runpy, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000)); sys.argv = sys.argv[1:]; "
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    run("train.py", VIT, "--config.model.mixer=none", cwd=tmp_path)  # so that the data is prepared
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            limit,
            str(ROOT / "train.py"),
            VIT,
            "--workdir=full",
            "--config.model.width=64",
            "--config.model.mixer=none",
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2, done.stderr[-3000:]
    assert "could not be written" in done.stderr.strip().splitlines()[-1]
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "body,words",
    [
        ("config.optim.nothing.here = 1", "AttributeError"),
        ("config.nonsense = 1", "nonsense is a field that nothing reads"),
        ("del config.mesh", "config.mesh is missing"),
        ("raise KeyError('x')", "KeyError.*line 4"),
        ("return 5", "gives a int"),
    ],
)
def test_recipe_with_a_mistake(body, words, tmp_path):
    from lissom.training.config import check, load_recipe
    from lissom.training.errors import UserError

    recipe = tmp_path / "mine.py"
    recipe.write_text(
        "from lissom.configs.vision.digits_vit import get_config as base\ndef get_config(arg=''):\n"
        f"    config = base('tiny')\n    {body}\n    return config\n"
    )
    with pytest.raises(UserError, match=words):
        check(load_recipe(str(recipe)))
