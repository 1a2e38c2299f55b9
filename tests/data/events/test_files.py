"""Recordings of event cameras: formats from bytes written by hand, folders, and what is refused in one sentence."""

import struct

import numpy as np
import pytest

from lissom.data import DataError, load
from lissom.data import preparation as prep
from lissom.data.events import files
from lissom.data.events.files import read_events

T, X, Y, P = [10, 20, 40], [3, 0, 1], [2, 5, 5], [1, 0, 1]


def fields(events):
    return [events.t.tolist(), events.x.tolist(), events.y.tolist(), events.polarity.tolist()]


def sentence(call, *args, **settings):
    with pytest.raises(DataError) as error:
        call(*args, **settings)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_nmnist_bytes(tmp_path):
    file = tmp_path / "a.bin"
    # x, y, then polarity in the highest bit and 23 bits of time: 0x812345 is ON at 0x012345.
    file.write_bytes(bytes([5, 7, 0x81, 0x23, 0x45]) + bytes([33, 0, 0x02, 0x00, 0x01]))
    assert fields(read_events(file)) == [[0x012345, 0x020001], [5, 33], [7, 0], [1, 0]]
    # A row of 240 is no event: the clock went on by 8192.
    file.write_bytes(bytes([1, 2, 0, 0, 9]) + bytes([0, 240, 0, 0, 0]) + bytes([3, 4, 0x80, 0, 5]))
    assert fields(read_events(file)) == [[9, 8192 + 5], [1, 3], [2, 4], [0, 1]]
    file.write_bytes(bytes(7))
    assert "events take 5 bytes each, and 7 are no multiple" in sentence(read_events, file)


def test_aedat2_bytes_of_a_dvs128(tmp_path):
    file = tmp_path / "a.aedat"
    header = b"#!AER-DAT2.0\r\n# This is a raw AE data file\r\n"
    # Address: y << 8 | (127 - x) << 1 | (0 for ON), time in microseconds, both with the highest byte first.
    words = [(9 << 8 | (127 - 100) << 1 | 0, 1000), (127 << 8 | 127 << 1 | 1, 2000), (0x8000, 2500)]
    file.write_bytes(header + b"".join(struct.pack(">II", *word) for word in words))
    assert fields(read_events(file)) == [[1000, 2000], [100, 0], [9, 127], [1, 0]]
    # One event by its bytes: y = 1, address bits 1 to 7 = 127, so x = 0, ON.
    file.write_bytes(b"#!AER-DAT2.0\n" + bytes([0, 0, 0x01, 0xFE, 0, 0, 0x01, 0x00]))
    assert fields(read_events(file)) == [[256], [0], [1], [1]]
    file.write_bytes(b"#!AER-DAT3.1\r\n" + bytes(28))
    assert "of AEDAT only version 2.0 is read" in sentence(read_events, file)
    file.write_bytes(b"#!AER-DAT2.0 and no end")
    assert "the header has no end" in sentence(read_events, file)


@pytest.mark.parametrize("names", ["txyp", ("ts", "x", "y", "pol"), ("timestamps", "xs", "ys", "polarities")])
def test_arrays_under_their_usual_names(tmp_path, names):
    file = tmp_path / "a.npz"
    order = [1, 2, 0]  # files need not be in order of time
    np.savez(file, **{name: np.array(array)[order] for name, array in zip(names, (T, X, Y, P))})
    assert fields(read_events(file)) == [T, X, Y, P]


def test_structured_arrays(tmp_path):
    events = np.array(list(zip(X, Y, T, P)), [("x", "i8"), ("y", "i8"), ("t", "i8"), ("p", "i8")])  # tonic's order
    np.savez(tmp_path / "a.npz", events=events, label=3)
    np.save(tmp_path / "a.npy", events)
    assert fields(read_events(tmp_path / "a.npz")) == fields(read_events(tmp_path / "a.npy")) == [T, X, Y, P]


def test_polarities_of_minus_one_and_of_booleans(tmp_path):
    for polarity in (np.array([1, -1, 1]), np.array([True, False, True])):
        np.savez(tmp_path / "a.npz", t=T, x=X, y=Y, p=polarity)
        assert read_events(tmp_path / "a.npz").polarity.tolist() == P


@pytest.mark.parametrize(
    ("arrays", "text"),
    [
        ({"t": T, "x": X, "y": Y}, "has no field 'p' (p, ps, pol, polarity, polarities); it has: t, x, y"),
        ({"t": T, "x": X, "y": Y, "p": [1, 0]}, "must be of one length"),
        ({"t": T, "x": X, "y": Y, "p": [0, 1, 2]}, "polarities must be 0 and 1, or -1 and 1"),
        ({"t": [0, 1, np.nan], "x": X, "y": Y, "p": P}, "t, x, y must be numbers, and t finite"),
        ({"t": T, "x": ["a", "b", "c"], "y": Y, "p": P}, "t, x, y must be numbers"),
        ({"t": T, "x": [0, -1, 2], "y": Y, "p": P}, "at a negative coordinate"),
        ({"t": [], "x": [], "y": [], "p": []}, "holds no event"),
    ],
)
def test_bad_arrays_are_one_sentence(tmp_path, arrays, text):
    np.savez(tmp_path / "a.npz", **arrays)
    assert text in sentence(read_events, tmp_path / "a.npz")


def test_damaged_and_unknown_files_are_one_sentence(tmp_path):
    (tmp_path / "a.npz").write_bytes(b"no archive")
    assert "cannot be read as plain arrays" in sentence(read_events, tmp_path / "a.npz")
    assert ".aedat4: recordings of this format are not read; readable: .aedat, .bin, .npy, .npz" in sentence(
        read_events, tmp_path / "a.aedat4"
    )


def nmnist(x, y, p, t):
    return bytes([x, y, p << 7 | t >> 16, t >> 8 & 255, t & 255])


@pytest.fixture
def folder(tmp_path):
    """Laid out as N-MNIST: Train and Test, a folder a digit; class 10 is behind class 9."""
    for split, names in (("Train", ("9", "10")), ("Test", ("10",))):
        for name in names:
            (tmp_path / split / name).mkdir(parents=True)
            events = nmnist(1, 2, 1, 100) + nmnist(3, 0, 0, 200) + nmnist(1, 2, 1, 250) + nmnist(0, 0, 1, 500)
            (tmp_path / split / name / "00001.bin").write_bytes(events)
    return tmp_path


def test_a_folder_of_recordings(folder, monkeypatch):
    data = load(str(folder), steps=4)
    assert data.kind == "frames" and data.info["classes"] == 2 and data.info["class_names"] == ["9", "10"]
    assert data.info["input_shape"] == (4, 3, 4, 2)  # the smallest sensor that holds rows 0 to 2, columns 0 to 3
    assert (data.info["train_examples"], data.info["test_examples"]) == (2, 1)
    # Examples stand in the order of the folders' names, "10" in front of "9"; classes in that of the numbers.
    assert [int(data.train[i]["labels"]) for i in (0, 1)] == [1, 0] and data.test[0]["labels"] == 1
    # 100 .. 500 in four bins of 100: at 100, 200, 250, 500.
    expected = np.zeros((4, 3, 4, 2), np.float32)
    expected[0, 2, 1, 1] = expected[1, 0, 3, 0] = expected[1, 2, 1, 1] = expected[3, 0, 0, 1] = 1
    np.testing.assert_array_equal(data.train[0]["inputs"], expected)
    wide = load(str(folder), steps=4, sensor=(34, 34), polarity="merged")
    np.testing.assert_array_equal(wide.train[0]["inputs"][:, :3, :4, 0], expected.sum(-1))
    assert wide.info["input_shape"] == (4, 34, 34, 1)
    # Read one by one, in the same form.
    monkeypatch.setattr(files, "IN_MEMORY_BYTES", 0)
    single = load(str(folder), steps=4)
    assert not hasattr(single.train, "arrays") and len(single.train) == 2
    np.testing.assert_array_equal(single.train[1]["inputs"], data.train[1]["inputs"])
    surface = load(str(folder), steps=4, binning="surface", tau=2.0)
    np.testing.assert_allclose(surface.train[0]["inputs"][:, 0, 3, 0], [0, *np.exp([-0.5, -1, -1.5])], rtol=1e-3)


def test_a_control_of_recordings_is_drawn_by_its_seed(folder):
    plain = load(str(folder), steps=4).train[0]["inputs"]
    drawn = [load(str(folder), steps=4, control="shuffled", seed=seed).train[0]["inputs"] for seed in range(6)]
    assert all(sorted(map(bytes, x)) == sorted(map(bytes, plain)) for x in drawn)
    assert len({x.tobytes() for x in drawn}) > 1
    again = load(str(folder), steps=4, control="shuffled", seed=2).train[0]["inputs"]
    np.testing.assert_array_equal(again, drawn[2])


def test_labels_in_the_files(tmp_path):
    for split, labels in (("train", (4, 0)), ("test", (2,))):
        (tmp_path / split).mkdir()
        for number, label in enumerate(labels):
            np.savez(tmp_path / split / f"{number}.npz", t=T, x=X, y=Y, p=P, label=label)
    data = load(str(tmp_path), steps=2)
    assert data.info["classes"] == 5 and "class_names" not in data.info
    assert [int(data.train[i]["labels"]) for i in (0, 1)] == [4, 0] and data.test[0]["labels"] == 2
    np.savez(tmp_path / "train" / "0.npz", t=T, x=X, y=Y, p=P)
    assert "lies in no folder of a class, and holds no `label`" in sentence(load, str(tmp_path))
    np.savez(tmp_path / "train" / "0.npz", t=T, x=X, y=Y, p=P, label=-1)
    assert "label must be one integer, at least 0" in sentence(load, str(tmp_path))
    (tmp_path / "train" / "0.npz").rename(tmp_path / "train" / "0.bin")
    assert "must lie in a folder of its class" in sentence(load, str(tmp_path))
    (tmp_path / "train" / "more").mkdir()
    assert "must hold folders of classes or recordings, and it holds both" in sentence(load, str(tmp_path))


def test_bad_requests_are_one_sentence(folder):
    path = str(folder)
    assert "sensor must be (rows, columns), got (34,)" in sentence(load, path, sensor=(34,))
    assert "has an event at row 2, column 3, outside 2 x 34" in sentence(load, path, sensor=(2, 34))
    assert "has no setting 'step'; did you mean 'steps'" in sentence(load, path, step=3)
    assert "has no binning 'count'" in sentence(load, path, binning="count")
    assert "sensor must be (rows, columns)" in sentence(load, path, sensor="34")
    assert "seed must be at least 0, got -1" in sentence(load, path, seed=-1)
    assert "steps is of type int (default 16), got '4'" in sentence(load, path, steps="4")
    (folder / "Test" / "10" / "00001.bin").unlink()
    assert "Test holds no recording" in sentence(load, path)


def test_recordings_of_one_moment_are_in_the_first_bin(tmp_path):
    for split in ("train", "test"):
        (tmp_path / split / "a").mkdir(parents=True)
        np.savez(tmp_path / split / "a" / "0.npz", t=[7, 7], x=[0, 1], y=[0, 0], p=[1, 1])
    frames = load(str(tmp_path), steps=3).train[0]["inputs"]
    assert frames[0].sum() == 2 and frames[1:].sum() == 0


def test_prepared_folders_hold_recordings_only_by_their_layout(tmp_path):
    assert prep.data_directory(str(tmp_path)) == tmp_path
    for split in ("train", "test"):
        np.savez(tmp_path / f"{split}.npz", inputs=np.ones((2, 3, 4, 4, 2), np.uint8), labels=[0, 1])
    data = load(str(tmp_path))
    assert data.kind == "frames" and data.info["input_shape"] == (3, 4, 4, 2)
    assert data.train[0]["inputs"].max() == 1  # counts stay as they are
