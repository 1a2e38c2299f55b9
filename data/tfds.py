"""Any other TFDS dataset, read from its prepared `array_record` directory. No TensorFlow, no download.

Images (features `image` and `label`): inputs [H, W, C] float32 in [0, 1]. Frames (features `video` and `label`, where
`video` is a tensor of one shape [T, H, W, C], as binned events are): their values as they are. Text (a feature `text`,
as in lm1b): bytes 0..255, cut or padded to `length`.
"""

import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from lissom.data.dataset import ArraySource, Dataset, Example, finish
from lissom.data.errors import DataError, nearest, require
from lissom.data.preparation import (
    IN_MEMORY_BYTES,
    data_directory,
    data_source,
    decode_image,
    image_features,
    in_order,
)

# Their test split is published without labels (-1 everywhere): the validation split is what papers report.
UNLABELLED_TEST = ("imagenet2012", "imagenet_v2", "places365_small")


def load_tfds(
    name: str,
    data_dir: str | None,
    known: Iterable[str] = (),
    *,
    train_split: str = "train",
    test_split: str | None = None,
    image_size: int | None = None,
    length: int = 256,
) -> Dataset:
    """The prepared dataset `name` ("mnist", "cifar10", "glue/sst2", "mnist:3.0.1").

    train_split: any TFDS split ("train[:90%]"). test_split: default "test", or "validation" where there is no
    labelled test. image_size: images are resized (shorter side, bilinear) and cropped in the centre to a
    square; needed where they differ in size. length: T of text.
    """
    builder = _builder(name, data_dir, known)
    require("train" in builder.info.splits or train_split != "train", _no_split(name, "train", builder))
    test_split = test_split or _test_split(name, builder)
    features = dict(builder.info.features.items())
    splits = {"train": train_split, "test": test_split}
    if "image" in features and "label" in features:
        kind = "image"
        sources = {key: ImageRecords(builder, split, image_size) for key, split in splits.items()}
        info = {"classes": features["label"].num_classes}
    elif "video" in features and "label" in features:
        kind = "frames"
        _check_video(name, features["video"])
        require(image_size is None, f"dataset {name!r}: image_size= is for images, and these are frames")
        sources = {key: FrameRecords(builder, split) for key, split in splits.items()}
        info = {"classes": features["label"].num_classes}
    elif "text" in features:
        kind = "tokens"
        require(length >= 1, f"dataset {name!r}: length must be at least 1, got {length}")
        sources = {key: TextRecords(builder, split, length) for key, split in splits.items()}
        info = {"vocab_size": 256}
    else:
        raise DataError(
            f"dataset {name!r} has features {', '.join(sorted(features))}; image + label, video + label or text are "
            "readable"
        )
    example = sources["train"][0]
    _check_fixed_size(name, builder, kind, image_size)
    info |= {
        "input_shape": example["inputs"].shape,
        "train_examples": len(sources["train"]),
        "test_examples": len(sources["test"]),
        "tfds_version": str(builder.info.version),
    }
    loaded = {key: _in_memory(source, kind) for key, source in sources.items()}
    return Dataset(name=name, kind=kind, info=info, **loaded)


class ImageRecords:
    """Encoded images of one split, decoded when asked for."""

    def __init__(self, builder, split: str, image_size: int | None):
        self.size = image_size
        images = image_features(builder.info.features)
        self.encoded = "image" in images
        self.records = data_source(builder, split, images)

    def __len__(self) -> int:
        return len(self.records)

    def stored(self, index: int) -> Example:
        """uint8 image [H, W, C] and its label."""
        return self.decoded(self.records[int(index)])

    def decoded(self, record: Example) -> Example:
        """A record as `stored` gives it."""
        image = decode_image(record["image"]) if self.encoded else np.asarray(record["image"])
        image = image if self.size is None else square(image, self.size)
        return {"inputs": image, "labels": np.asarray(record["label"], np.int32)}

    def __getitem__(self, index: int) -> Example:
        stored = self.stored(index)
        inputs = stored["inputs"]
        top = np.iinfo(inputs.dtype).max if np.issubdtype(inputs.dtype, np.integer) else 1
        return {"inputs": inputs.astype(np.float32) / np.float32(top), "labels": stored["labels"]}


class FrameRecords:
    """Tensors of frames of one split."""

    def __init__(self, builder, split: str):
        self.records = data_source(builder, split, [])

    def __len__(self) -> int:
        return len(self.records)

    def stored(self, index: int) -> Example:
        """Frames [T, H, W, C] and their label."""
        return self.decoded(self.records[int(index)])

    def decoded(self, record: Example) -> Example:
        """A record as `stored` gives it."""
        return {"inputs": np.asarray(record["video"]), "labels": np.asarray(record["label"], np.int32)}

    def __getitem__(self, index: int) -> Example:
        return finish("frames", self.stored(index))


class TextRecords:
    """Texts of one split as bytes: T + 1 of them, zeros after the end, which do not score."""

    def __init__(self, builder, split: str, length: int):
        self.length = length
        self.records = data_source(builder, split, [])

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Example:
        text = self.records[int(index)]["text"]
        text = text.encode() if isinstance(text, str) else bytes(text)
        text = text[: self.length + 1]
        padded = np.zeros(self.length + 1, np.int32)
        padded[: len(text)] = np.frombuffer(text, np.uint8)
        weights = (np.arange(1, self.length + 1) < len(text)).astype(np.float32)
        return {"inputs": padded[:-1], "labels": padded[1:], "weights": weights}


def square(image: np.ndarray, size: int) -> np.ndarray:
    """uint8 [H, W, C] -> [size, size, C]: shorter side to `size` (bilinear), then the centre."""
    from PIL import Image

    require(image.dtype == np.uint8, f"image_size resizes 8-bit images, and these are {image.dtype}")
    height, width = image.shape[:2]
    scale = size / min(height, width)
    shape = (max(size, round(width * scale)), max(size, round(height * scale)))
    picture = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
    resized = np.asarray(picture.resize(shape, Image.Resampling.BILINEAR))
    top, left = (shape[1] - size) // 2, (shape[0] - size) // 2
    cropped = resized[top : top + size, left : left + size]
    return cropped if cropped.ndim == 3 else cropped[..., None]


def _builder(name: str, data_dir: str | None, known: Iterable[str]):
    """The builder that stands in a prepared directory, or the sentence that says how to get one."""
    import tensorflow_datasets as tfds

    root = data_directory(data_dir)
    try:
        builder = tfds.core.load.read_only_builder.builder_from_files(name, data_dir=os.fspath(root))
    except (tfds.core.DatasetNotFoundError, ValueError, OSError) as error:
        raise DataError(missing(name, root, known)) from error
    file_format = builder.info.file_format
    require(
        file_format is not None and file_format.value == "array_record",
        f"dataset {name!r} under {root} is stored as {getattr(file_format, 'value', None)}, "
        f"which has no random access; prepare it again with {command(name, root)}",
    )
    return builder


def command(name: str, root: Path) -> str:
    """The one command that prepares a TFDS dataset, where there is a network."""
    return (
        f"uvx --from tensorflow-datasets --with tensorflow tfds build {name} --file_format=array_record "
        f"--data_dir={root}"
    )


def missing(name: str, root: Path, known: Iterable[str]) -> str:
    """What is missing, where it was looked for, how to prepare it."""
    return (
        f"dataset {name!r} is not prepared in {root} (data_dir or TFDS_DATA_DIR) and is none of Lissom's own"
        f"{nearest(name, known)}; prepare a TFDS dataset, where there is a network, with: {command(name, root)}"
    )


def _test_split(name: str, builder) -> str:
    base = name.split("/")[0].split(":")[0]
    for split in ("validation",) if base in UNLABELLED_TEST else ("test", "validation"):
        if split in builder.info.splits:
            return split
    raise DataError(_no_split(name, "test", builder))


def _no_split(name: str, split: str, builder) -> str:
    return f"dataset {name!r} has no {split} split; say {split}_split=, one of: {', '.join(builder.info.splits)}"


def _check_fixed_size(name: str, builder, kind: str, image_size: int | None) -> None:
    if kind == "image" and image_size is None:
        shape = builder.info.features["image"].shape
        require(
            None not in shape,
            f"the images of {name!r} differ in size {shape}; say image_size= (for example 224)",
        )


def _check_video(name: str, feature) -> None:
    """What TFDS calls a Video is encoded pictures one by one, which only TensorFlow prepares: it is no events."""
    import tensorflow_datasets as tfds

    require(
        isinstance(feature, tfds.features.Tensor) and len(feature.shape) == 4 and None not in feature.shape,
        f"dataset {name!r}: its videos are not read; frames are a feature `video` that is a tensor of one shape "
        "[T, H, W, C]",
    )


def _in_memory(source, kind: str):
    """Small images and frames become arrays at once; larger sets and texts are read record by record."""
    if kind == "tokens":
        return source
    first = source.stored(0)
    if first["inputs"].dtype != np.uint8 or first["inputs"].nbytes * len(source) > IN_MEMORY_BYTES:
        return source
    rows = [source.decoded(record) for record in in_order(source.records)]
    return ArraySource(kind, {field: np.stack([row[field] for row in rows]) for field in first})
