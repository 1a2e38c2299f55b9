"""Episodes: exactly the classes, shots and queries asked for, no example twice, no class in both splits."""

import numpy as np
import pytest

from lissom import data
from lissom.data import DataError, load, single_examples
from lissom.data.dataset import ArraySource, Dataset
from lissom.data.episodes import nearest_of_all, regression
from lissom.data.glyphs import COPY, Letters, blurred, letter_script


def numbered(classes=range(8), test_classes=range(8, 14), each=20):
    """Pictures [2, 2, 1] that say which example of which class they are."""

    def split(labels):
        labels = np.repeat(np.array(list(labels), np.int32), each)
        within = np.tile(np.arange(each), len(labels) // each)
        inputs = np.stack([labels, within, labels * 0, labels * 0], 1).reshape(-1, 2, 2, 1).astype(np.float32)
        order = np.random.default_rng(0).permutation(len(labels))
        return ArraySource("image", {"inputs": inputs[order], "labels": labels[order]})

    info = {"input_shape": (2, 2, 1), "classes": 14}
    return Dataset(name="numbered", kind="image", train=split(classes), test=split(test_classes), info=info)


def made(dataset=None, **settings):
    from lissom.data.episodes import episodes

    whole = {"source": "numbered", "source_kwargs": {}, "train_size": 50, "test_size": 40}
    return episodes(lambda name, **_: dataset or numbered(), **whole | settings)


def identities(inputs):
    """(class, number) of each picture."""
    return [tuple(picture.ravel()[:2].astype(int)) for picture in inputs]


@pytest.mark.parametrize(("ways", "shots", "queries"), [(2, 1, 1), (5, 3, 4), (6, 5, 15)])
def test_an_episode_is_what_was_asked_for(ways, shots, queries):
    dataset = made(ways=ways, shots=shots, queries=queries)
    for source, known in ((dataset.train, range(8)), (dataset.test, range(8, 14))):
        for index in range(len(source)):
            episode = source[index]
            given, asked = identities(episode["support_inputs"]), identities(episode["inputs"])
            assert len({*given, *asked}) == ways * (shots + queries), "an example stands twice"
            classes = episode["classes"] + known[0]
            assert len(set(classes)) == ways and set(classes) <= set(known)
            for pictures, labels, each in (
                (given, episode["support_labels"], shots),
                (asked, episode["labels"], queries),
            ):
                assert np.bincount(labels, minlength=ways).tolist() == [each] * ways
                assert [int(classes[label]) for label in labels] == [picture[0] for picture in pictures]


def test_episode_depends_on_settings_split_and_number_alone():
    one, other = made(), made()
    at = lambda source, index: {key: value.tobytes() for key, value in source[index].items()}
    _ = [other.train[i] for i in (3, 1)]  # what was drawn before does not matter
    assert at(one.train, 7) == at(other.train, 7)
    assert at(one.train, 7) != at(one.train, 8)
    assert at(one.train, 7) != at(made(seed=1).train, 7)
    kwargs = {"batch_size": 4, "seed": 3}
    whole = [data.train_batch(one, step=step, **kwargs) for step in range(30)]
    resumed = next(data.train_batches(other, start_step=29, **kwargs))
    np.testing.assert_array_equal(whole[29]["inputs"], resumed["inputs"])
    halves = [data.train_batch(one, step=9, process=process, processes=2, **kwargs) for process in range(2)]
    np.testing.assert_array_equal(np.concatenate([half["labels"] for half in halves]), whole[9]["labels"])
    assert len({batch["inputs"].tobytes() for batch in whole}) == 30


@pytest.mark.parametrize("name", ["regression_tasks", "linear_tasks", "episodes"])
def test_a_loop_over_a_source_ends(name):
    dataset = made(test_size=3) if name == "episodes" else load(name, test_size=3)
    assert len(list(dataset.test)) == len(dataset.test) == 3
    with pytest.raises(IndexError, match="task 3 of 3"):
        dataset.test[3]


def test_every_class_is_drawn():
    dataset = made(ways=2, train_size=400)
    classes = np.concatenate([dataset.train[i]["classes"] for i in range(400)])
    assert np.bincount(classes).min() > 0.6 * 800 / 8


def test_held_out_classes_are_in_no_training_episode():
    both = numbered(range(10), range(10))
    dataset = made(both, held_out=6, ways=4)
    seen = {key: {p[0] for i in range(40) for p in identities(getattr(dataset, key)[i]["inputs"])} for key in data_keys}
    assert seen["train"] & seen["test"] == set() and len(seen["train"]) == 4 and len(seen["test"]) == 6
    with pytest.raises(DataError, match="10 of the 10 test classes of 'numbered' are training classes: hold"):
        made(both)
    with pytest.raises(
        DataError, match="held_out=10 of the 10 classes that both splits of 'numbered' have leaves none"
    ):
        made(both, held_out=10)


data_keys = ("train", "test")


UNKIND = {"support_candidates": 8, "query_concentration": 1.0}


def test_support_of_candidates_is_the_farthest():
    dataset = made(ways=3, shots=2, queries=5, support_candidates=8)
    for index in range(20):
        episode = dataset.test[index]
        classes, support, queries = dataset.test.places(index)
        rng = np.random.default_rng([0, 1, index])
        rng.choice(dataset.test.classes, 3, replace=False)
        for label in range(3):
            drawn = rng.choice(dataset.test.members[int(classes[label])], 13, replace=False)
            numbers = numbered().test.gather(drawn[5:])["inputs"].reshape(8, 4)[:, 1]
            farthest = np.sort(np.abs(numbers - numbers.mean()))[-2:]
            mine = episode["support_inputs"].reshape(-1, 4)[episode["support_labels"] == label][:, 1]
            np.testing.assert_allclose(np.sort(np.abs(mine - numbers.mean())), farthest)
        assert set(support) & set(queries) == set()


def test_shares_of_queries_are_drawn():
    dataset = made(numbered(each=30), ways=4, queries=5, query_concentration=1.0)
    counts = np.stack([np.bincount(dataset.test[i]["labels"], minlength=4) for i in range(40)])
    assert (counts.sum(1) == 20).all() and counts.std() > 2 and len(np.unique(counts)) > 5
    np.testing.assert_allclose(counts.mean(0), 5, atol=2)


def test_training_episodes_are_even():
    """Whatever the test's are: their classes need no more examples than even ones do."""
    plain, other = (made(numbered(each=30), ways=4, queries=5, **unkind) for unkind in ({}, UNKIND))
    for index in range(5):
        np.testing.assert_array_equal(plain.train[index]["inputs"], other.train[index]["inputs"])
        assert not np.array_equal(plain.test[index]["inputs"], other.test[index]["inputs"])


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"ways": 9}, "ways=9, and the train split of 'numbered' has 8 classes"),
        ({"ways": 7}, "ways=7, and the test split of 'numbered' has 6 classes"),
        ({"shots": 6}, "needs up to 21 examples, and class 0 of the train split of 'numbered' has 20"),
        ({"ways": 2, "query_concentration": 1.0}, "needs up to 31 examples"),
        ({"support_candidates": 6}, "needs up to 21 examples"),
        ({"ways": 1}, "ways must be at least 2, got 1"),
        ({"shots": 0}, "shots must be at least 1, got 0"),
        ({"queries": 0}, "queries must be at least 1, got 0"),
        ({"test_size": 0}, "test_size must be at least 1, got 0"),
        ({"held_out": -1}, "held_out must be at least 0, got -1"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"source": "glyphs", "held_out": 3}, "hold scripts of glyphs out, by source_kwargs="),
        ({"query_concentration": float("inf")}, "query_concentration must be a number and not negative, got inf"),
        ({"support_candidates": 1}, "support_candidates must be 0 or more than shots=1, got 1"),
        ({"query_concentration": -1.0}, "query_concentration must be a number and not negative, got -1.0"),
    ],
)
def test_impossible_episodes_are_one_sentence(settings, sentence):
    with pytest.raises(DataError, match=sentence) as caught:
        made(**settings)
    assert "\n" not in str(caught.value)


def test_sources_without_classes_are_refused(tmp_path):
    with pytest.raises(DataError, match="source='sequences' is tokens data, and classes need one label an example"):
        load("episodes", source="sequences", source_kwargs={"train_size": 20, "test_size": 10}, data_dir=str(tmp_path))
    with pytest.raises(DataError, match="dataset episodes has no setting 'way'; did you mean 'ways'"):
        load("episodes", way=5)


def test_single_examples():
    """Those of the training classes, numbered from 0, and the test is as it was."""
    episodes = made(numbered(range(3, 8)), ways=4)
    dataset = single_examples(episodes)
    assert len(dataset.train) == dataset.info["train_examples"] == 100 and dataset.test is episodes.test
    found = dataset.train.gather(np.arange(100))
    np.testing.assert_array_equal(found["labels"] + 3, found["inputs"].reshape(100, 4)[:, 0])
    assert len({*identities(found["inputs"])}) == 100
    np.testing.assert_array_equal(dataset.train[17]["inputs"], found["inputs"][17])
    with pytest.raises(DataError, match="the tasks of dataset 'regression_tasks' have no classes"):
        single_examples(load("regression_tasks"))


def test_all_examples_tell_what_few_do_not():
    """Classes lie 1 apart and their examples within 0.4; a query never counts as its own neighbour."""
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(6, dtype=np.int32), 20)
    split = lambda: ArraySource("image", {"inputs": labels[:, None] + rng.uniform(0, 0.4, (120, 1)), "labels": labels})
    base = Dataset(name="line", kind="signal", train=split(), test=split(), info={"input_shape": (1,)})
    test = made(base, held_out=3, ways=3).test
    said = nearest_of_all(test)
    assert all((answer == test[i]["labels"]).all() for i, answer in enumerate(said))
    # Two examples of a class, far from each other: without itself, the nearest is of another class.
    pairs = ArraySource("image", {"inputs": np.float32([[0], [9], [1], [10]]), "labels": np.int32([0, 0, 1, 1])})
    base = Dataset(name="pairs", kind="signal", train=pairs, test=pairs, info={"input_shape": (1,)})
    base = Dataset(**{**vars(base), "train": ArraySource("image", {**pairs.arrays, "labels": np.int32([2, 2, 3, 3])})})
    test = made(base, ways=2, queries=1, test_size=3).test
    assert all((answer != test[i]["labels"]).all() for i, answer in enumerate(nearest_of_all(test)))


# ---- letters ------------------------------------------------------------------------------------------------------


def test_a_turned_letter_is_no_new_class():
    """Lisu has turned Latin capitals; none is left, and of all held-out letters none is a copy of a training letter."""
    letters = Letters(16)
    known = letters.classes()
    of = lambda script: [letter for letter in known if letter_script(letter) == script]
    assert "ꓤ" in of("lisu") and "R" in of("latin")  # an R turned by a half
    kept = letters.without_copies(of("lisu"), of("latin"))
    assert "ꓤ" not in kept and "ꓕ" not in kept
    font = "DejaVuSans"
    drawn = lambda names: [blurred(letters.picture(name, font)) for name in names if font in letters.fonts_of[name]]
    others = np.stack(drawn(of("latin")))
    georgian = letters.without_copies(of("georgian"), of("latin"))
    assert 10 < len(georgian) <= len(of("georgian"))
    for letter in georgian:
        if font in (letters.fonts_of[letter][0], letters.fonts_of[letter][-1]):
            turned = [blurred(np.rot90(letters.picture(letter, font), turns)) for turns in range(4)]
            assert (others @ np.stack(turned, 1)).max() <= COPY
    assert letters.without_copies(["A", "B"], []) == ["A", "B"]


# ---- generated families -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", regression.CURVES)
def test_targets_are_those_of_one_curve(family):
    """Least squares in the family, from the support, is exact on the queries: the ceiling of the tables."""
    dataset = load("regression_tasks", families=(family,), shots=4, queries=7, test_size=20)
    for index, said in enumerate(regression.solve(dataset.test)):
        task = dataset.test[index]
        np.testing.assert_allclose(said, task["labels"], atol=1e-4)
        assert task["inputs"].shape == (7, 1) and task["support_inputs"].shape == (4, 1)
    assert np.std([dataset.test[i]["labels"].mean() for i in range(20)]) > 0.1


def test_curves_by_hand():
    x = np.array([0.0, 2.0])
    np.testing.assert_allclose(regression.sinusoid(x, np.array([3.0, 0.5])), 3 * np.sin([-0.5, 1.5]))
    np.testing.assert_allclose(regression.ramp(x, np.array([3.0, 0.5])), [0.5, 6.5])


def test_a_system_moves_its_states():
    from lissom.data import dynamics

    dataset = load("regression_tasks", families=("oscillator",), shots=3, queries=5, interval=0.4)
    task, family = dataset.train[5], dynamics.FAMILIES["oscillator"]
    assert dataset.info["outputs"] == 2 and task["labels"].shape == (5, 2)
    # A spring is linear: from three states, what becomes of all others follows.
    before, after = (np.concatenate([task[f"support_{name}"], task[name]]) for name in ("inputs", "labels"))
    before, after = (states * family.deviation + family.mean for states in (before, after))
    flow = np.linalg.lstsq(before[:3], after[:3], rcond=None)[0]
    np.testing.assert_allclose(before[3:] @ flow, after[3:], atol=1e-4)
    assert np.abs(after - before).max() > 0.1


@pytest.mark.parametrize("families", [("sinusoid", "ramp"), ("duffing", "selkov", "van_der_pol")])
def test_tasks_of_several_families_are_the_same_together_and_alone(families):
    source = load("regression_tasks", families=families, shots=3, queries=4, noise=0.2).train
    together = source.gather(np.array([7, 2, 11, 0, 3, 5, 7]))
    assert len(set(together["family"].tolist())) == len(families)
    for at, index in enumerate((7, 2, 11, 0, 3, 5, 7)):
        for name, value in source[index].items():
            np.testing.assert_array_equal(together[name][at], value)


def test_noise_is_in_the_support_alone():
    clean, noisy = (load("regression_tasks", shots=50, queries=20, noise=noise).train[3] for noise in (0.0, 0.5))
    np.testing.assert_array_equal(clean["labels"], noisy["labels"])
    assert 0.3 < (noisy["support_labels"] - clean["support_labels"]).std() < 0.7


def test_linear_tasks():
    dataset = load("linear_tasks", dims=3, ways=4, shots=2, queries=6, test_size=20)
    for index in range(20):
        task = dataset.test[index]
        for part, each in (("support_", 2), ("", 6)):
            said = (task[f"{part}inputs"] @ task["directions"]).argmax(1)
            np.testing.assert_array_equal(said, task[f"{part}labels"])
            assert np.bincount(said, minlength=4).tolist() == [each] * 4
        np.testing.assert_allclose(np.linalg.norm(task["directions"], axis=0), 1, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "settings", "sentence"),
    [
        ("regression_tasks", {"families": ("sinus",)}, "has no family 'sinus'; did you mean 'sinusoid'"),
        ("regression_tasks", {"families": ()}, "families must name at least one family"),
        ("regression_tasks", {"families": ("ramp", "ramp")}, "families names 'ramp' twice"),
        ("regression_tasks", {"families": ("ramp", "selkov")}, "mixes functions of a line with systems in the plane"),
        ("regression_tasks", {"shots": 0}, "shots must be at least 1, got 0"),
        ("regression_tasks", {"noise": -1.0}, "noise must not be negative, got -1.0"),
        ("regression_tasks", {"interval": 0.0, "families": ("duffing",)}, "interval must be above 0, got 0.0"),
        ("regression_tasks", {"interval": 0.2}, r"interval=0.2 is of systems in the plane, and families=\('sinusoid'"),
        ("regression_tasks", {"seed": -1}, "seed must be at least 0, got -1"),
        ("linear_tasks", {"seed": -1}, "seed must be at least 0, got -1"),
        ("linear_tasks", {"dims": 1}, "dims must be at least 2, got 1"),
        ("linear_tasks", {"ways": 1}, "ways must be at least 2, got 1"),
    ],
)
def test_impossible_tasks_are_one_sentence(name, settings, sentence):
    with pytest.raises(DataError, match=sentence):
        load(name, **settings)
