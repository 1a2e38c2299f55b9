"""The technique index names what exists, and generated pages are what their sources say."""

import pathlib

import pytest

from scripts.render_docs import BEGIN, END, ROOT, main, pages, problems, read_techniques, replaced, stale

ENTRIES = read_techniques(ROOT)


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry["name"])
def test_everything_named_exists(entry):
    assert problems(entry, ROOT) == []


def test_names_are_unique():
    assert len({entry["name"] for entry in ENTRIES}) == len(ENTRIES)


def test_generated_pages_are_fresh():
    assert stale(ROOT) == []


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("module", "models/gone.py", "module 'models/gone.py' does not exist"),
        ("recipe", "configs/gone.py", "recipe 'configs/gone.py' does not exist"),
        (
            "recipe",
            "configs/language/meta_tokens_lm.py:copyy",
            "meta_tokens_lm.py names no mode 'copyy'",
        ),
        ("recipe", "configs/vision/digits_vit.py mixer=none", "--config.field=value only"),
        ("test", "tests/test_recipes.py::test_gone", "no test tests/test_recipes.py::test_gone"),
        ("rows", "results/gone/rows.jsonl", "does not exist"),
        ("verdict", "proven", "verdict 'proven' is none of"),
        ("verdict", "shown", "exactly where there are no rows"),
        ("area", "elsewhere", "area 'elsewhere' is none of"),
    ],
)
def test_a_wrong_entry_is_named(field, value, words):
    entry = next(entry for entry in ENTRIES if not entry["rows"])
    assert any(words in sentence for sentence in problems({**entry, field: value}, ROOT))


def test_a_missing_field_is_named():
    (sentence,) = problems({"name": "x"}, ROOT)
    assert "the fields are" in sentence


def test_only_what_lies_between_the_markers_changes():
    page = f"a\n{BEGIN}\nold\n{END}\nb\n"
    assert replaced(page, "new") == f"a\n{BEGIN}\n\nnew\n\n{END}\nb\n"
    assert replaced(replaced(page, "x"), "new") == replaced(page, "new")
    with pytest.raises(ValueError, match="must have"):
        replaced("a", "new")


def test_every_table_of_results_is_on_the_page():
    page = (ROOT / "docs" / "results.md").read_text()
    for folder in (ROOT / "results").iterdir():
        assert (f"## {folder.name}\n" in page) == (folder / "table.md").is_file()


def test_check_exits_1_where_a_page_is_stale(tmp_path: pathlib.Path, capsys):
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "techniques.toml").write_text("technique = []\n")
    (tmp_path / "docs" / "support.json").write_text('{"softmax": {"online": {"cpu": {"equals": "2026-01-02"}}}}')
    for page in ("README.md", "docs/support.md"):
        (tmp_path / page).write_text(f"{BEGIN}{END}\n")
    assert main(["--check"], tmp_path) == 1
    said = capsys.readouterr().err
    assert "docs/techniques.md is stale" in said and "README.md is stale" in said
    assert main([], tmp_path) == 0
    assert main(["--check"], tmp_path) == 0
    assert "Not measured yet." in (tmp_path / "README.md").read_text()
    assert "Not measured yet." in (tmp_path / "docs" / "benchmarks.md").read_text()
    assert not [line for line in (tmp_path / "docs" / "results.md").read_text().splitlines() if line.startswith("## ")]
    docs = tmp_path / "docs"
    support = (docs / "support.md").read_text()
    assert "| softmax | `online` | run here, equals the reference (2026-01-02) | never run | never run |" in support
    assert "| attention | `cudnn` | – | never run | – |" in support
    generated = {docs / f"{name}.md" for name in ("techniques", "results", "benchmarks", "support")}
    assert set(pages(tmp_path)) == {tmp_path / "README.md", *generated}
