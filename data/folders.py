"""A folder of .npz files as a dataset: `train.npz` and `test.npz`, each with arrays `inputs` and `labels`."""

import zipfile
from pathlib import Path

import numpy as np

from lissom.data.dataset import ArraySource, Dataset, gather
from lissom.data.errors import DataError, nearest, require

KINDS = ("image", "signal", "frames", "tokens")


def load_folder(path: str, *, kind: str | None = None) -> Dataset:
    """Arrays with examples along the first axis, all in memory.

    kind: `image` (inputs [N, H, W] or [N, H, W, C]; uint8 is divided by 255), `signal` (inputs [N, L] or [N,
    L, C]), `frames` (inputs [N, T, H, W] or [N, T, H, W, C]; integers are counts and stay as they are) or `tokens`
    (inputs and labels [N, T] integers, `weights` [N, T] optional). Default: read off the arrays: labels with T
    positions are tokens, inputs of 2 or 3 axes a signal (grey images without their channel axis look the same: say
    kind="image"), of 4 an image (frames without their channel axis look the same: say kind="frames"), of 5 frames.
    """
    folder = Path(path).expanduser()
    require(kind is None or kind in KINDS, f"dataset {path!r}: unknown kind {kind!r}{nearest(str(kind), KINDS)}")
    arrays = {split: _read(folder, split) for split in ("train", "test")}
    kind = kind or _kind(path, arrays["train"])
    arrays = {split: _shaped(path, split, kind, fields) for split, fields in arrays.items()}
    sources = {split: ArraySource(kind, fields) for split, fields in arrays.items()}
    shapes = {split: gather(source, np.arange(1))["inputs"].shape[1:] for split, source in sources.items()}
    require(
        shapes["train"] == shapes["test"],
        f"dataset {path!r}: train and test inputs differ in shape: {shapes}",
    )
    top = max(int(fields["labels"].max()) for fields in arrays.values())
    if kind == "tokens":
        top = max(top, *(int(fields["inputs"].max()) for fields in arrays.values()))
    info = {
        "vocab_size" if kind == "tokens" else "classes": top + 1,
        "input_shape": shapes["train"],
        "train_examples": len(sources["train"]),
        "test_examples": len(sources["test"]),
    }
    return Dataset(name=folder.name, kind=kind, info=info, **sources)


def _read(folder: Path, split: str) -> dict[str, np.ndarray]:
    file = folder / f"{split}.npz"
    require(
        file.is_file(),
        f"dataset {str(folder)!r} needs {file}, which is not there; save it with "
        f"numpy.savez({str(file)!r}, inputs=..., labels=...)",
    )
    try:
        with np.load(file) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except (zipfile.BadZipFile, ValueError, OSError) as error:
        raise DataError(f"{file} cannot be read as an .npz file of plain arrays ({error})") from error
    missing = {"inputs", "labels"} - set(arrays)
    require(not missing, f"{file} lacks the array {sorted(missing)[:1]}; it holds {sorted(arrays)}")
    extra = set(arrays) - {"inputs", "labels", "weights"}
    require(not extra, f"{file} holds {sorted(extra)}; known arrays: inputs, labels, weights (tokens only)")
    require(len(arrays["inputs"]) > 0, f"{file} holds no example")
    return arrays


def _kind(path: str, arrays: dict[str, np.ndarray]) -> str:
    if arrays["labels"].ndim == 2:
        return "tokens"
    axes = arrays["inputs"].ndim
    require(2 <= axes <= 5, f"dataset {path!r}: inputs must have 2, 3, 4 or 5 axes, got {arrays['inputs'].shape}")
    return {4: "image", 5: "frames"}.get(axes, "signal")


def _shaped(path: str, split: str, kind: str, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The arrays with a channel axis, once their shapes and types are checked."""
    inputs, labels = arrays["inputs"], arrays["labels"]
    where = f"dataset {path!r}, {split}.npz"
    require(np.issubdtype(labels.dtype, np.integer), f"{where}: labels must be integers, got {labels.dtype}")
    require(labels.min() >= 0, f"{where}: labels must not be negative, got {labels.min()}")
    require(len(inputs) == len(labels), f"{where}: {len(inputs)} inputs and {len(labels)} labels")
    if kind == "tokens":
        require(np.issubdtype(inputs.dtype, np.integer), f"{where}: tokens must be integers, got {inputs.dtype}")
        for name, array in arrays.items():
            require(
                array.ndim == 2 and array.shape == inputs.shape,
                f"{where}: {name} must be [N, T] like inputs {inputs.shape}, got {array.shape}",
            )
        return arrays
    require("weights" not in arrays, f"{where}: weights belong to tokens, and this dataset is of kind {kind}")
    axes = {"image": 4, "signal": 3, "frames": 5}[kind]
    require(inputs.ndim in (axes - 1, axes), f"{where}: inputs of kind {kind} have {axes} axes, got {inputs.shape}")
    require(labels.ndim == 1, f"{where}: labels must be [N], got {labels.shape}")
    return {"inputs": inputs if inputs.ndim == axes else inputs[..., None], "labels": labels}
