"""Tables out of rows: one table a task, one line a variant x transform, one column a (metric, kind,
conditions).

Seeds are aggregated here. Measured and modelled numbers stand in different columns, as do different
conditions and, for what depends on the machine, different machines (what training cost depends on the one
that trained). Floors and ceilings come last.
"""

import csv
import dataclasses
import io
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lissom.evaluation import plots, rows, statistics
from lissom.evaluation.metrics import METRICS, QUALITIES, metric

UNKNOWN = "–"
ROLE_MARKS = {"variant": "", "floor": " (floor)", "ceiling": " (ceiling)"}
PREFIXES = {-9: "n", -6: "µ", -3: "m", 0: "", 3: "k", 6: "M", 9: "G", 12: "T"}

CSV_FIELDS = (
    *("task", "variant", "role", "metric", "kind", "conditions", "machine", "unit"),
    *("mean", "sd", "half_width", "n"),
    *("difference", "difference_low", "difference_high", "difference_n", "label"),
)


@dataclass(frozen=True)
class Column:
    """What one column holds; `machine` is the hardware of machine-dependent metrics, "" for others."""

    name: str
    kind: str
    conditions: tuple[tuple[str, object], ...]
    machine: str = ""


@dataclass(frozen=True)
class Line:
    """One variant x transform: the values of each column by seed, in the unit of `METRICS`."""

    label: str
    role: str
    seeds: tuple[int | None, ...]
    values: Mapping[Column, Mapping[int | None, float]]

    def summary(self, column: Column) -> statistics.Summary | None:
        """Mean and spread over the seeds that know the value; None where none does."""
        values = self.values.get(column)
        return statistics.summarize(list(values.values())) if values else None

    @property
    def name(self) -> str:
        return self.label + ROLE_MARKS[self.role]


@dataclass(frozen=True)
class Table:
    """`lines` in order of first appearance, floors and ceilings last; differences are to the first
    variant. `machines` are those that measured; `notes` stand below."""

    task: str
    machines: tuple[str, ...]
    columns: tuple[Column, ...]
    lines: tuple[Line, ...]
    notes: tuple[str, ...] = ()

    @property
    def first(self) -> Line | None:
        return next((line for line in self.lines if line.role == "variant"), None)

    def difference(self, line: Line, column: Column) -> statistics.Difference | None:
        """The paired difference of a variant to the first one; None for the first itself, floors and
        ceilings."""
        if line.role != "variant" or line is self.first:
            return None
        values, ours = self.first.values.get(column, {}), line.values.get(column, {})
        return statistics.paired_difference(values, ours, METRICS[column.name].direction)


# ---- aggregation
# ---------------------------------------------------------------------------------------------


def tables(all_rows: Sequence[rows.Row]) -> list[Table]:
    """One table a task, in order of first appearance."""
    tasks = dict.fromkeys(row.identity.task for row in all_rows)
    return [_table(task, [row for row in all_rows if row.identity.task == task]) for task in tasks]


def _table(task: str, task_rows: Sequence[rows.Row]) -> Table:
    groups: dict[tuple, dict[Column, dict]] = {}
    seeds: dict[tuple, dict] = {}
    columns: dict[Column, None] = {}
    for row in task_rows:
        identity = row.identity
        machines = {
            "": "",
            "measuring": rows.machine_name(row.provenance.hardware),
            "training": rows.machine_name((row.trained or row.provenance).hardware),
        }
        label = identity.label + (f" + {identity.transform}" if identity.transform else "")
        group = groups.setdefault((label, identity.role), {})
        seeds.setdefault((label, identity.role), {})[identity.seed] = None
        for entry in row.measurements:
            where = machines[metric(entry.name).machine]
            column = Column(entry.name, entry.kind, tuple(sorted(entry.conditions.items())), where)
            columns[column] = None
            if entry.value is None:
                continue
            values = group.setdefault(column, {})
            if identity.seed in values:
                raise ValueError(
                    f"two rows of {label!r}, seed {identity.seed}, task {task}, both hold {entry.name}: "
                    "give one of them another variant label, or leave one out"
                )
            values[identity.seed] = entry.value
    lines = [
        Line(label, role, tuple(sorted(seeds[label, role], key=lambda s: (s is None, s))), values)
        for (label, role), values in groups.items()
    ]
    lines.sort(key=lambda line: rows.ROLES.index(line.role))
    order = list(METRICS)
    ordered = sorted(columns, key=lambda column: order.index(column.name))
    machines = tuple(dict.fromkeys(rows.machine_name(row.provenance.hardware) for row in task_rows))
    return Table(task, machines, tuple(ordered), tuple(lines), _notes(task_rows))


def _notes(task_rows: Sequence[rows.Row]) -> tuple[str, ...]:
    """What the rows say of themselves, each sentence once, behind the variants that it is about."""
    said: dict[str, dict[str, None]] = {}
    for row in task_rows:
        for note in (*row.notes, rows.trained_note(row)):
            if note:
                said.setdefault(note, {})[row.identity.label] = None
    return tuple(f"{', '.join(labels)}: {note}" for note, labels in said.items())


# ---- rendering
# -----------------------------------------------------------------------------------------------


def column_unit(table: Table, column: Column) -> tuple[str, float]:
    """(unit shown, factor): fractions in %, other units with the SI prefix of the column's median."""
    unit = metric(column.name).unit
    if unit == "fraction":
        return "%", 100.0
    if unit in ("nats", "bits"):
        return unit, 1.0
    means = sorted(abs(s.mean) for line in table.lines if (s := line.summary(column)) is not None and s.mean)
    exponent = 0
    if means:
        exponent = 3 * math.floor(math.log10(means[len(means) // 2]) / 3)
        # Scalars, bytes and operations do not come in thousandths, rates not in thousands.
        low, high = {"s": (-9, 0), "J": (-9, 12), "1/s": (0, 0)}.get(unit, (0, 12))
        exponent = min(max(exponent, low), high)
    shown = PREFIXES[exponent] + ("" if unit == "1" else unit)
    return shown, 10.0**-exponent


def header(table: Table, column: Column) -> str:
    """Name, conditions, kind unless measured, machine where there are several, unit."""
    words = [column.name.replace("_", " ")]
    words += [f"{key} {value}" for key, value in column.conditions]
    if column.kind != "measured":
        words.append(column.kind)
    if column.machine and len({*table.machines, *(c.machine for c in table.columns if c.machine)}) > 1:
        words.append(column.machine)
    unit = column_unit(table, column)[0]
    return ", ".join(words) + (f" [{unit}]" if unit else "")


def number(value: float, spread: float | None = None) -> str:
    """Four significant digits; with a spread, as many decimals as give the spread two digits (but four at
    most)."""
    if value == 0 and not spread:
        return "0"
    size = spread if spread else abs(value)
    digits = 1 if spread else 3
    decimals = min(max(digits - math.floor(math.log10(size)), 0), 4 if spread else 8)
    text = f"{value:.{decimals}f}"
    return text.rstrip("0").rstrip(".") if not spread and math.isclose(value, round(value)) else text


def cell(table: Table, line: Line, column: Column) -> str:
    """Mean, with +- standard deviation when there are several seeds and they differ."""
    summary = line.summary(column)
    if summary is None:
        return UNKNOWN
    factor = column_unit(table, column)[1]
    mean = summary.mean * factor
    if not summary.sd:
        return number(mean)
    spread = summary.sd * factor
    return f"{number(mean, spread)} ± {number(spread, spread)}"


def difference_cell(table: Table, line: Line, column: Column) -> str:
    """Mean difference, its 95 % interval and the label."""
    difference = table.difference(line, column)
    if difference is None or difference.mean is None:
        return UNKNOWN if difference is None else difference.label
    factor = column_unit(table, column)[1]
    if difference.low is None:
        return f"{number(difference.mean * factor)} ({difference.label})"
    low, high = difference.low * factor, difference.high * factor
    spread = (high - low) / 2
    ends = f"[{number(low, spread)}, {number(high, spread)}]"
    return f"{number(difference.mean * factor, spread)} {ends} {difference.label}"


def markdown(table: Table) -> str:
    """A section: heading, machine, padded table that reads well on a terminal too, and how to read it."""
    compared = _compared(table)
    heads = ["variant", "seeds", *(header(table, column) for column in table.columns)]
    heads += [f"{header(table, column)} minus first, 95 % interval" for column in compared]
    grid = [heads]
    for line in table.lines:
        cells = [cell(table, line, column) for column in table.columns]
        cells += [difference_cell(table, line, column) for column in compared]
        known = [seed for seed in line.seeds if seed is not None]
        grid.append([line.name.replace("|", "\\|"), str(len(known)) if known else UNKNOWN, *cells])
    widths = [max(len(row[i]) for row in grid) for i in range(len(heads))]
    text = [_markdown_row(grid[0], widths), "|" + "|".join("-" * (w + 1) + ":" for w in widths) + "|"]
    text[1] = text[1].replace(":", "-", 1)
    text += [_markdown_row(row, widths) for row in grid[1:]]
    notes = "Mean ± standard deviation over seeds; – is unknown; numbers are measured where the column says nothing."
    if compared:
        notes += f" Differences are over shared seeds to {table.first.name!r}, t-interval."
    below = ["", *(f"- {note}." for note in table.notes)] if table.notes else []
    return "\n".join([f"## {table.task}", "", "; ".join(table.machines), "", *text, "", notes, *below, ""])


def _compared(table: Table) -> list[Column]:
    if sum(line.role == "variant" for line in table.lines) < 2:
        return []
    return [column for column in table.columns if column.name in QUALITIES]


def _markdown_row(cells: Sequence[str], widths: Sequence[int]) -> str:
    first, *rest = [cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(cells, widths))]
    return "| " + " | ".join([first, *rest]) + " |"


def csv_text(all_tables: Sequence[Table]) -> str:
    """Long form, in the units of `METRICS`: one record a line x column; unknown is an empty field."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(CSV_FIELDS)
    for table in all_tables:
        for line in table.lines:
            for column in table.columns:
                writer.writerow(_csv_record(table, line, column))
    return out.getvalue()


def _csv_record(table: Table, line: Line, column: Column) -> list:
    conditions = " ".join(f"{key}={value}" for key, value in column.conditions)
    summary = line.summary(column)
    record = [table.task, line.label, line.role, column.name, column.kind, conditions, column.machine]
    record.append(metric(column.name).unit)
    record += [None] * 4 if summary is None else [summary.mean, summary.sd, summary.half_width, summary.n]
    d = table.difference(line, column) if column in _compared(table) else None
    return record + ([None] * 5 if d is None else [d.mean, d.low, d.high, d.n, d.label])


# ---- a report
# ------------------------------------------------------------------------------------------------


def write_report(
    all_rows: Sequence[rows.Row],
    out_dir: str | os.PathLike,
    *,
    x: str = "latency_p50",
    y: str | None = None,
    plot: bool = True,
    shown: Sequence[str] | None = None,
) -> list[Table]:
    """Writes rows.jsonl, table.csv, table.md (of the metrics in `shown`, None: of all) and pareto.png, and returns the
    tables.

    A panel is one task and one column of x: a batch size on a machine. `y=None` takes the first of `QUALITIES` that a
    task has. Where no line knows both x and y, with plot=False (benchmarks), and where the labels do not fit, there
    is no picture; table.md says why.
    """
    if not all_rows:
        raise ValueError("there are no rows to report")
    metric(x)
    out_dir = Path(out_dir)
    done = tables(all_rows)
    rows.write_rows(out_dir / "rows.jsonl", all_rows)
    (out_dir / "table.csv").write_text(csv_text(done), encoding="utf-8")
    (out_dir / "pareto.png").unlink(missing_ok=True)  # one of an earlier report would not belong to these rows
    text = shown_text(done, shown)
    if plot:
        try:
            drawn = [panel for table in done for panel in panels(table, x, y)]
            if not drawn:
                raise ValueError(f"no line knows both {x} and {y or ' or '.join(QUALITIES)}")
            plots.pareto_plot(drawn, out_dir / "pareto.png")
        except ValueError as error:
            text += f"\nNo plot: {error}.\n"
    (out_dir / "table.md").write_text(text, encoding="utf-8")
    return done


def shown_text(all_tables: Sequence[Table], shown: Sequence[str] | None = None) -> str:
    """The sections of all tables, with the columns of the metrics in `shown` (None: all of them); for the dozens of
    corrupted test sets their mean stands."""
    columns = lambda table: (c for c in table.columns if shown is None or _printed(c, shown))
    return "\n".join(markdown(dataclasses.replace(table, columns=tuple(columns(table)))) for table in all_tables)


def _printed(column: Column, shown: Sequence[str]) -> bool:
    return column.name in shown and "corruption" not in dict(column.conditions)


def panels(table: Table, x: str = "latency_p50", y: str | None = None) -> list[plots.Panel]:
    """What a plot of this table shows: one panel for each column of x, a batch size on a machine, of which a line
    knows both axes."""
    ys = [y] if y else QUALITIES
    y_column = next((c for name in ys for c in table.columns if c.name == name), None)
    if y_column is None:
        return []
    found = [_panel(table, column, y_column) for column in table.columns if column.name == x]
    return [panel for panel in found if panel is not None]


def _panel(table: Table, x_column: Column, y_column: Column) -> plots.Panel | None:
    size_column = next((c for c in table.columns if c.name == "peak_memory" and c.machine == x_column.machine), None)
    x_factor, y_factor = column_unit(table, x_column)[1], column_unit(table, y_column)[1]
    points = []
    for line in table.lines:
        x_value, y_value = line.summary(x_column), line.summary(y_column)
        if x_value is None or y_value is None:
            continue
        memory = line.summary(size_column) if size_column else None
        errors = [
            None if s.half_width is None else s.half_width * f for s, f in ((x_value, x_factor), (y_value, y_factor))
        ]
        points.append(
            plots.Point(
                line.name,
                x_value.mean * x_factor,
                y_value.mean * y_factor,
                *errors,
                None if memory is None else memory.mean,
            )
        )
    if not points:
        return None
    levels = tuple(
        (line.name, summary.mean * y_factor)
        for line in table.lines
        if line.role != "variant" and line.summary(x_column) is None and (summary := line.summary(y_column))
    )
    words = [x_column.name.replace("_", " "), *(f"{key} {value}" for key, value in x_column.conditions)]
    title = f"{table.task}: {y_column.name.replace('_', ' ')} against {', '.join(words)}"
    subtitle = x_column.machine or "; ".join(table.machines)
    directions = tuple(metric(c.name).direction or "lower" for c in (x_column, y_column))
    size_name = header(table, size_column).partition(" [")[0] if size_column else ""
    labels = header(table, x_column), header(table, y_column)
    # An error, relative to the norm of what it is the error of, may exceed 1.
    most = y_factor if metric(y_column.name).unit == "fraction" and directions[1] == "higher" else None
    return plots.Panel(title, subtitle, *labels, tuple(points), directions, size_name, levels, most)
