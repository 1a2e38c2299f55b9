"""Any two options work together: a pairwise covering array over what a recipe may choose, three tiny steps each."""

import itertools
import math

import pytest

OPTIONS = {
    "model.mixer": ("attention", "window", "mla", "ccgqa", "meta_tokens", "none"),
    "model.ffn": ("mlp", "swiglu", "moe", "none"),
    "model.norm": ("layernorm", "rmsnorm", "none"),
    "model.stack": ("loop", "scan"),
    "model.remat": (False, True),
    "model.dtype": ("float32", "bfloat16"),
    "optim.name": ("adamw", "sgd", "lion"),
    "optim.schedule": ("cosine", "linear", "constant"),
    "optim.accumulate": (1, 2),
    "mesh": ("data=1", "data=8", "data=2 fsdp=2 tensor=2", "data=2 expert=4"),
    "evaluation.transforms": ((), ({"name": "int8_weights"},)),
}
COMPRESSIONS = {"query_compression": 1, "cache_compression": 2}


def covering_array() -> list[dict]:
    """Greedy: each row takes, option by option, the value that covers most pairs that no row has yet."""
    names = list(OPTIONS)
    pairs = lambda row: {((a, i), (b, j)) for (a, i), (b, j) in itertools.combinations(row, 2)}
    missing = set()
    for a, b in itertools.combinations(names, 2):
        missing |= {((a, i), (b, j)) for i in range(len(OPTIONS[a])) for j in range(len(OPTIONS[b]))}
    rows = []
    while missing:
        (a, b) = min(missing)
        row = dict([a, b])
        for name in names:
            if name not in row:
                tried = [pairs(sorted([*row.items(), (name, i)], key=_order)) for i in range(len(OPTIONS[name]))]
                row[name] = max(range(len(tried)), key=[len(found & missing) for found in tried].__getitem__)
        missing -= pairs(sorted(row.items(), key=_order))
        rows.append({name: OPTIONS[name][row[name]] for name in names})
    return rows


def _order(item):
    return list(OPTIONS).index(item[0])


ROWS = covering_array()


def test_every_pair_is_covered():
    for a, b in itertools.combinations(OPTIONS, 2):
        seen = {(str(row[a]), str(row[b])) for row in ROWS}
        assert len(seen) == len(OPTIONS[a]) * len(OPTIONS[b])


@pytest.mark.parametrize("number", range(len(ROWS)))
def test_options(number, tiny_run):
    from lissom.eval import evaluate

    row = dict(ROWS[number])
    if row["model.mixer"] == "ccgqa":  # its own compressions need four heads
        row |= {f"model.mixer_kwargs.ccgqa.{name}": size for name, size in COMPRESSIONS.items()}
    mesh = {f"mesh.{axis}": int(size) for axis, size in (part.split("=") for part in row.pop("mesh").split())}
    result, workdir = tiny_run("vision/mnist1d_transformer", **{"mesh.data": 1, **mesh}, **row)
    assert result["traces"] == {"train": 1}
    assert math.isfinite(result["loss"])
    if row["evaluation.transforms"]:
        rows = evaluate([workdir], floors=False)
        assert [r.identity.transform for r in rows] == [None, "int8_weights"]
