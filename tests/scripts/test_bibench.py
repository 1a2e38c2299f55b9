"""Scores of rows on disk."""

import pytest

from lissom.evaluation.rows import read_rows
from lissom.training.errors import UserError
from scripts import bibench

ROWS = str(bibench.pathlib.Path(__file__).parents[2] / "results" / "mnist1d_binary" / "rows.jsonl")


def test_a_table_of_each_comparison_and_of_all(tmp_path, capsys):
    found = bibench.run([ROWS], out=str(tmp_path / "one"))
    stored = [row for row in read_rows(ROWS) if row.identity.transform == "packed"]
    assert len(found) == len(stored) >= 30 and read_rows(tmp_path / "one" / "rows.jsonl") == found
    assert "bibench score, tracks accuracy" in capsys.readouterr().out
    insta = [m.value for r in found if r.identity.label == "mode=insta" for m in r.measurements[:1]]
    assert sum(insta) / 3 == pytest.approx(0.87, abs=0.005)


@pytest.mark.parametrize(
    ("files", "settings", "words"),
    [
        (["nowhere.jsonl"], {}, "nowhere.jsonl can't be read: No such file"),
        ([__file__], {}, "line 1, is not a row"),
        ([ROWS], {"reference": "int8"}, "no variant 'int8' to be relative to"),
        ([ROWS, ROWS], {}, "names one file twice"),
        (["/dev/null"], {}, "--rows=/dev/null: there are no rows"),
    ],
)
def test_mistakes_are_one_sentence(files, settings, words):
    with pytest.raises(UserError, match=words):
        bibench.run(files, **settings)
