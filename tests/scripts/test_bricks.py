"""scripts/bricks.py on a tiny dense decoder."""

import pytest

from lissom.evaluation.rows import read_rows
from lissom.training.errors import UserError
from scripts import bricks


def test_rows_of_a_dense_run(tiny_run, tmp_path):
    _, path = tiny_run("language/read_me", "dense", **{"stages": (), "model.ffn_kwargs.swiglu.expansion": 6.0})
    rows = bricks.run([path], bricks=4, ks=[1, 4], batches=1, restarts=3, out=tmp_path / "out")
    assert [row.identity.variant for row in read_rows(tmp_path / "out" / "rows.jsonl")] == [
        "dense",
        "coactivation",
        "weights",
        "random",
    ]
    dense = rows[0].measurements[0].value
    for row in rows[1:]:
        found = {(m.name, *m.conditions.values()): m.value for m in row.measurements}
        for router in ("learned", "centre", "oracle"):
            # With all bricks it is the network that it was.
            assert found["loss", router, 4] == pytest.approx(dense, abs=1e-5)
        assert 0 < found["coactive",] < 1 and 0.25 <= found["specialisation",] <= 1
        assert found["router_agreement", "learned", 4] == 1


def test_settings_are_checked():
    with pytest.raises(UserError, match=r"--k=9 must be at least 1 and at most --bricks=4"):
        bricks.run([], bricks=4, ks=[9])
    with pytest.raises(UserError, match=r"--bricks=1 must be at least 2"):
        bricks.run([], bricks=1, ks=[1])
    with pytest.raises(UserError, match=r"--restarts=1 at least 2"):
        bricks.run([], restarts=1)
