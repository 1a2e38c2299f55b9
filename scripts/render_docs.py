"""Writes the generated pages: docs/techniques.md from docs/techniques.toml; docs/results.md, docs/benchmarks.md and the
table in README.md from results/; the table in docs/support.md from docs/support.json, which `pytest --support` writes.

uv run scripts/render_docs.py            writes them
uv run scripts/render_docs.py --check    exits 1 where a page is stale or an entry names what does not exist
"""

import argparse
import ast
import importlib
import json
import pathlib
import sys
import tomllib
from collections.abc import Mapping, Sequence
from typing import Any

from lissom.training.config import load_recipe
from lissom.training.errors import UserError

ROOT = pathlib.Path(__file__).parent.parent
FIELDS = ("name", "paper", "area", "module", "recipe", "test", "rows", "verdict")
AREAS = ("ops", "models", "training", "compression", "inference", "search", "data", "evaluation")
UNMEASURED = "not measured"
VERDICTS = ("shown", "not separated", "refuted at this size", UNMEASURED)
BEGIN, END = "<!-- table: begin, written by scripts/render_docs.py -->", "<!-- table: end -->"
RESULT = "results/mnist1d_transformer"
NOTES_ON_TECHNIQUES = """\
A verdict of a model needs a ceiling in the table, which text and `mnist1d` do not have: the intervals of such tables
say more than *not separated* ([evaluation.md](evaluation.md)). A recipe is run by `uv run train.py --config=RECIPE`,
a script by `uv run SCRIPT`; `RUN` is the directory of a finished run."""
NOTES_ON_COLUMNS = """\
`compiled`: read from the program; `modelled`: from a formula; all else measured. `+ int8_weights`: the same runs with
their weights rounded to 8 bits, exported and reloaded. A dash is what is unknown, or has no meaning for the row."""


def read_techniques(root: pathlib.Path) -> list[dict[str, Any]]:
    """The entries of docs/techniques.toml."""
    return tomllib.loads((root / "docs" / "techniques.toml").read_text())["technique"]


def problems(entry: Mapping[str, Any], root: pathlib.Path) -> list[str]:
    """What is wrong with one entry, a sentence each: fields, words, paths that do not exist."""
    name = entry.get("name", "?")
    if set(entry) != set(FIELDS):
        return [f"{name}: the fields are {', '.join(FIELDS)}, not {', '.join(entry)}"]
    found = []
    for field, known in (("area", AREAS), ("verdict", VERDICTS)):
        if entry[field] not in known:
            found.append(f"{name}: {field} {entry[field]!r} is none of {', '.join(known)}")
    if (entry["verdict"] == UNMEASURED) != (not entry["rows"]):
        found.append(f"{name}: the verdict is {UNMEASURED!r} exactly where there are no rows")
    named, *flags = entry["recipe"].split() or [""]
    recipe, _, mode = named.partition(":")
    paths = {"module": entry["module"], "recipe": recipe, "test": entry["test"].partition("::")[0]}
    if entry["rows"]:
        paths["rows"] = entry["rows"]
    for field, path in paths.items():
        if not (path and (root / path).is_file()):
            found.append(f"{name}: {field} {path!r} does not exist")
    if mode and (root / recipe).is_file():
        try:
            load_recipe(f"{root / recipe}:{mode}")
        except UserError:
            found.append(f"{name}: {recipe} names no mode {mode!r}")
    own = "--" if recipe.startswith("scripts/") else "--config."
    if any(not flag.startswith(own) for flag in flags):
        found.append(f"{name}: behind the recipe stand {own}field=value only")
    test = root / paths["test"]
    if test.is_file() and entry["test"].partition("::")[2] not in _functions(test):
        found.append(f"{name}: there is no test {entry['test']}")
    return found


def _functions(path: pathlib.Path) -> set[str]:
    return {node.name for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)}


def techniques_page(techniques: Sequence[Mapping[str, Any]]) -> str:
    """docs/techniques.md: one table an area."""
    lines = ["# Techniques", "", "Written by `scripts/render_docs.py` from `docs/techniques.toml`.", ""]
    lines += [NOTES_ON_TECHNIQUES, ""]
    for area in AREAS:
        entries = [entry for entry in techniques if entry["area"] == area]
        if not entries:
            continue
        lines += [
            f"## {area}",
            "",
            "| technique | paper | module | recipe | test | verdict |",
            "|---|---|---|---|---|---|",
        ]
        lines += [_row(entry) for entry in entries] + [""]
    return "\n".join(lines)


def _row(entry: Mapping[str, Any]) -> str:
    path, function = entry["test"].split("::")
    verdict = f"[{entry['verdict']}](../{entry['rows']})" if entry["rows"] else entry["verdict"]
    cells = (
        entry["name"],
        _linked(entry["paper"]) or "–",
        f"[{entry['module']}](../{entry['module']})",
        f"`{entry['recipe']}`",
        f"[{function}](../{path})",
        verdict,
    )
    return "| " + " | ".join(cells) + " |"


def _linked(paper: str) -> str:
    title, found, number = paper.rpartition(", arXiv:")
    return f"{title}, [arXiv:{number}](https://arxiv.org/abs/{number})" if found else paper


def measured_table(folder: pathlib.Path, name: str) -> str:
    """What stands between the markers of README.md: the table that compare.py prints, made again from its rows."""
    file = folder / "rows.jsonl"
    if not file.is_file():
        return "Not measured yet."
    from lissom.eval import render
    from lissom.evaluation.rows import read_rows

    rows = read_rows(file)
    commits = sorted({_commit(row.provenance) for row in rows})
    dates = sorted({(row.provenance.date or "unknown date")[:10] for row in rows})
    text = render(rows).strip().replace("## ", "### ")
    text += f"\n\nCommit {', '.join(commits)}; {' to '.join(dict.fromkeys((dates[0], dates[-1])))}."
    text += f" All columns: [{name}/table.csv]({name}/table.csv)."
    if (folder / "pareto.png").is_file():
        text += f"\n\n![Accuracy against latency, the front drawn]({name}/pareto.png)"
    return text


def results_page(root: pathlib.Path) -> str:
    """docs/results.md: a section a folder of results/ that holds a table, with what its recipe says of itself."""
    from lissom.evaluation.metrics import METRICS
    from lissom.evaluation.rows import read_rows

    folders = sorted(file.parent for file in (root / "results").glob("*/table.md"))
    tables = [(folder / "table.md").read_text().strip() for folder in folders]
    lines = ["# Results", "", "Written by `scripts/render_docs.py` from the tables in `results/`.", ""]
    lines += ["How it is measured, and what a claim needs: [evaluation.md](evaluation.md).", ""]
    lines += ["| column | meaning |", "|---|---|"]
    heads = [line for text in tables for line in text.splitlines() if line.startswith("| variant")]
    columns = {cell.strip() for head in heads for cell in head.split("|")}
    titles = {name.replace("_", " "): metric.meaning for name, metric in METRICS.items()}
    lines += [f"| {title} | {meaning} |" for title, meaning in titles.items()
              if any(column.startswith((f"{title} [", f"{title},")) for column in columns)]  # fmt: skip
    lines += ["", NOTES_ON_COLUMNS, ""]
    for folder, table in zip(folders, tables, strict=True):
        rows = read_rows(folder / "rows.jsonl")
        recipe = next(row.identity.recipe for row in rows if row.identity.role == "variant").partition(":")[0]
        said = (ast.get_docstring(ast.parse((root / recipe).read_text())) or "").splitlines()[:1]
        commits = ", ".join(sorted({_commit(row.provenance) for row in rows}))
        lines += [
            f"## {folder.name}",
            "",
            *said,
            "",
            f"[{recipe}](../{recipe}){_settings(rows)}; commit {commits}.",
            "",
        ]
        lines += [table.replace("## ", "### "), ""]
        for file, words in (("table.csv", "All columns"), ("pareto.png", "Plot")):
            if (folder / file).is_file():
                path = f"../results/{folder.name}/{file}"
                lines += [f"{words}: [{file}]({path})", ""]
    return "\n".join(lines)


def _settings(rows: Sequence[Any]) -> str:
    """What all variants set on top of the recipe, and learning rates that are each variant's own."""
    variants = [row.identity for row in rows if row.identity.role == "variant"]
    same = set.intersection(*(set(identity.overrides.items()) for identity in variants))
    said = [f"`{key}={value}`" for key, value in sorted(same)]
    text = f" with {', '.join(said)}" if said else ""
    rates = {identity.label: identity.overrides.get("optim.learning_rate") for identity in variants}
    if len(set(rates.values())) > 1:
        default = "the recipe's"
        text += "; learning rates: " + ", ".join(f"{label} {rate or default}" for label, rate in rates.items())
    return text


def benchmarks_page(root: pathlib.Path) -> str:
    """docs/benchmarks.md: a section an op and machine, from results/ops/*.jsonl."""
    from lissom.evaluation.benchmarks import report
    from lissom.evaluation.rows import read_rows

    lines = ["# Benchmarks of ops", "", "Written by `scripts/render_docs.py` from the rows in `results/ops/`.", ""]
    lines += ["How it is measured: [ops.md](ops.md#benchmarks).", ""]
    files = sorted((root / "results" / "ops").glob("*.jsonl"))
    judged = report.goals()
    lines += [report.page(read_rows(file), judged) for file in files] or ["Not measured yet.", ""]
    return "\n".join(lines)


PLATFORMS = {"cpu": "CPU", "cuda": "CUDA", "tpu": "TPU"}
FACTS = {
    "equals": "run here, equals the reference",
    "interpreted": "interpreted on a CPU, equals the reference",
    "lowers": "lowers",
    "compiles": "compiles",
}


def support_table(root: pathlib.Path) -> str:
    """Op x implementation x platform: what a test has shown, and when last."""
    from lissom.evaluation.benchmarks import ENTRIES

    known = json.loads((root / "docs" / "support.json").read_text())
    lines = ["| op | implementation | " + " | ".join(PLATFORMS.values()) + " |", "|---|---|---|---|---|"]
    for op in ENTRIES:
        made = importlib.import_module(f"lissom.ops.{op}").OP
        for name in made.implementations:
            cells = [_support(known.get(op, {}).get(name, {}).get(p, {}), name in made.runs_on(p)) for p in PLATFORMS]
            lines.append(f"| {op} | `{name}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _support(facts: Mapping[str, str], is_for_it: bool) -> str:
    if not is_for_it:
        return "–"
    shown = [f"{words} ({facts[fact]})" for fact, words in FACTS.items() if fact in facts]
    return "; ".join([*shown, *([] if "equals" in facts else ["never run"])])


def _commit(provenance: Any) -> str:
    if not provenance.commit:
        return "unknown"
    return provenance.commit[:9] + (" with changes" if provenance.dirty else "")


def replaced(page: str, table: str) -> str:
    """The page with `table` between its markers."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"the page must have {BEGIN} and {END}")
    return f"{before}{BEGIN}\n\n{table}\n\n{END}{after}"


def pages(root: pathlib.Path) -> dict[pathlib.Path, str]:
    """{path: what it should hold} of every generated page."""
    readme, support = root / "README.md", root / "docs" / "support.md"
    return {
        root / "docs" / "techniques.md": techniques_page(read_techniques(root)),
        root / "docs" / "results.md": results_page(root),
        root / "docs" / "benchmarks.md": benchmarks_page(root),
        support: replaced(support.read_text(), support_table(root)),
        readme: replaced(readme.read_text(), measured_table(root / RESULT, RESULT)),
    }


def stale(root: pathlib.Path) -> list[str]:
    """The generated pages that do not hold what they should."""
    wanted = pages(root)
    return [
        str(path.relative_to(root)) for path, text in wanted.items() if not path.is_file() or path.read_text() != text
    ]


def main(arguments: Sequence[str] | None = None, root: pathlib.Path = ROOT) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 where a page is stale")
    check = parser.parse_args(arguments).check
    wrong = [sentence for entry in read_techniques(root) for sentence in problems(entry, root)]
    if check:
        wrong += [f"{page} is stale: uv run scripts/render_docs.py" for page in stale(root)]
    if wrong:
        print("\n".join(wrong), file=sys.stderr)
        return 1
    if not check:
        for path, text in pages(root).items():
            path.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
