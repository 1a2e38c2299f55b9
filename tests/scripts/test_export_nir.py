"""The file of a trained run, read back by the package and judged."""

import pytest

from lissom.training.errors import UserError
from scripts import export_nir

nir = pytest.importorskip("nir")


def test_a_run_is_written_and_read_back(tiny_run, tmp_path, capsys):
    _, path = tiny_run("vision/digits_snn")
    found = export_nir.run(path, tmp_path / "out" / "network.nir", dt=0.5)
    assert found["examples"] == 360 and found["agreement"] > 0.97 and 0 <= found["accuracy"] <= 1
    names = [type(node).__name__ for node in nir.read(tmp_path / "out" / "network.nir").nodes.values()]
    assert sorted(set(names)) == ["Affine", "Conv2d", "Flatten", "Input", "LIF", "Output"]
    assert "read back it answers" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"dt=0\.0 must be above 0"):
        export_nir.run(path, tmp_path / "other.nir", dt=0.0)


def test_another_network_is_refused(tiny_run, tmp_path):
    _, path = tiny_run("vision/digits_resnet")
    with pytest.raises(UserError, match="holds no plain spiking network"):
        export_nir.run(path, tmp_path / "other.nir")
