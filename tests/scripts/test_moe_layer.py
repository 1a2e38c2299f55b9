"""The measurement of mixtures beside a dense layer: what it writes, and what it says of wrong flags."""

import pytest

from lissom.evaluation.rows import read_rows
from lissom.training.errors import UserError
from scripts import moe_layer


def test_tiny(tmp_path, monkeypatch):
    few = ("dense", "top_k", "soft", "hash")
    monkeypatch.setattr(moe_layer, "VARIANTS", {name: moe_layer.VARIANTS[name] for name in few})
    moe_layer.run([16], tokens=64, repeats=3, tiny=True, out=tmp_path)
    rows = read_rows(tmp_path / "rows.jsonl")
    assert [row.identity.variant for row in rows] == list(few)
    values = [{m.name: m.value for m in row.measurements} for row in rows]
    assert values[0]["speedup"] == 1
    for row in values:
        assert row["speedup"] == pytest.approx(values[0]["latency_p50"] / row["latency_p50"])
    # Two of eight experts of half the hidden width: four times the dense layer's parameters (of a gated layer of width
    # 16, 43 and 21 hidden features), and the router, which `hash` has none of.
    assert values[0]["parameters"] == 3 * 16 * 43 and values[3]["parameters"] == 8 * 3 * 16 * 21
    assert values[1]["parameters"] == values[3]["parameters"] + 16 * 8
    assert "speedup" in (tmp_path / "table.md").read_text()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"widths": []}, "--widths= must hold one number or more"),
        ({"tokens": 0}, "--tokens=0 must be at least 1"),
        ({"tokens": 200}, "--tokens=200 must be a multiple of 128"),
        ({"experts": 6}, "--experts=6 must be a power of 2"),
        ({"repeats": 1}, "--repeats=1 must be at least 2"),
    ],
)
def test_wrong_flags_give_a_sentence(settings, words):
    with pytest.raises(UserError, match=words):
        moe_layer.run(**{"widths": [16], "tiny": True, **settings})
