"""BiBench's score of binary networks (Qin et al. 2023, arXiv:2301.11233), from the rows of comparisons.

Of one comparison (a task and an architecture) and one seed, A the accuracy on the test set and A_c that on corrupted
ones, c each corruption at each severity, of the stored network and of the full-precision one of that seed:

    relative_accuracy               a = A / A_float
    relative_corruption_accuracy    r = sqrt(mean_c (A_c / A_c,float)^2)
    bibench_score                   sqrt((a^2 + r^2) / 2); of comparisons without corrupted test sets a alone, and the
                                    condition `tracks` says so

and beside the score

    relative_train_seconds          T / T_float
    compression_ratio               bytes_float / bytes, of numbers and scales and of the whole artefact on disk
    speedup                         latency_float / latency of a batch, both measured in one process

Over N comparisons a and r are the root mean squares of the N, and only the score and these two are given.

What is the paper's is the form: root mean squares of ratios to full precision. It has six tracks: tasks, architectures,
corruption, training, theoretical complexity, deployment on edge devices. Here the score is of accuracies alone, since
in a root mean square a ratio of bytes or times would drown them; tasks and architectures are the comparisons, each
counting alike; bytes and times are measured ones of the stored network, on the machine of the rows; and the
corruptions, which enter by the accuracy that is left, are those of data/corruptions.py.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence

from lissom.evaluation.rows import Measurement, Row, measure

COUNTS = ("examples", "tokens")
Values = Mapping[tuple, float]
"""{(name, kind, conditions): value} of a row; conditions without the counts of examples."""


def scored(comparisons: Sequence[Sequence[Row]], reference: str = "float", stored: str = "packed") -> list[Row]:
    """A row for each variant that has been stored (its transform is `stored`) and each seed that the full-precision
    variant, whose label is `reference`, has too; with several comparisons, each of one task, rows over all of them for
    the variants and seeds that all have. ValueError, one sentence, where there is nothing to be scored."""
    parts = _told_apart([_scored(rows, reference, stored) for rows in comparisons])
    return [row for part in parts for row in part] + (_over_all(parts) if len(parts) > 1 else [])


def _told_apart(parts: list[list[Row]]) -> list[list[Row]]:
    """Comparisons of one task and recipe, such as of two widths, are numbered."""
    tasks = [part[0].identity.task for part in parts]
    if len(set(tasks)) == len(tasks):
        return parts
    return [
        [dataclasses.replace(row, identity=dataclasses.replace(row.identity, task=f"{task} #{n + 1}")) for row in part]
        for n, (task, part) in enumerate(zip(tasks, parts, strict=True))
    ]


def _scored(rows: Sequence[Row], reference: str, stored: str) -> list[Row]:
    task = rows[0].identity.task
    known = {(row.identity.label, row.identity.transform, row.identity.seed): row for row in rows}
    labels = dict.fromkeys(label for label, transform, _ in known if transform is None)
    if reference not in labels:
        raise ValueError(f"{task} has no variant {reference!r} to be relative to: there are {', '.join(labels)}")
    found = []
    for (label, transform, seed), row in known.items():
        full = known.get((reference, None, seed))
        if transform == stored and full is not None:
            made = (*_relative(row, full), *_training(known.get((label, None, seed)), full))
            identity = dataclasses.replace(row.identity, task=f"{task}, {row.identity.recipe.partition(':')[0]}")
            found.append(dataclasses.replace(row, identity=identity, measurements=made))
    if not found:
        raise ValueError(f"{task} has no variant with the transform {stored!r} and a seed of {reference!r}")
    return found


def _relative(row: Row, full: Row) -> list[Measurement]:
    ours, theirs = _values(row), _values(full)
    plain = [key for key in ours if key[0] in ("accuracy", "token_accuracy") and not key[2]]
    if not plain:
        raise ValueError(f"{row.identity.task}: {row.identity.label!r} has no accuracy")
    corrupted = [key for key in ours if key[0] == "accuracy" and "corruption" in dict(key[2])]
    accuracy = _ratio(ours, theirs, plain[0])
    robustness = root_mean_square([_ratio(ours, theirs, key) for key in corrupted]) if corrupted else None
    found = _score(accuracy, robustness)
    for name in ("parameter_bytes", "artefact_bytes"):
        keys = [key for key in ours if key[0] == name]
        found += [measure("compression_ratio", 1 / _ratio(ours, theirs, key), key[1], of=name) for key in keys]
    # Imitated arithmetic has no speed, and machines are not compared.
    if row.provenance.hardware == full.provenance.hardware:
        keys = [key for key in ours if key[:2] == ("latency_p50", "measured") and key in theirs]
        found += [measure("speedup", 1 / _ratio(ours, theirs, key), **dict(key[2])) for key in keys]
    return found


def _training(trained: Row | None, full: Row) -> list[Measurement]:
    """Of the row in front of the transform, which knows what training took."""
    machine = lambda row: (row.trained or row.provenance).hardware
    key = ("train_seconds", "measured", ())
    if trained is None or machine(trained) != machine(full) or key not in _values(trained):
        return []
    return [measure("relative_train_seconds", _ratio(_values(trained), _values(full), key))]


def _score(accuracy: float, robustness: float | None, **conditions) -> list[Measurement]:
    tracks = {"accuracy": accuracy} | ({} if robustness is None else {"corruption": robustness})
    names = {"accuracy": "relative_accuracy", "corruption": "relative_corruption_accuracy"}
    found = [measure(names[track], value, **conditions) for track, value in tracks.items()]
    score = root_mean_square(list(tracks.values()))
    return [*found, measure("bibench_score", score, tracks=" ".join(tracks), **conditions)]


def _over_all(parts: Sequence[Sequence[Row]]) -> list[Row]:
    by_part = [{(row.identity.label, row.identity.seed): row for row in part} for part in parts]
    found = []
    for key, row in by_part[0].items():
        if all(key in part for part in by_part):
            values = [{m.name: m.value for m in part[key].measurements} for part in by_part]
            track = lambda name, values=values: [one[name] for one in values if name in one]
            accuracy, robustness = track("relative_accuracy"), track("relative_corruption_accuracy")
            whole = len(robustness) == len(parts)  # a mean of other comparisons would be another number
            made = _score(
                root_mean_square(accuracy), root_mean_square(robustness) if whole else None, comparisons=len(parts)
            )
            identity = dataclasses.replace(row.identity, task=f"all {len(parts)} comparisons")
            found.append(dataclasses.replace(row, identity=identity, measurements=tuple(made)))
    return found


def root_mean_square(values: Sequence[float]) -> float:
    return math.sqrt(math.fsum(value * value for value in values) / len(values))


def _values(row: Row) -> Values:
    conditions = lambda entry: tuple(sorted((k, v) for k, v in entry.conditions.items() if k not in COUNTS))
    known = (entry for entry in row.measurements if entry.value is not None)
    return {(entry.name, entry.kind, conditions(entry)): entry.value for entry in known}


def _ratio(ours: Values, theirs: Values, key: tuple) -> float:
    name = " ".join([key[0], *(f"{k}={v}" for k, v in key[2])])
    if not theirs.get(key):
        raise ValueError(f"{name} of the full-precision network is {theirs.get(key, 'unknown')}")
    return ours[key] / theirs[key]
