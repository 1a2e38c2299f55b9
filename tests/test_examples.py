"""The example plug-in works from the command line, and its mistakes get a sentence."""

import pytest


def test_plug_in(tiny_run):
    name = "examples.mean_mixer:MeanMixer"
    kwargs = {"MeanMixer": {"scale": 0.5}}
    result, _ = tiny_run("vision/digits_vit", **{"model.mixer": name, "model.mixer_kwargs": kwargs})
    assert result["step"] == 3
    with pytest.raises(ValueError, match=r"no setting 'scal'.*did you mean 'scale'"):
        tiny_run("vision/digits_vit", "b", **{"model.mixer": name, "model.mixer_kwargs": {"MeanMixer": {"scal": 0.5}}})
    with pytest.raises(ValueError, match="has no 'MeanMixr'"):
        tiny_run("vision/digits_vit", "c", **{"model.mixer": "examples.mean_mixer:MeanMixr"})
