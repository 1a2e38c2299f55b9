"""Recordings of event cameras as a dataset: a folder with `train` and `test`, in each a folder a class, in that a file
a recording.

Formats, by the end of a file's name; whatever else is in the folder is refused:

    .npz      arrays t, x, y, p, or one structured array with these fields, as the package tonic gives events; the other
              usual names are in `NAMES`. Files that lie in `train` and `test` themselves hold their `label` too
    .npy      one structured array with these fields
    .bin      N-MNIST and N-Caltech101 (Orchard et al. 2015, arXiv:1507.07629): five bytes an event, x, y, then 1 bit of
              polarity (1 ON) and 23 bits of microseconds, the highest first. An event at y = 240 is none: it says that
              the clock went on by 2^13 microseconds
    .aedat    AEDAT 2.0 of a DVS128: lines that begin with #, then eight bytes an event, the highest first: 32 bits of
              address, 32 of microseconds. Of the address bit 0 is the polarity (0 ON), bits 1 to 7 are 127 - x, bits 8
              to 14 y, which counts from below (jAER's chip class DVS128); bit 15 marks what is no event of a pixel

Not read: AEDAT 1, 3 and 4, AEDAT 2.0 of other cameras (their addresses differ), .dat and .raw of Prophesee, .mat,
.hdf5. Times are microseconds, or, in arrays, any one unit; coordinates are as they stand in the file.
"""

import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from lissom.data.dataset import ArraySource, Dataset, Example, finish
from lissom.data.errors import DataError, require
from lissom.data.events.binning import Rendering
from lissom.data.events.stream import Events, ordered
from lissom.data.preparation import IN_MEMORY_BYTES

NAMES = {
    "t": ("t", "ts", "time", "timestamp", "timestamps"),
    "x": ("x", "xs", "x_pos"),
    "y": ("y", "ys", "y_pos"),
    "p": ("p", "ps", "pol", "polarity", "polarities"),
}
SPLITS = ("train", "test")
NMNIST_OVERFLOW_ROW, NMNIST_OVERFLOW = 240, 2**13
DVS128 = 128


def is_recordings(path: str) -> bool:
    """Whether a folder is laid out as recordings."""
    return all(_split_folder(Path(path).expanduser(), split).is_dir() for split in SPLITS)


def load_recordings(
    path: str,
    *,
    steps: int = 16,
    binning: str = "counts",
    polarity: str = "both",
    tau: float | None = None,
    control: str = "none",
    sensor: tuple | None = None,
    seed: int = 0,
) -> Dataset:
    """Frames [steps, H, W, C] of recordings; see the top of this file, and `binning.py` for the settings.

    The bins of a recording share the time from its first event to its last. sensor: (H, W); default: the smallest
    that holds all events of both splits, which are all read for it. seed: of the control. Classes are numbered in the
    order of their folders' names (of numbers: their own order), `info["class_names"]`. Frames that take more than
    200 MB are read record by record.
    """
    folder = Path(path).expanduser()
    rendering = Rendering(dataset=repr(path), steps=steps, binning=binning, polarity=polarity, tau=tau, control=control)
    whole = sensor is None or (len(sensor) == 2 and all(isinstance(n, int) and n >= 1 for n in sensor))
    require(whole, f"dataset {path!r}: sensor must be (rows, columns), got {sensor!r}")
    require(seed >= 0, f"dataset {path!r}: seed must be at least 0, got {seed}")
    found = {split: _recordings(_split_folder(folder, split)) for split in SPLITS}
    names = sorted({name for files in found.values() for _, name in files if name is not None}, key=_numeric)
    labels = {
        split: np.array([names.index(name) if name is not None else label_of(file) for file, name in files], np.int32)
        for split, files in found.items()
    }
    sensor = sensor or _smallest([file for files in found.values() for file, _ in files])
    sources = {
        split: Recordings([file for file, _ in files], labels[split], rendering, sensor, [seed, number])
        for number, (split, files) in enumerate(found.items())
    }
    first = sources["train"].stored(0)["inputs"]
    info = {
        "classes": len(names) or int(max(array.max() for array in labels.values())) + 1,
        "input_shape": first.shape,
        "train_examples": len(labels["train"]),
        "test_examples": len(labels["test"]),
        **({"class_names": names} if names else {}),
    }
    fits = lambda source: first.nbytes * len(source) <= IN_MEMORY_BYTES
    loaded = {split: source.in_memory() if fits(source) else source for split, source in sources.items()}
    return Dataset(name=folder.name, kind="frames", info=info, **loaded)


class Recordings:
    """A source that reads and renders one recording at a time."""

    def __init__(self, files: list[Path], labels: np.ndarray, rendering: Rendering, sensor, seed: list[int]):
        self.files, self.labels, self.rendering, self.sensor, self.seed = files, labels, rendering, sensor, seed

    def __len__(self) -> int:
        return len(self.files)

    def stored(self, index: int) -> Example:
        """Frames in stored form, and the label."""
        file, events = self.files[index], read_events(self.files[index])
        height, width = self.sensor
        inside = events.x.max() < width and events.y.max() < height
        require(
            inside, f"{file} has an event at row {events.y.max()}, column {events.x.max()}, outside {height} x {width}"
        )
        start, stop = events.t[0], events.t[-1]
        rng = np.random.default_rng([*self.seed, index])
        frames = self.rendering.frames(events, (height, width), start, stop if stop > start else start + 1, rng)
        return {"inputs": frames, "labels": self.labels[index]}

    def __getitem__(self, index: int) -> Example:
        return finish("frames", self.stored(int(index)))

    def in_memory(self) -> ArraySource:
        """The same examples as arrays."""
        inputs = np.stack([self.stored(index)["inputs"] for index in range(len(self))])
        return ArraySource("frames", {"inputs": inputs, "labels": self.labels})


def read_events(file: Path) -> Events:
    """The stream of one recording, of any of the `READERS`; one event at least."""
    require(
        file.suffix in READERS,
        f"{file}: recordings of this format are not read; readable: {', '.join(sorted(READERS))}",
    )
    events = READERS[file.suffix](file)
    require(len(events) > 0, f"{file} holds no event")
    require(min(events.x.min(), events.y.min()) >= 0, f"{file} has an event at a negative coordinate")
    return events


def read_arrays(file: Path) -> Events:
    """.npz or .npy; polarities are 0 and 1, or -1 and 1, or booleans."""
    arrays = _loaded(file)
    structured = [array for array in arrays.values() if array.dtype.names]
    fields = {name: structured[0][name] for name in structured[0].dtype.names} if len(structured) == 1 else arrays
    found = {}
    for field, names in NAMES.items():
        name = next((name for name in names if name in fields), None)
        require(name is not None, f"{file} has no field {field!r} ({', '.join(names)}); it has: {', '.join(fields)}")
        found[field] = np.asarray(fields[name])
    shapes = {array.shape for array in found.values()}
    require(len(shapes) == 1 and found["t"].ndim == 1, f"{file}: t, x, y, p must be of one length [N], got {shapes}")
    numbers = all(np.issubdtype(array.dtype, np.number) for name, array in found.items() if name != "p")
    require(numbers and bool(np.isfinite(found["t"]).all()), f"{file}: t, x, y must be numbers, and t finite")
    signs = set(np.unique(found["p"]).tolist())
    require(signs <= {0, 1} or signs <= {-1, 1}, f"{file}: polarities must be 0 and 1, or -1 and 1")
    return ordered(found["t"], found["x"], found["y"], found["p"] > 0)


def read_nmnist(file: Path) -> Events:
    """Five bytes an event; see the top of this file."""
    rows = _records(file, file.read_bytes(), 5).astype(np.int64)
    x, y = rows[:, 0], rows[:, 1]
    t = (rows[:, 2] & 127) << 16 | rows[:, 3] << 8 | rows[:, 4]
    overflow = y == NMNIST_OVERFLOW_ROW
    t += NMNIST_OVERFLOW * np.cumsum(overflow)
    return ordered(t[~overflow], x[~overflow], y[~overflow], rows[~overflow, 2] >> 7)


def read_aedat2(file: Path) -> Events:
    """AEDAT 2.0 of a DVS128; see the top of this file."""
    content = file.read_bytes()
    require(
        content.startswith(b"#!AER-DAT2.0"),
        f"{file} does not begin with #!AER-DAT2.0: of AEDAT only version 2.0 is read",
    )
    start = 0
    while content[start : start + 1] == b"#":
        start = content.find(b"\n", start) + 1
        require(start > 0, f"{file}: the header has no end")
    words = _records(file, content[start:], 8).copy().view(">u4").astype(np.int64)
    address = words[:, 0]
    pixel = address >> 15 == 0
    address, t = address[pixel], words[pixel, 1]
    return ordered(t, DVS128 - 1 - (address >> 1 & 127), address >> 8 & 127, 1 - (address & 1))


READERS: dict[str, Callable[[Path], Events]] = {
    ".npz": read_arrays,
    ".npy": read_arrays,
    ".bin": read_nmnist,
    ".aedat": read_aedat2,
}


def label_of(file: Path) -> int:
    """The label that an .npz file of a split without folders of classes holds."""
    require(file.suffix == ".npz", f"{file} must lie in a folder of its class: only an .npz file can hold its label")
    label = _loaded(file).get("label")
    require(label is not None, f"{file} lies in no folder of a class, and holds no `label`")
    whole = label.size == 1 and np.issubdtype(label.dtype, np.integer) and label.item() >= 0
    require(whole, f"{file}: label must be one integer, at least 0, got {label!r}")
    return int(label.item())


def _loaded(file: Path) -> dict[str, np.ndarray]:
    try:
        loaded = np.load(file)
        if isinstance(loaded, np.ndarray):
            return {"events": loaded}
        with loaded as archive:
            return {name: archive[name] for name in archive.files}
    except (zipfile.BadZipFile, ValueError, OSError) as error:
        raise DataError(f"{file} cannot be read as plain arrays ({error})") from error


def _records(file: Path, content: bytes, size: int) -> np.ndarray:
    """uint8 [N, size]."""
    require(len(content) % size == 0, f"{file}: events take {size} bytes each, and {len(content)} are no multiple")
    return np.frombuffer(content, np.uint8).reshape(-1, size)


def _split_folder(folder: Path, split: str) -> Path:
    """`train` or `Train`: N-MNIST is spelt so."""
    capital = folder / split.capitalize()
    return capital if capital.is_dir() else folder / split


def _recordings(folder: Path) -> list[tuple[Path, str | None]]:
    """(file, name of its class or None) of a split, in order."""
    hidden = lambda path: path.name.startswith(".")
    entries = sorted((entry for entry in folder.iterdir() if not hidden(entry)), key=lambda entry: entry.name)
    classes = [entry for entry in entries if entry.is_dir()]
    require(len(entries) > 0, f"{folder} holds no recording")
    require(
        len(classes) in (0, len(entries)), f"{folder} must hold folders of classes or recordings, and it holds both"
    )
    if not classes:
        return [(file, None) for file in entries]
    found = [(file, entry.name) for entry in classes for file in sorted(entry.iterdir()) if not hidden(file)]
    require(len(found) > 0, f"{folder} holds no recording")
    return found


def _numeric(name: str) -> tuple[int, int, str]:
    return (0, int(name), name) if name.isdecimal() else (1, 0, name)


def _smallest(files: list[Path]) -> tuple[int, int]:
    """(rows, columns) that hold all events."""
    tops = [(int(events.y.max()), int(events.x.max())) for events in map(read_events, files)]
    return max(y for y, _ in tops) + 1, max(x for _, x in tops) + 1
