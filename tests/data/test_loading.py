"""Preparation, folders, plug-ins, TFDS directories, and the sentence a user gets for what is not there."""

import inspect
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest

from lissom.data import DATASETS, ArraySource, DataError, Dataset, load
from lissom.data import preparation as prep
from lissom.data.content import Content, Definition

SMALL = {"task": "copy", "length": 8, "train_size": 30, "test_size": 10}


def sentence(name, **settings):
    with pytest.raises(DataError) as error:
        load(name, **settings)
    assert "\n" not in str(error.value)
    return str(error.value)


def run(code: str, **environment) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", code],
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_no_tensorflow_and_no_jax_before_a_batch(tmp_path):
    code = (
        "import sys, lissom.data as d\n"
        "assert not {'jax', 'grain', 'tensorflow_datasets', 'sklearn', 'matplotlib'} & set(sys.modules)\n"
        "data = d.load('digits')\n"
        "d.train_batch(data, step=0, batch_size=8, seed=0)\n"
        "assert not [m for m in sys.modules if m.split('.')[0] in ('tensorflow', 'sklearn')]\n"
        "print(len(data.train), len(data.test))"
    )
    out, err = run(code, TFDS_DATA_DIR=str(tmp_path)).communicate(timeout=100)
    assert out == "1437 360\n", err


def test_two_processes_prepare_one_directory(tmp_path):
    code = (
        "import lissom.data as d, lissom.data.preparation as p\n"
        "write = p._write\n"
        "def counted(*a): print('wrote'); write(*a)\n"
        "p._write = counted\n"
        "data = d.load('sequences', task='copy', train_size=2000, test_size=500)\n"
        "print(int(data.train.gather(range(2000))['inputs'].sum()))"
    )
    both = [run(code, TFDS_DATA_DIR=str(tmp_path)) for _ in range(2)]
    outs = [process.communicate(timeout=100) for process in both]
    assert [process.returncode for process in both] == [0, 0], outs
    lines = [out.split() for out, _ in outs]
    assert sum(line.count("wrote") for line in lines) == 1
    assert lines[0][-1] == lines[1][-1]


def test_settings_facts_and_version_name_the_directory(tmp_path):
    calls = []

    def generate(*, size: int = 3) -> Content:
        calls.append(size)
        arrays = {"inputs": np.zeros((4, size, 1), np.float32), "labels": np.zeros(4, np.int32)}
        return Content("signal", arrays, arrays, {"classes": 1})

    plain = Definition(generate)
    for definition, size in [
        (plain, 3),
        (plain, 3),  # the one that is there
        (plain, 5),
        (Definition(generate, version="1.0.1"), 3),
        (Definition(generate, facts=lambda: {"python": "3.12.99"}), 3),
    ]:
        data = prep.prepared("toy", definition, {"size": size}, str(tmp_path))
        assert data.train[0]["inputs"].shape == data.info["input_shape"] == (size, 1)
    assert calls == [3, 5, 3, 3]


def test_a_process_reads_a_set_once(tmp_path):
    """Until another stands in its directory; what is told of it, and its numbers, nobody can change for others."""
    calls = []

    def generate():
        calls.append(1)
        arrays = {"inputs": np.full((3, 2), len(calls), np.float32), "labels": np.zeros(3, np.int32)}
        return Content("signal", arrays, arrays)

    load_again = lambda: prep.prepared("toy", Definition(generate), {}, str(tmp_path))
    first, again = load_again(), load_again()
    assert first.train is again.train and first.name == "toy"
    again.info["classes"] = 7
    assert "classes" not in load_again().info
    with pytest.raises(ValueError, match="read-only"):
        first.train.arrays["inputs"][0] = 1
    shutil.rmtree(tmp_path)
    assert load_again().train[0]["inputs"].tolist() == [2, 2] and first.train[0]["inputs"].tolist() == [1, 1]


def test_large_sets_are_read_record_by_record_with_the_same_examples(monkeypatch):
    small = load("sequences", **SMALL)
    monkeypatch.setattr(prep, "IN_MEMORY_BYTES", 0)
    large = load("sequences", **SMALL)
    assert isinstance(small.train, ArraySource) and not isinstance(large.train, ArraySource)
    assert len(large.train) == 30
    for index in (0, 29):
        for name, array in small.train[index].items():
            np.testing.assert_array_equal(array, large.train[index][name])


def test_a_split_read_many_at_a_time_is_the_split_read_one_by_one(monkeypatch):
    monkeypatch.setattr(prep, "AT_ONCE", 7)  # 30 and 10 are no multiples
    prep.read.cache_clear()
    whole = load("sequences", **SMALL)
    monkeypatch.setattr(prep, "IN_MEMORY_BYTES", 0)
    single = load("sequences", **SMALL)
    for ours, records in ((whole.train, single.train), (whole.test, single.test)):
        assert len(ours) == len(records)
        for index in range(len(ours)):
            for name, value in records[index].items():
                np.testing.assert_array_equal(ours[index][name], value)


def test_images_survive_storage_as_png(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (3, 5, 6, 3), dtype=np.uint8)
    arrays = {"inputs": images, "labels": np.arange(3, dtype=np.int32)}
    definition = Definition(lambda: Content("image", arrays, arrays))
    data = prep.prepared("colours", definition, {}, str(tmp_path))
    found = data.train.gather(np.arange(3))
    np.testing.assert_array_equal(found["inputs"], images.astype(np.float32) / np.float32(255))
    assert found["labels"].tolist() == [0, 1, 2]


@pytest.mark.parametrize("name", [n for n in DATASETS if n not in ("digits", "mnist5k", "stdlib_text", "domain_text")])
def test_generated_sets_have_enough_test_examples_by_default(name):
    functions = [DATASETS[name].generate]
    if DATASETS[name].choice:
        functions = DATASETS[name].choice[1].values()
    for function in functions:
        parameters = inspect.signature(function).parameters
        if "test_size" in parameters:
            of = lambda name, parameters=parameters: parameters[name].default if name in parameters else 1
            # An episode asks as many queries, of each of its ways.
            assert of("test_size") * of("queries") * of("ways") >= 5000
        else:
            assert len(function().test["inputs"]) >= 5000


def test_npz_folder(tmp_path):
    images = np.arange(2 * 4 * 4, dtype=np.uint8).reshape(2, 4, 4, 1)
    for split in ("train", "test"):
        np.savez(tmp_path / f"{split}.npz", inputs=images, labels=np.array([0, 4]))
    data = load(str(tmp_path))
    assert data.kind == "image" and data.info["classes"] == 5 and data.info["input_shape"] == (4, 4, 1)
    np.testing.assert_allclose(data.test[1]["inputs"], images[1] / 255, rtol=1e-6)
    assert load(str(tmp_path), kind="image").kind == "image"
    assert "inputs" in sentence(str(tmp_path), kind="signal")


def test_npz_folder_of_frames(tmp_path):
    counts = np.arange(2 * 3 * 4 * 5, dtype=np.uint8).reshape(2, 3, 4, 5)
    for split in ("train", "test"):
        np.savez(tmp_path / f"{split}.npz", inputs=counts[..., None], labels=np.array([0, 4]))
    data = load(str(tmp_path))
    assert data.kind == "frames" and data.info["classes"] == 5 and data.info["input_shape"] == (3, 4, 5, 1)
    np.testing.assert_array_equal(data.test[1]["inputs"][..., 0], counts[1])  # counts, not divided by 255
    for split in ("train", "test"):
        np.savez(tmp_path / f"{split}.npz", inputs=counts, labels=np.array([0, 4]))
    assert load(str(tmp_path)).kind == "image"  # four axes
    np.testing.assert_array_equal(load(str(tmp_path), kind="frames").test[1]["inputs"][..., 0], counts[1])
    assert "inputs of kind frames have 5 axes, got (2, 4)" in sentence_of_frames(tmp_path)


def sentence_of_frames(folder):
    for split in ("train", "test"):
        np.savez(folder / f"{split}.npz", inputs=np.zeros((2, 4)), labels=np.array([0, 4]))
    return sentence(str(folder), kind="frames")


def test_npz_folder_of_tokens(tmp_path):
    tokens = np.array([[1, 2, 3], [4, 5, 6]])
    for split in ("train", "test"):
        np.savez(tmp_path / f"{split}.npz", inputs=tokens, labels=tokens + 1)
    data = load(str(tmp_path))
    assert data.kind == "tokens" and data.info["vocab_size"] == 8
    np.testing.assert_array_equal(data.train[0]["weights"], np.ones(3, np.float32))


def test_npz_folder_that_is_not_right_is_one_sentence(tmp_path):
    assert "train.npz" in sentence(str(tmp_path / "nowhere"))
    (tmp_path / "train.npz").write_bytes(b"not a zip file")
    assert "cannot be read" in sentence(str(tmp_path))
    np.savez(tmp_path / "train.npz", images=np.zeros(3))
    assert "lacks the array ['inputs']" in sentence(str(tmp_path))
    np.savez(tmp_path / "train.npz", inputs=np.zeros((3, 4, 4)), labels=np.zeros(3))
    np.savez(tmp_path / "test.npz", inputs=np.zeros((3, 4, 4)), labels=np.zeros(3))
    assert "labels must be integers" in sentence(str(tmp_path))


def plug_in(*, size: int = 4) -> Dataset:
    source = ArraySource("signal", {"inputs": np.zeros((size, 5, 1)), "labels": np.zeros(size)})
    return Dataset("mine", "signal", source, source, {"classes": 1})


def not_a_dataset():
    return 3


def test_plug_in(monkeypatch):
    monkeypatch.setitem(sys.modules, "my_package", sys.modules[__name__])
    assert len(load("my_package:plug_in", size=6).train) == 6
    assert "no setting 'sise'; did you mean 'size'" in sentence("my_package:plug_in", sise=6)
    assert "must return a lissom.data.Dataset, got int" in sentence("my_package:not_a_dataset")
    assert "cannot be imported" in sentence("my_package:nothing")
    assert "cannot be imported" in sentence("no_such_package:thing")


def test_a_missing_dataset_says_where_it_was_looked_for_and_how_to_prepare_it(data_dir):
    text = sentence("cifar10")
    assert str(data_dir) in text
    assert "uvx --from tensorflow-datasets --with tensorflow tfds build cifar10 --file_format=array_record" in text
    assert "did you mean 'digits'" in sentence("digit")


@pytest.mark.parametrize(
    ("name", "settings", "text"),
    [
        ("digits", {"confg": "shifted"}, "no setting 'confg'; did you mean 'config'? known: config, noise_up_to"),
        ("digits", {"config": "shift"}, "did you mean 'shifted'"),
        ("sequences", {"task": "coppy"}, "no task 'coppy'; did you mean 'copy'"),
        ("sequences", {"task": "copy", "pairs": 3}, "sequences (task=copy) has no setting 'pairs'"),
        ("sequences", {"length": "long"}, "length is of type int (default 64), got 'long'"),
        ("sequences", {"task": "copy", "length": 7}, "length must be even"),
        ("mnist1d", {"train_size": 7, "test_size": 8}, "multiple of 10"),
        ("cue_match", {"items": 7}, "items must be a multiple of classes=4"),
        ("glyphs", {"scripts": ("latn",)}, "unknown script 'latn'; did you mean 'latin'"),
        ("stdlib_text", {"length": 0}, "length must be at least 1"),
        ("stdlib_text", {"test_size": -1}, "test_size must be at least 1, or 0: all windows, got -1"),
        ("domain_text", {"domains": ("python", "jason")}, "no domain 'jason'; did you mean 'json'"),
        ("domain_text", {"domains": ("json", "json")}, "domains must be two or more"),
        ("domain_text", {"tested": "pascal"}, "tested must be one of python, c,"),
        ("domain_text", {"levels": 1}, "levels must be in 2..256"),
        ("domain_text", {"test_size": 10_000}, "windows of 128, and test_size=10000 asks for more"),
    ],
)
def test_bad_settings_are_one_sentence(name, settings, text):
    assert text in sentence(name, **settings)


def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    assert "could not be prepared under" in sentence("sequences", data_dir=str(tmp_path / "file"), **SMALL)


def prepare_with_tfds(folder, features, examples, name="toy_set"):
    """A dataset as `tfds build` leaves it, of the examples of each split, or of the same ones in two."""
    import tensorflow_datasets as tfds
    from etils import epath

    class Prepared(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("3.0.1")
        pkg_dir_path = epath.Path(folder)
        code_path = epath.Path(__file__)

        def _info(self):
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features), disable_shuffling=True
            )

        def _split_generators(self, dl_manager):
            given = examples if isinstance(examples, dict) else dict.fromkeys(("train", "validation"), examples)
            return {split: self._generate_examples(some) for split, some in given.items()}

        def _generate_examples(self, some):
            yield from enumerate(some)

    Prepared.name = name
    Prepared(data_dir=folder, file_format="array_record").download_and_prepare()


def test_prepared_tfds_images(tmp_path):
    import tensorflow_datasets as tfds

    images = np.random.default_rng(0).integers(0, 256, (5, 6, 8, 3), dtype=np.uint8)
    prepare_with_tfds(
        tmp_path,
        {"image": tfds.features.Image(shape=(6, 8, 3)), "label": tfds.features.ClassLabel(num_classes=4)},
        [{"image": prep.encode_image(image), "label": i % 4} for i, image in enumerate(images)],
    )
    data = load("toy_set", data_dir=str(tmp_path))
    assert data.kind == "image" and data.info["classes"] == 4 and len(data.test) == 5
    np.testing.assert_array_equal(data.train[3]["inputs"], images[3].astype(np.float32) / np.float32(255))
    assert data.train[3]["labels"] == 3
    small = load("toy_set", data_dir=str(tmp_path), image_size=4, train_split="train[:2]")
    assert small.train[0]["inputs"].shape == (4, 4, 3) and len(small.train) == 2
    assert "no setting 'imagesize'; did you mean 'image_size'" in sentence(
        "toy_set", data_dir=str(tmp_path), imagesize=4
    )


def test_episodes_of_prepared_tfds_images(tmp_path):
    """With the features and the splits of omniglot: classes of the test are none of training. An example is known by
    its picture, all of one grey."""
    import tensorflow_datasets as tfds

    label = lambda count: tfds.features.ClassLabel(num_classes=count)
    features = {"image": tfds.features.Image(shape=(105, 105, 3)), "label": label(9)}
    features |= {"alphabet": label(3), "alphabet_char_id": tfds.features.Scalar(np.int64)}

    def example(number, drawer):
        picture = np.full((105, 105, 3), 20 * number + drawer, np.uint8)
        return {"image": prep.encode_image(picture), "label": number, "alphabet": number // 3, "alphabet_char_id": 1}

    of = lambda classes: [example(number, drawer) for drawer in range(5) for number in classes]
    prepare_with_tfds(tmp_path, features, {"train": of(range(5)), "test": of(range(5, 9))}, name="omniglot")
    given = {"source": "omniglot", "source_kwargs": {"data_dir": str(tmp_path), "image_size": 7}}
    data = load("episodes", **given, ways=3, shots=2, queries=3, train_size=8, test_size=8)
    assert data.info["train_classes"] == 5 and data.info["test_classes"] == 4
    assert data.info["input_shape"] == (7, 7, 3)
    for source, classes in ((data.train, range(5)), (data.test, range(5, 9))):
        for episode in (source[i] for i in range(len(source))):
            greys = {}
            for part in ("support_", ""):
                pictures, labels = episode[f"{part}inputs"], episode[f"{part}labels"]
                shown = np.rint(255 * pictures[:, 0, 0, 0]).astype(int)
                np.testing.assert_array_equal(np.asarray(classes)[episode["classes"][labels]], shown // 20)
                greys[part] = set(shown.tolist())
            assert len(greys["support_"]) == 6 and len(greys[""]) == 9 and not greys["support_"] & greys[""]
    assert "a class of an episode needs up to 6 examples" in sentence("episodes", **given, ways=3, shots=3, queries=3)


def test_prepared_tfds_frames(tmp_path):
    import tensorflow_datasets as tfds

    def prepare(folder, **tensor):
        feature = tfds.features.Tensor(**tensor)
        features = {"video": feature, "label": tfds.features.ClassLabel(num_classes=4)}
        prepare_with_tfds(folder, features, [{"video": x, "label": i} for i, x in enumerate(counts)])
        return str(folder)

    counts = np.random.default_rng(0).integers(0, 9, (3, 2, 4, 5, 2), dtype=np.uint8)
    fixed = prepare(tmp_path / "fixed", shape=(2, 4, 5, 2), dtype=np.uint8, encoding="bytes")
    data = load("toy_set", data_dir=fixed)
    assert data.kind == "frames" and data.info["classes"] == 4 and data.info["input_shape"] == (2, 4, 5, 2)
    np.testing.assert_array_equal(data.train[2]["inputs"], counts[2])
    assert data.train[2]["labels"] == 2
    assert "image_size= is for images" in sentence("toy_set", data_dir=fixed, image_size=4)
    loose = prepare(tmp_path / "loose", shape=(None, 4, 5, 2), dtype=np.uint8, encoding="bytes")
    assert "its videos are not read; frames are a feature `video` that is a tensor" in sentence(
        "toy_set", data_dir=loose
    )


def test_prepared_tfds_text(tmp_path):
    import tensorflow_datasets as tfds

    prepare_with_tfds(tmp_path, {"text": tfds.features.Text()}, [{"text": "abc"}, {"text": "abcdefgh"}])
    data = load("toy_set", data_dir=str(tmp_path), length=4)
    short, long = data.train[0], data.train[1]
    assert short["inputs"].tolist() == [97, 98, 99, 0] and short["labels"].tolist() == [98, 99, 0, 0]
    assert short["weights"].tolist() == [1, 1, 0, 0]
    assert long["labels"].tolist() == [98, 99, 100, 101] and long["weights"].all()


def test_prepared_tfds_of_images_that_differ_in_size(tmp_path):
    import tensorflow_datasets as tfds

    images = [np.full((6, 9, 3), 200, np.uint8), np.full((8, 5, 3), 10, np.uint8)]
    prepare_with_tfds(
        tmp_path,
        {"image": tfds.features.Image(), "label": tfds.features.ClassLabel(num_classes=2)},
        [{"image": prep.encode_image(image), "label": i} for i, image in enumerate(images)],
    )
    assert "differ in size" in sentence("toy_set", data_dir=str(tmp_path))
    data = load("toy_set", data_dir=str(tmp_path), image_size=5)
    np.testing.assert_allclose(data.train.gather(np.arange(2))["inputs"][:, 0, 0, 0], [200 / 255, 10 / 255])
