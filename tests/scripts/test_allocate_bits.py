"""Bits for the layers of a trained run, and the rows of what is stored."""

import pytest

from lissom.compression.transforms import build_transforms
from lissom.evaluation.tables import tables
from lissom.training.errors import UserError
from scripts import allocate_bits
from tests.scripts.lines import command_line

ASKED = allocate_bits.Asked(("uniform", "hessian"), ("int2", "int8"), "int8", (), 0.0, 32, 16, 2)


def values(row):
    return {entry.name: entry.value for entry in row.measurements if not entry.conditions.keys() - {"batch"}}


def test_rows_are_of_what_was_allotted(tiny_run, capsys):
    _, path = tiny_run("vision/digits_resnet")
    mixed = allocate_bits.problem_of(path, ASKED).mixed
    budget = int(mixed.sizes.sum(0).mean()) + mixed.fixed
    rows = allocate_bits.rows_of([path], ASKED._replace(budgets=(budget,)))
    assert [row.identity.transform for row in rows] == [
        None,
        f"quantize uniform {budget}",
        f"quantize hessian {budget}",
    ]
    trained, uniform, hessian = map(values, rows)
    assert uniform["parameter_bytes"] == mixed.sizes.sum(0)[0] + mixed.fixed < hessian["parameter_bytes"] <= budget
    assert uniform["allocation_passes"] == 0 < hessian["allocation_passes"] and "allocation_passes" not in trained
    assert trained["bit_operations"] > hessian["bit_operations"]  # 16 bits against 8
    printed = capsys.readouterr().err
    assert (
        f"hessian {budget}: {hessian['parameter_bytes']:,} bytes" in printed
        and "('^stem$', {'weights': 'int" in printed
    )
    assert tables(rows)
    entry, allocation = allocate_bits.allocations(path, ASKED._replace(budgets=(budget,)))[f"hessian {budget}"]
    assert len(entry["rules"]) == len(allocation.choice) == len(mixed.paths) and build_transforms([entry])


def test_bisection_is_a_row(tiny_run):
    _, path = tiny_run("vision/digits_resnet")
    asked = ASKED._replace(methods=("random",), accuracy=0.5)
    ((_, entry),) = allocate_bits.allocations(path, asked).items()
    assert entry[1].passes >= 2 and set(entry[1].choice) <= {0, 1}


def test_a_text_network_is_allotted_too(tiny_run):
    _, path = tiny_run("language/stdlib_lm")
    problem = allocate_bits.problem_of(path, ASKED._replace(methods=("divergence",), examples=4, batch=4))
    assert problem.quality == "token_accuracy" and "embed" in problem.mixed.paths
    assert problem.value("loss")(problem.mixed.choice()) > 0


def test_domains_are_held_apart(tiny_run):
    _, path = tiny_run("language/domains_moe", **{"model.ffn": "swiglu"})
    asked = ASKED._replace(methods=("decoupled",), examples=64, batch=32, domains=("python", "english"))
    problem = allocate_bits.problem_of(path, asked)
    domains = [batch["domains"].argmax(-1) for kind in problem.kinds for batch in kind]
    assert len(problem.kinds) == 2 and {int(value) for values in domains for value in values} == {0, 2}
    budget = int(problem.mixed.sizes.sum(0).mean()) + problem.mixed.fixed
    ((_, allocation),) = allocate_bits.allocations(path, asked._replace(budgets=(budget,))).values()
    assert 0 < sum(allocation.choice) < len(allocation.choice)
    with pytest.raises(UserError, match="'domain_text' has no 'latin', but python, c"):
        allocate_bits.problem_of(path, asked._replace(domains=("latin", "python")))


def test_mistakes_are_one_sentence(tiny_run):
    _, path = tiny_run("vision/digits_resnet")
    with pytest.raises(
        UserError, match=r"--bytes=N is missing: of .* all layers alike take int2 [0-9,]+, int8 [0-9,]+"
    ):
        allocate_bits.allocations(path, ASKED)
    with pytest.raises(UserError, match=r"below the smallest .*all layers alike take int2"):
        allocate_bits.allocations(path, ASKED._replace(budgets=(10,)))
    with pytest.raises(UserError, match=r"--examples=100000: .* has [0-9]+ training examples"):
        allocate_bits.problem_of(path, ASKED._replace(examples=100_000))
    _, text = tiny_run("language/stdlib_lm", "text")
    with pytest.raises(UserError, match="this network has none"):
        allocate_bits.allocations(text, ASKED._replace(methods=("distilled",), examples=4, batch=4, budgets=(10**6,)))
    _, trained = tiny_run("vision/digits_qat", "qat")
    with pytest.raises(UserError, match=r"qat: the network is quantized already"):
        allocate_bits.problem_of(trained, ASKED)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "--run=DIRECTORY is missing"),
        (["--run=x", "--method=hesian"], "--method: 'hesian' must be one of uniform, random, hessian"),
        (["--run=x", "--options=int3"], "--options: 'int3' must be one of int8"),
        (["--run=x", "--activations=all"], "--activations: 'all' must be one of"),
        (["--run=x", "--bytes=1e4"], "--bytes=1e4 must be whole numbers"),
        (["--run=x", "--bytes=10", "--accuracy=0.9"], "are two questions"),
        (["--run=x", "--accuracy=0.9"], "chooses between two --options"),
        (["--run=x", "--accuracy=0.9", "--method=uniform"], "--method: 'uniform' must be one of random"),
        (["--run=x", "--method=decoupled"], "takes two --domains"),
        (["--run=x", "--domains=a,b"], "no other method takes any"),
        (["--run=x", "--samples=1"], "--samples=1 must be at least 2"),
        (["--run=x", "--examples=0"], "--examples=0 must be at least 1"),
        (["--run=nowhere", "--bytes=10"], "matches nothing"),
        (["--config=configs/vision/digits_resnet.py"], "takes no --config"),
    ],
)
def test_wrong_flags_are_one_sentence(words, told, capsys):
    with pytest.raises(SystemExit) as end, command_line(allocate_bits):
        allocate_bits.main(["allocate_bits.py", *words])
    said = capsys.readouterr().err
    assert end.value.code == 2 and said.count("\n") == 1 and told in said
