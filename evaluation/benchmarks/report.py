"""Goals, judged on rows, and the table of a benchmark: rows in, text out."""

import pathlib
import tomllib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from lissom.evaluation.benchmarks.results import is_red
from lissom.evaluation.metrics import metric
from lissom.evaluation.rows import Row, machine_name

GOALS = pathlib.Path(__file__).parent / "goals.toml"
UNKNOWN = "–"


@dataclass(frozen=True)
class Goal:
    """An entry of goals.toml: `quantity` is a metric, which is to be `at_least` or `at_most` so much; `reference`:
    against which, where the metric is a ratio to one."""

    op: str
    problem: str
    platform: str
    quantity: str
    sentence: str
    reference: str | None = None
    at_least: float | None = None
    at_most: float | None = None

    def __post_init__(self):
        metric(self.quantity)
        if (self.at_least is None) == (self.at_most is None):
            raise ValueError(f"the goal {self.sentence!r} has one of at_least and at_most")

    def concerns(self, row: Row) -> bool:
        """Whether the row is of the goal's problem, on its platform, of the default implementation."""
        setting = row.identity.overrides
        same = row.identity.task == f"{self.op} {self.problem}" and setting.get("platform") == self.platform
        return same and bool(setting.get("default"))

    def judge(self, row: Row) -> tuple[str, float | None]:
        """("met", "missed" or "unknown", the value)."""
        conditions = {} if self.reference is None else {"reference": self.reference}
        value = value_of(row, self.quantity, **conditions)
        if value is None:
            return "unknown", None
        met = value >= self.at_least if self.at_least is not None else value <= self.at_most
        return "met" if met else "missed", value


def goals(path: pathlib.Path = GOALS) -> list[Goal]:
    """All entries of the file."""
    return [Goal(**entry) for entry in tomllib.loads(path.read_text())["goal"]]


def value_of(row: Row, name: str, **conditions) -> float | None:
    """The value of a metric; `reference` is a condition that also tells numbers of ours from those of references."""
    for entry in row.measurements:
        wanted = {"reference": None, **conditions}
        if entry.name == name and all(entry.conditions.get(key) == value for key, value in wanted.items()):
            return entry.value
    return None


def references(row: Row) -> list[str]:
    """The references that were timed with the row."""
    found = (entry.conditions.get("reference") for entry in row.measurements)
    return list(dict.fromkeys(name for name in found if name))


def table(rows: Sequence[Row], judged: Iterable[Goal] = ()) -> str:
    """A Markdown table that reads well on a terminal, the goals below: ours, then the references in brackets."""
    judged = list(judged)
    against = list(dict.fromkeys(name for row in rows for name in references(row)))
    heads = ["problem", "implementation", "ms", "p90", "spread", "GFLOP/s", "eff"]
    walks = any(value_of(row, "memory_walks") is not None for row in rows)
    heads += ["walks"] * walks + [f"vs {name}" for name in against] + ["peak MB", "goals"]
    lines = []
    for row in rows:
        results = [goal.judge(row)[0] for goal in judged if goal.concerns(row)]
        problem = row.identity.task.partition(" ")[2]
        speedups = [_number(value_of(row, "speedup", reference=name)) for name in against]
        name = row.identity.variant + ("*" if row.identity.overrides.get("default") else "")
        goal_cell = "RED" if is_red(row) else _goal_cell(results)
        middle = [*[_number(value_of(row, "memory_walks"))] * walks, *speedups]
        peak = _number(value_of(row, "peak_memory"), 1e-6)
        lines.append([problem, name, *_cells(row), *middle, peak, goal_cell])
        if _is_last(row, rows):
            for other in references(row):
                peak = _number(value_of(row, "peak_memory", reference=other), 1e-6)
                lines.append(["", f"({other})", *_cells(row, reference=other), *[""] * len(middle), peak, ""])
    text = [_padded(heads, lines), "", *_explained(rows), *_notes(rows), *_judgements(rows, judged)]
    return "\n".join(text) + "\n"


def _is_last(row: Row, rows: Sequence[Row]) -> bool:
    # Every implementation of a problem was timed in turns with the same references: they are shown once.
    return row is [other for other in rows if other.identity.task == row.identity.task][-1]


def _cells(row: Row, **conditions) -> list[str]:
    get = lambda name: value_of(row, name, **conditions)
    times = [_number(get("latency_p50"), 1e3), _number(get("latency_p90"), 1e3)]
    return [*times, _percent(get("latency_spread")), _number(get("flop_rate"), 1e-9), _percent(get("efficiency"))]


def _goal_cell(results: Sequence[str]) -> str:
    if not results:
        return ""
    return (
        results[0] if len(set(results)) == 1 else ", ".join(f"{results.count(r)} {r}" for r in dict.fromkeys(results))
    )


def _number(value: float | None, factor: float = 1.0) -> str:
    if value is None:
        return UNKNOWN
    value *= factor
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:#.3g}".rstrip(".")


def _percent(value: float | None) -> str:
    return UNKNOWN if value is None else f"{100 * value:.0f} %"


def _padded(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    grid = [heads, *lines]
    widths = [max(len(line[i]) for line in grid) for i in range(len(heads))]
    left = lambda i: i < 2 or i == len(heads) - 1
    text = [
        "| " + " | ".join(c.ljust(w) if left(i) else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths))) + " |"
        for line in grid
    ]
    rule = "|" + "|".join("-" * (w + 2) if left(i) else "-" * (w + 1) + ":" for i, w in enumerate(widths)) + "|"
    return "\n".join([text[0], rule, *text[1:]])


def _explained(rows: Sequence[Row]) -> list[str]:
    text = "ms: median of calls taken in turns; spread: interquartile range / median; eff: least time that the "
    text += "ceilings of the run allow / median; vs: time of the reference / ours; (name): a reference; "
    if any(value_of(row, "memory_walks") is not None for row in rows):
        text += "walks: reads and writes of all of the data in main memory, by the algorithm; "
    return [f"{text}*: what a call without a name runs; {UNKNOWN}: unknown."]


def _notes(rows: Sequence[Row]) -> list[str]:
    said: dict[str, list[str]] = {}
    for row in rows:
        for note in row.notes:
            said.setdefault(note, []).append(f"{row.identity.task.partition(' ')[2]} {row.identity.variant}")
    return ["", *(f"- {', '.join(of)}: {note}." for note, of in said.items())] if said else []


def _judgements(rows: Sequence[Row], judged: Sequence[Goal]) -> list[str]:
    lines = []
    for goal in judged:
        for row in (row for row in rows if goal.concerns(row)):
            result, value = goal.judge(row)
            bound = f">= {goal.at_least:g}" if goal.at_least is not None else f"<= {goal.at_most:g}"
            lines.append(f"- {result}: {goal.sentence}: {_number(value)} ({bound}).")
    return ["", "Goals:", "", *lines] if lines else []


def ceilings_text(row: Row) -> str:
    """The ceilings of the row's run, in a sentence."""
    rates = {entry.conditions.get("dtype"): entry.value for entry in row.measurements if entry.name == "matmul_rate"}
    products = ", ".join(f"{dtype} {_number(rate, 1e-9)}" for dtype, rate in rates.items())
    return (
        f"{_number(value_of(row, 'bandwidth'), 1e-9)} GB/s; products of matrices {products} GFLOP/s; "
        f"{_number(value_of(row, 'exp_rate'), 1e-9)} G exp/s"
    )


def page(rows: Sequence[Row], judged: Iterable[Goal]) -> str:
    """A section of docs/benchmarks.md: the rows of one op on one machine, with where they came from."""
    commits = dict.fromkeys(
        (row.provenance.commit or "unknown")[:9] + (" with changes" if row.provenance.dirty else "") for row in rows
    )
    dates = sorted({(row.provenance.date or "unknown date")[:10] for row in rows})
    repeats = dict.fromkeys(e.conditions["repeats"] for r in rows for e in r.measurements if "repeats" in e.conditions)
    latest = max(rows, key=lambda row: row.provenance.date or "")
    versions = latest.provenance.versions
    used = ", ".join(f"{name} {versions[name]}" for name in ("jax", "reference torch") if versions.get(name))
    where = "; ".join(dict.fromkeys(machine_name(row.provenance.hardware) for row in rows))
    facts = f"{where}; commit {', '.join(commits)}; {' to '.join(dict.fromkeys((dates[0], dates[-1])))}; {used}; "
    facts += f"{', '.join(map(str, repeats))} repeats. Ceilings of the latest run: {ceilings_text(latest)}."
    return "\n".join(
        [f"## {rows[0].identity.recipe.removeprefix('ops/')}: {where}", "", facts, "", table(rows, judged)]
    )
