"""What stands in tables, CSV and plots, from rows with known numbers."""

import csv
import dataclasses
import io

import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread
from matplotlib.transforms import Bbox

from lissom.evaluation import plots, rows, tables
from lissom.evaluation.rows import Identity, Provenance, Row, measure

HERE = {"cpu": "Z80", "cores": 1}


def row(variant, seed, *measurements, task="digits", role="variant", transform=None, hardware=HERE):
    identity = Identity("recipe", task, seed, variant=variant, role=role, transform=transform)
    return Row(identity, Provenance(hardware=hardware), measurements)


def trained(variant, accuracies, latency=0.002, **more):
    return [
        row(variant, seed, measure("accuracy", a), measure("latency_p50", latency, batch=1), **more)
        for seed, a in enumerate(accuracies)
    ]


def column(table, name, **wanted):
    (found,) = [
        c for c in table.columns if c.name == name and all(getattr(c, key) == value for key, value in wanted.items())
    ]
    return found


def test_aggregates_seeds_and_compares_to_the_first():
    # a: 0.90, 0.92 -> mean 0.91, sd 0.01 * sqrt(2); b is 0.05 and 0.051 above: 0.0505 +- 12.706 * 0.0005
    (table,) = tables.tables(trained("a", [0.90, 0.92]) + trained("b", [0.95, 0.971]))
    accuracy = column(table, "accuracy")
    a, b = table.lines
    assert a.summary(accuracy).mean == pytest.approx(0.91)
    assert a.summary(accuracy).sd == pytest.approx(0.01 * 2**0.5)
    difference = table.difference(b, accuracy)
    assert difference.label == "better"
    assert difference.low == pytest.approx(0.0505 - 12.7062 * 0.0005, rel=1e-4)
    assert table.difference(a, accuracy) is None
    text = tables.markdown(table)
    assert "91.0 ± 1.4" in text and "5.05 [4.41, 5.69] better" in text and "latency p50, batch 1 [ms]" in text


def test_kinds_conditions_and_machines_have_columns_of_their_own():
    kinds = [measure("peak_memory", 5e6, kind) for kind in ("measured", "modelled", "compiled")]
    batches = [measure("latency_p50", 0.1, batch=batch) for batch in (1, 8)]
    (table,) = tables.tables([row("a", 0, *kinds, *batches), row("b", 0, *batches, hardware={"cpu": "6502"})])
    assert len([c for c in table.columns if c.name == "peak_memory"]) == 3
    # Two batch sizes on each of two machines.
    assert len([c for c in table.columns if c.name == "latency_p50"]) == 4
    assert "peak memory, modelled, Z80, 1 core [MB]" in tables.markdown(table)
    assert "latency p50, batch 8, 6502, ? cores [ms]" in tables.markdown(table)


def test_what_training_cost_stands_under_the_machine_that_trained():
    def one(variant, trained=None, **more):
        numbers = measure("train_seconds", 3.0), measure("latency_p50", 0.1, batch=1)
        return dataclasses.replace(row(variant, 0, *numbers), trained=trained, **more)

    (here,) = tables.tables([one("a"), one("b")])
    assert len(here.columns) == 2 and here.notes == () and tables.header(here, here.columns[0]) == "train seconds [s]"
    gpu = Provenance("abc", True, {"accelerator": "H900", "accelerators": 2})
    (table,) = tables.tables([one("a"), one("b", gpu), one("c", gpu)])
    found = [tables.header(table, column) for column in table.columns]
    assert found == [
        "train seconds, Z80, 1 core [s]",
        "train seconds, 2 x H900 [s]",
        "latency p50, batch 1, Z80, 1 core [ms]",
    ]
    assert table.machines == ("Z80, 1 core",)
    assert table.lines[1].summary(table.columns[0]) is None and table.lines[1].summary(table.columns[1]).mean == 3.0
    note = "b, c: trained at commit abc with changes (measured at unknown), on 2 x H900"
    assert table.notes == (note,) and f"\n- {note}.\n" in tables.markdown(table)
    # All of them trained there: the column says so, since the heading names only the machine that measured.
    (table,) = tables.tables([one("b", gpu), one("c", gpu)])
    assert "train seconds, 2 x H900 [s]" in tables.markdown(table)


def test_a_note_of_several_rows_is_said_once():
    noted = [dataclasses.replace(r, notes=("at the edge",)) for r in trained("a", [0.5, 0.6])]
    int8 = [dataclasses.replace(r, notes=("at the edge",)) for r in trained("a", [0.4], transform="int8")]
    (table,) = tables.tables([*noted, *int8, *trained("b", [0.5])])
    assert table.notes == ("a: at the edge",)


def test_a_table_is_of_one_task_and_a_transform_is_a_line():
    done = tables.tables(
        trained("a", [0.5]) + trained("a", [0.4], transform="int8") + trained("a", [0.3], task="mnist1d")
    )
    assert [table.task for table in done] == ["digits", "mnist1d"]
    assert [line.name for line in done[0].lines] == ["a", "a + int8"]


def test_floor_and_ceiling_come_last_and_are_not_compared():
    floor = row("nearest", None, measure("accuracy", 0.2), role="floor")
    ceiling = row("oracle", None, measure("accuracy", 1), role="ceiling")
    (table,) = tables.tables([ceiling, floor, *trained("a", [0.5]), *trained("b", [0.6])])
    assert [line.name for line in table.lines] == ["a", "b", "nearest (floor)", "oracle (ceiling)"]
    assert table.difference(table.lines[2], column(table, "accuracy")) is None
    assert tables.difference_cell(table, table.lines[1], column(table, "accuracy")) == "10 (one seed)"


def test_unknown_is_a_dash_and_an_empty_field_never_zero():
    (table,) = tables.tables([row("a", 0, measure("flops", None), measure("loss", 0.0))])
    assert tables.cell(table, table.lines[0], column(table, "flops")) == "–"
    assert tables.cell(table, table.lines[0], column(table, "loss")) == "0"
    records = {r["metric"]: r for r in csv.DictReader(io.StringIO(tables.csv_text([table])))}
    assert (records["flops"]["mean"], records["flops"]["n"], records["loss"]["mean"]) == ("", "", "0.0")


def test_the_same_number_twice_is_an_error_but_rows_may_complete_each_other():
    with pytest.raises(ValueError, match="seed 0, task digits, both hold accuracy"):
        tables.tables(trained("a", [0.5]) + trained("a", [0.6]))
    (table,) = tables.tables([row("a", 0, measure("accuracy", 0.5)), row("a", 0, measure("flops", 7, "modelled"))])
    assert len(table.lines) == 1 and len(table.columns) == 2


@pytest.mark.parametrize(
    "value, spread, text",
    [(0.0, None, "0"), (3, None, "3"), (98.7654, None, "98.77"), (1234.5678, None, "1235"), (0.012344, None, "0.01234"),
     (91.234, 1.414, "91.2"), (91.234, 0.05, "91.234"), (-0.5, 0.26, "-0.50")],
)  # fmt: skip
def test_digits(value, spread, text):
    assert tables.number(value, spread) == text


def test_report_writes_four_files_and_the_rows_come_back(tmp_path):
    everything = trained("a", [0.90, 0.92]) + trained("b", [0.95, 0.97], 0.004)
    tables.write_report(everything, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["pareto.png", "rows.jsonl", "table.csv", "table.md"]
    assert rows.read_rows(tmp_path / "rows.jsonl") == everything
    assert imread(tmp_path / "pareto.png").std() > 0.01
    # Without latencies there is nothing to draw: said so, and the old picture does not stay.
    tables.write_report([row("a", 0, measure("accuracy", 0.5))], tmp_path)
    assert not (tmp_path / "pareto.png").exists()
    assert "No plot: no line knows both latency_p50" in (tmp_path / "table.md").read_text()
    with pytest.raises(ValueError, match="no rows"):
        tables.write_report([], tmp_path)


@pytest.mark.parametrize("count", [3, 15])
def test_labels_do_not_overlap_each_other(tmp_path, count):
    # All but three points lie within 1 % of each other.
    close = [
        plots.Point(f"variant number {i}", 1 + i / 1000, 90 + i / 100, size=1e6 * (i + 1)) for i in range(count - 3)
    ]
    far = [plots.Point(f"another variant {i}", 3.0 * i, 80.0 + i, 0.1, 0.5) for i in (1, 2, 3)]
    panel = plots.Panel("task", "machine", "x", "y", tuple(close + far), size_name="memory")
    (boxes,) = plots.pareto_plot([panel], tmp_path / "plot.png")
    assert len(boxes) == count and all(box.width > 30 and box.height > 8 for box in boxes)
    assert not any(plots.overlap(a, b) for i, a in enumerate(boxes) for b in boxes[:i])
    height, width, _ = imread(tmp_path / "plot.png").shape
    assert all(b.x0 >= 0 and b.x1 <= width and b.y0 >= 0 and b.y1 <= height for b in boxes)


def test_of_many_points_the_front_is_named(tmp_path):
    # Each is beaten by the one before it, but for the last, which is the best and the dearest.
    points = [plots.Point(f"variant {i}", 1.0 + i, 90.0 - i) for i in range(plots.NAMED)]
    panel = lambda *more: plots.Panel("task", "machine", "x", "y", (*points, *more))
    assert len(plots.pareto_plot([panel()], tmp_path / "plot.png")[0]) == plots.NAMED
    (boxes,) = plots.pareto_plot([panel(plots.Point("last", 100.0, 99.0))], tmp_path / "plot.png")
    assert len(boxes) == 2


def test_a_label_that_could_be_anothers_moves_or_gets_a_line():
    frame, extent = Bbox.from_extents(0, 0, 400, 400), Bbox.from_extents(0, 0, 40, 10)
    own = Bbox.from_extents(190, 190, 210, 210)
    place = lambda *others: plots._best_place((200, 200), 10, extent, frame, [own], [], [], others)
    # To the right of a marker of radius 10, after 4 pixels; nothing else is near.
    box, leader = place(((200, 260), 10))
    assert (box.x0, box.y0) == (214, 195) and leader == []
    # A small marker 5 pixels above that place, while the own is 4 away: the left side is free of doubt.
    box, leader = place(((234, 215), 5))
    assert box.x1 == 186 and leader == []
    # Two markers at one point: wherever the label stands, only a line from the centre says whose it is.
    box, leader = place(((200, 200), 10))
    assert leader[0] == (200, 200) and leader[-1] == (214, 200)


def test_every_batch_size_has_its_panel():
    numbers = [measure("accuracy", 0.5), *(measure("latency_p50", b / 1e3, batch=b) for b in (1, 64))]
    (table,) = tables.tables([row("a", 0, *numbers, measure("latency_p50", None, batch=512))])
    one, many = tables.panels(table)  # 512 is unknown to all lines
    assert one.title == "digits: accuracy against latency p50, batch 1" and one.points[0].x == 1.0
    assert many.title == "digits: accuracy against latency p50, batch 64" and many.points[0].x == 64.0
    assert many.x_label == "latency p50, batch 64 [ms]" and tables.panels(table, x="energy") == []


def test_a_report_survives_labels_that_do_not_fit(tmp_path):
    tables.write_report(trained("long " * 60, [0.5]), tmp_path, shown=["accuracy"])
    text = (tmp_path / "table.md").read_text()
    assert "No plot: 1 labels do not fit" in text and "accuracy [%]" in text and "latency" not in text
    assert sorted(p.name for p in tmp_path.iterdir()) == ["rows.jsonl", "table.csv", "table.md"]


@pytest.mark.parametrize(
    ("low", "direction", "scale"), [(0.01, "lower", "log"), (0.5, "lower", "linear"), (0.01, "higher", "linear")]
)
def test_losses_over_decades_have_a_log_axis(low, direction, scale):
    axis = Figure().subplots()
    points = (plots.Point("a", 1.0, low, y_error=5.0), plots.Point("b", 2.0, 1.0))
    plots._draw(axis, plots.Panel("task", "machine", "x", "y", points, ("lower", direction)))
    assert axis.get_yscale() == scale


def test_no_interval_of_a_share_leaves_0_to_100():
    axis = Figure().subplots()
    points = (plots.Point("a", 1.0, 98.0, y_error=5.0), plots.Point("b", 2.0, 3.0, y_error=40.0))
    plots._draw(axis, plots.Panel("task", "machine", "x", "y", points, ("lower", "higher"), most=100.0))
    ends = [segment[:, 1].tolist() for bars in axis.collections[::2] for segment in bars.get_segments()]
    assert ends == [[93.0, 100.0], [0.0, 43.0]]


@pytest.mark.parametrize(("direction", "lines"), [("lower", {5.0}), ("higher", {5.0, 1e-14})])
def test_a_level_far_off_a_log_axis_flattens_nothing(direction, lines):
    """An exact solution's error of 1e-14 is in the legend alone; on a linear axis every level is a line."""
    axis = Figure().subplots()
    levels = (("chance", 5.0), ("exact", 1e-14))
    points = (plots.Point("a", 1.0, 0.1), plots.Point("b", 2.0, 3.0))
    plots._draw(axis, plots.Panel("task", "machine", "x", "y", points, ("lower", direction), levels=levels))
    drawn = {line.get_label(): set(line.get_ydata()) for line in axis.lines}
    assert set().union(*(drawn[name] for name in drawn if name.startswith(("chance", "exact")))) == lines
    assert ("exact: 1e-14, off the axis" in drawn) == (direction == "lower")
    assert direction == "higher" or min(axis.get_ylim()) > 1e-2


def test_a_long_title_stays_on_the_page(tmp_path):
    """Ink in the last columns would be a title that is cut off there."""
    points = (plots.Point("a", 1.0, 2.0), plots.Point("b", 2.0, 3.0))
    for title in ("task", "cue_match(dims=2, " + "length=36, " * 12 + "): accuracy against latency"):
        plots.pareto_plot([plots.Panel(title, "machine", "x", "y", points)], tmp_path / "plot.png")
        image = imread(tmp_path / "plot.png")[..., :3]
        assert (image[:, -3:] == 1).all() and (image[:3] == 1).all()


def test_labels_that_cannot_fit_are_refused(tmp_path):
    panel = plots.Panel("task", "machine", "x", "y", (plots.Point("long " * 60, 1.0, 2.0),))
    with pytest.raises(ValueError, match="shorten the variant labels"):
        plots.pareto_plot([panel], tmp_path / "plot.png")
    assert not (tmp_path / "plot.png").exists()


def test_marker_area_is_proportional_to_memory():
    assert plots.marker_area(4e6, 4e6) == 2 * plots.marker_area(2e6, 4e6) == plots.LARGEST


def test_curves_of_one_label_look_alike_in_all_panels(tmp_path):
    line = lambda *labels: [plots.Curve(label, ((0.0, 1.0, 0.0, 0.0), (1.0, 2.0, 0.0, 0.0))) for label in labels]
    panels = {"few": line("b", "c"), "many": line("a", "b", "c")}
    looks = plots.curve_looks(panels)
    assert list(looks) == ["a", "b", "c"] and len(set(looks.values())) == 3
    plots.curve_plot(panels, tmp_path / "plot.png", x_label="x", y_label="y")
    assert (tmp_path / "plot.png").stat().st_size > 1000
