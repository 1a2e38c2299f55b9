"""The example plug-in works from the command line, and its mistakes get a sentence."""

import pathlib
import re

import pytest

from lissom.training.errors import UserError


def test_plug_in(tiny_run):
    name = "examples.mean_mixer:MeanMixer"
    kwargs = {"MeanMixer": {"scale": 0.5}}
    result, _ = tiny_run("vision/digits_vit", **{"model.mixer": name, "model.mixer_kwargs": kwargs})
    assert result["step"] == 3
    with pytest.raises(ValueError, match=r"no setting 'scal'.*did you mean 'scale'"):
        tiny_run("vision/digits_vit", "b", **{"model.mixer": name, "model.mixer_kwargs": {"MeanMixer": {"scal": 0.5}}})
    with pytest.raises(ValueError, match="has no 'MeanMixr'"):
        tiny_run("vision/digits_vit", "c", **{"model.mixer": "examples.mean_mixer:MeanMixr"})


def test_a_mixer_without_a_causal_form_is_refused_by_a_decoder(tiny_run):
    with pytest.raises(UserError, match="MeanMixer reads all tokens: it has no causal form"):
        tiny_run("language/recall_lm", **{"model.mixer": "examples.mean_mixer:MeanMixer"})


def test_the_examples_of_ops_run_as_they_stand():
    """Pasted one after the other, and the masks of the first are those that its comments say."""
    text = (pathlib.Path(__file__).parent.parent / "docs" / "ops.md").read_text()
    blocks, names = re.findall(r"```python\n(.*?)```", text, re.DOTALL), {}
    assert len(blocks) == 5
    for block in blocks:
        exec(block, names)
    union = names["BlockSparse"](names["blocks"], names["count"]) | names["KeyColumns"](names["columns"])
    seen = union.dense(256, 256)[0, 0].sum(1)
    assert seen[0] == 128 and seen[255] == 256
    assert not (names["ids"][0, 192:] >= 0).any()
    assert names["y"].shape == (6, 8)
