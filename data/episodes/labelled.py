"""`episodes`: N ways, K shots, from any labelled dataset whose test classes are not its training classes."""

import dataclasses
from collections.abc import Callable

import numpy as np

from lissom.data.class_stream import labels_of
from lissom.data.dataset import Dataset, Example, Source, gather
from lissom.data.episodes.drawn import SPLITS, Drawn
from lissom.data.errors import DataError, require

LABELLED = ("image", "signal", "frames")
HELD_OUT = 0x68656C64  # of a random stream, beside the splits


class EpisodeSource(Drawn):
    """`count` episodes over the examples of a labelled source whose classes are the keys of `members` (the places of
    their examples). Episode i is drawn by (seed, split, i) alone.

    The `ways` classes are drawn evenly and without repetition, and numbered in the order in which they are drawn. Of
    each, `queries` examples (a mean over the classes, where `concentration` is over 0) and then `shots` others are
    drawn without repetition. See `episodes` for the settings.
    """

    def __init__(
        self,
        source: Source,
        members: dict[int, np.ndarray],
        *,
        ways: int,
        shots: int,
        queries: int,
        candidates: int,
        concentration: float,
        count: int,
        split: str,
        seed: int,
    ):
        self.source, self.members, self.classes = source, members, np.array(sorted(members))
        self.ways, self.shots, self.queries = ways, shots, queries
        self.candidates, self.concentration = candidates, concentration
        super().__init__(count=count, split=split, seed=seed)

    def places(self, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(classes [ways], places of the support [ways * shots] and of the queries [ways * queries] in the source) of
        an episode; both lie class by class."""
        rng = self.stream(index)
        classes = rng.choice(self.classes, self.ways, replace=False)
        support, queries = [], []
        for label, asked in zip(classes, self._asked(rng), strict=True):
            given = self.candidates or self.shots
            drawn = rng.choice(self.members[int(label)], asked + given, replace=False)
            queries.append(drawn[:asked])
            support.append(self._farthest(drawn[asked:]) if self.candidates else drawn[asked:])
        return classes, np.concatenate(support), np.concatenate(queries)

    def _asked(self, rng: np.random.Generator) -> np.ndarray:
        """How many queries each class has."""
        if not self.concentration:
            return np.full(self.ways, self.queries)
        shares = rng.dirichlet(np.full(self.ways, self.concentration))
        return rng.multinomial(self.ways * self.queries, shares)

    def _farthest(self, places: np.ndarray) -> np.ndarray:
        """Of candidates of one class those that are farthest from their mean."""
        inputs = gather(self.source, places)["inputs"].reshape(len(places), -1)
        apart = np.square(inputs - inputs.mean(0)).sum(1)
        return places[np.argsort(-apart, kind="stable")[: self.shots]]

    def __getitem__(self, index: int) -> Example:
        classes, support, queries = self.places(index)
        found = gather(self.source, np.concatenate([support, queries]))
        numbers = np.searchsorted(classes, found["labels"], sorter=(order := np.argsort(classes)))
        labels, cut = order[numbers].astype(np.int32), len(support)
        return {
            "inputs": found["inputs"][cut:],
            "labels": labels[cut:],
            "support_inputs": found["inputs"][:cut],
            "support_labels": labels[:cut],
            "classes": np.searchsorted(self.classes, classes).astype(np.int32),
        }


class ExampleSource:
    """The examples of the classes of an `EpisodeSource` one by one, their labels the numbers of the classes."""

    def __init__(self, episodes: EpisodeSource):
        self.episodes = episodes
        self.places = np.sort(np.concatenate(list(episodes.members.values())))

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> Example:
        return {name: array[0] for name, array in self.gather(np.array([index])).items()}

    def gather(self, indices: np.ndarray) -> Example:
        """The examples at `indices`, stacked."""
        found = gather(self.episodes.source, self.places[indices])
        labels = np.searchsorted(self.episodes.classes, found["labels"]).astype(np.int32)
        return {"inputs": found["inputs"], "labels": labels}


def single_examples(dataset: Dataset) -> Dataset:
    """The dataset of episodes with the single examples of its training classes as training examples."""
    if not isinstance(dataset.train, EpisodeSource):
        raise DataError(f"the tasks of dataset {dataset.name!r} have no classes, whose examples could be learned from")
    train = ExampleSource(dataset.train)
    return dataclasses.replace(dataset, train=train, info={**dataset.info, "train_examples": len(train)})


def episodes(
    load: Callable[..., Dataset],
    *,
    source: str = "glyphs",
    source_kwargs: dict | None = None,
    ways: int = 5,
    shots: int = 1,
    queries: int = 15,
    support_candidates: int = 0,
    query_concentration: float = 0.0,
    held_out: int = 0,
    train_size: int = 1_000_000,
    test_size: int = 1_000,
    seed: int = 0,
) -> Dataset:
    """Episodes of `ways` classes: support_inputs [ways * shots, ...] with support_labels, queries inputs [ways *
    queries, ...] with labels, all numbered 0..ways - 1 in each episode (Vinyals et al. 2016, arXiv:1606.04080); classes
    [ways], which training (or test) classes they are.

    source: a labelled dataset, with settings `source_kwargs`. Training episodes are of its training examples and test
    episodes of its test examples; where these share classes, `held_out` of them, drawn by the seed, are kept for the
    test, and no others are in it. An episode never has an example twice.
    support_candidates, of test episodes alone: 0, the support is drawn evenly; else each class's shots are, of so many
    candidates, those that lie farthest from the candidates' mean in the space of the inputs: a support that is not like
    its class.
    query_concentration, of test episodes alone: 0, every class has `queries` queries; else shares drawn from a
    Dirichlet distribution of this concentration divide the ways * queries among the classes (2 in Veilleux et al. 2021,
    arXiv:2204.11181).
    train_size, test_size: episodes; the training episodes are drawn, not stored, so that many cost nothing.

    `info["chance"]` is 1 / ways, `train_classes` and `test_classes` count the classes to draw from.
    """
    base = load(source, **dict(source_kwargs or {}))
    require(
        base.kind in LABELLED, f"episodes: source={source!r} is {base.kind} data, and classes need one label an example"
    )
    for name, value, least in (
        *(("ways", ways, 2), ("shots", shots, 1), ("queries", queries, 1), ("held_out", held_out, 0)),
        *(("train_size", train_size, 1), ("test_size", test_size, 1), ("seed", seed, 0)),
    ):
        require(value >= least, f"episodes: {name} must be at least {least}, got {value}")
    require(
        not held_out or source != "glyphs",
        "episodes: letters of one script are turned copies of each other (n and u): hold scripts of glyphs out, by "
        "source_kwargs={'test_scripts': ...}, and not classes by held_out",
    )
    require(
        support_candidates == 0 or support_candidates > shots,
        f"episodes: support_candidates must be 0 or more than shots={shots}, got {support_candidates}",
    )
    require(
        0 <= query_concentration < np.inf,
        f"episodes: query_concentration must be a number and not negative, got {query_concentration}",
    )
    members = _class_split(source, base, held_out, seed)
    sources = {}
    for split, of_class in members.items():
        candidates, concentration = (support_candidates, query_concentration) if split == "test" else (0, 0.0)
        # A class may get all queries.
        needed = (candidates or shots) + (ways * queries if concentration else queries)
        _check_possible(source, split, of_class, ways, needed)
        sources[split] = EpisodeSource(
            base.split(split),
            of_class,
            ways=ways,
            shots=shots,
            queries=queries,
            candidates=candidates,
            concentration=concentration,
            count=train_size if split == "train" else test_size,
            split=split,
            seed=seed,
        )
    info = {
        "classes": ways,
        "chance": 1 / ways,
        "input_shape": tuple(base.info["input_shape"]),
        "shots": shots,
        "train_classes": len(members["train"]),
        "test_classes": len(members["test"]),
        "train_examples": train_size,
        "test_examples": test_size,
        **({"sha256": base.info["sha256"]} if "sha256" in base.info else {}),
    }
    return Dataset(name="episodes", kind="episode", info=info, **sources)


def _class_split(name: str, base: Dataset, held_out: int, seed: int) -> dict[str, dict[int, np.ndarray]]:
    """{split: {class: places of its examples}}, no class in both."""
    labels = {split: labels_of(base.split(split)) for split in SPLITS}
    train, test = (np.unique(labels[split]) for split in SPLITS)
    shared = np.intersect1d(train, test)
    if held_out:
        require(
            held_out < len(shared),
            f"episodes: held_out={held_out} of the {len(shared)} classes that both splits of {name!r} have leaves none",
        )
        test = np.sort(np.random.default_rng([seed, HELD_OUT]).permutation(shared)[:held_out])
        train = np.setdiff1d(train, test)
    require(
        not len(np.intersect1d(train, test)),
        f"episodes: {len(shared)} of the {len(test)} test classes of {name!r} are training classes: hold classes out "
        "with held_out=, or with settings of the dataset",
    )
    kept = {"train": train, "test": test}
    return {split: _by_class(labels[split], kept[split]) for split in SPLITS}


def _by_class(labels: np.ndarray, classes: np.ndarray) -> dict[int, np.ndarray]:
    order = np.argsort(labels, kind="stable")
    starts, stops = (np.searchsorted(labels, classes, side, sorter=order) for side in ("left", "right"))
    return {int(label): order[i:j] for label, i, j in zip(classes, starts, stops, strict=True)}


def _check_possible(name: str, split: str, members: dict[int, np.ndarray], ways: int, needed: int) -> None:
    require(
        len(members) >= ways, f"episodes: ways={ways}, and the {split} split of {name!r} has {len(members)} classes"
    )
    fewest = min(members, key=lambda label: len(members[label]))
    require(
        len(members[fewest]) >= needed,
        f"episodes: a class of an episode needs up to {needed} examples, and class {fewest} of the {split} split of "
        f"{name!r} has {len(members[fewest])}",
    )


def nearest_of_all(episodes: EpisodeSource) -> list[np.ndarray]:
    """For every episode the labels [Q] of its queries by the nearest, in the space of the inputs, of all other examples
    of its classes: what few shots are few of."""
    pictures = {
        label: gather(episodes.source, places)["inputs"].reshape(len(places), -1)
        for label, places in episodes.members.items()
    }
    found = []
    for index in range(len(episodes)):
        classes, _, asked = episodes.places(index)
        queries = gather(episodes.source, asked)["inputs"].reshape(len(asked), -1)
        apart = []
        for label in map(int, classes):
            own = pictures[label]
            squares = np.square(queries).sum(1)[:, None] + np.square(own).sum(1)[None] - 2 * queries @ own.T
            squares[asked[:, None] == episodes.members[label][None]] = np.inf
            apart.append(squares.min(1))
        found.append(np.argmin(apart, 0))
    return found
