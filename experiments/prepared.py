"""Data sets prepared by tensorflow-datasets, written and read without TensorFlow.

tensorflow-datasets writes and reads array_record by itself; only its own builders need
TensorFlow. So ours hands it PNG files made by Pillow, under the same name, version and
features: what one builder has prepared, a reader of the other understands.
"""

import contextlib
import io
import os
import shutil
import struct
import sys
import tempfile
import time
import warnings
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from experiments.catalog import Arrays, DataError, Entry, check, fingerprint

_LEFTOVER_SECONDS = 3600
_AT_ONCE = 1000  # records; one by one they take ten times as long
_REMEDY = "delete that folder and run again"


def find(entry: Entry, root: Path) -> Path | None:
    """The newest version of the data set below a folder of tensorflow-datasets."""
    versions = [
        path.parent
        for path in (root / entry.name).glob("*.*.*/dataset_info.json")
        if all(part.isdigit() for part in path.parent.name.split("."))
    ]
    return max(
        versions, key=lambda path: [*map(int, path.name.split("."))], default=None
    )


def prepare(entry: Entry, arrays: Arrays, origin: str, root: Path) -> Path:
    """Writes the data set below root, whole or not at all; returns its folder.

    Raises:
        DataError: a folder that is no data set is in the way.
        OSError: root cannot be written, or is full.
    """
    target = root / entry.name / entry.version
    with workshop(root) as made:
        with quiet_tfds():
            _build(entry, arrays, origin, made)
        target.parent.mkdir(exist_ok=True)
        try:
            os.rename(made / entry.name / entry.version, target)
        except OSError as error:
            another_was_faster = find(entry, root) == target
            if not another_was_faster:
                raise DataError(
                    f"{target} is in the way and is no prepared data set: delete it "
                    "and run again."
                ) from error
    return target


@contextlib.contextmanager
def workshop(folder: Path) -> Iterator[Path]:
    """A new folder inside `folder` to make things in and rename them out, finished.

    So a process that is killed leaves nothing under a name that anyone reads, and two
    processes do not meet. What the killed leave is removed an hour later.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob(".unfinished-*"):
        with contextlib.suppress(OSError):
            if time.time() - leftover.stat().st_mtime > _LEFTOVER_SECONDS:
                shutil.rmtree(leftover)
    with tempfile.TemporaryDirectory(prefix=".unfinished-", dir=folder) as made:
        yield Path(made)


def _build(entry: Entry, arrays: Arrays, origin: str, root: Path) -> None:
    import tensorflow_datasets as tfds

    class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        """The catalog's arrays, in published order."""

        name = entry.name
        VERSION = tfds.core.Version(entry.version)

        def _info(self) -> Any:
            colours = entry.image_shape[2:] or (1,)
            return tfds.core.DatasetInfo(
                builder=self,
                description=f"{entry.title}, from {origin}.",
                features=tfds.features.FeaturesDict(
                    {
                        "image": tfds.features.Image(
                            shape=(*entry.image_shape[:2], *colours)
                        ),
                        "label": tfds.features.ClassLabel(names=entry.class_names),
                    }
                ),
                supervised_keys=("image", "label"),
                disable_shuffling=True,
                metadata=tfds.core.MetadataDict(
                    origin=origin, fingerprint=fingerprint(arrays)
                ),
            )

        def _split_generators(self, dl_manager: Any) -> Any:
            del dl_manager
            return {
                "train": self._generate_examples(
                    arrays.train_images, arrays.train_labels
                ),
                "test": self._generate_examples(arrays.test_images, arrays.test_labels),
            }

        def _generate_examples(self, images: Any, labels: Any) -> Any:
            for key, (image, label) in enumerate(zip(images, labels, strict=True)):
                yield key, {"image": png(image), "label": int(label)}

    Builder(data_dir=root, file_format="array_record").download_and_prepare(
        download_config=tfds.download.DownloadConfig(
            compute_stats=tfds.download.ComputeStatsMode.SKIP, num_shards=1
        ),
    )


def png(image: np.ndarray) -> bytes:
    """A PNG file of the image, barely compressed: size costs less here than time."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(image).save(file, format="png", compress_level=1)
    return file.getvalue()


def read(entry: Entry, folder: Path) -> tuple[Arrays, str]:
    """The arrays of a prepared data set in published order, and their origin.

    Raises:
        DataError: it is damaged, or is not what the catalog describes.
    """
    with _reading(folder):
        import tensorflow_datasets as tfds

        builder = tfds.builder_from_directory(folder)
        metadata = builder.info.metadata or {}
        train = _read_split(builder, "train", entry)
        test = _read_split(builder, "test", entry)
    places = [f"{field} of {folder}" for field in Arrays._fields]
    arrays = check(Arrays(*train, *test), entry, places, _REMEDY)
    if metadata.get("fingerprint", fingerprint(arrays)) != fingerprint(arrays):
        raise DataError(f"The data set in {folder} is not as prepared: {_REMEDY}.")
    return arrays, _origin(builder)


def opened(
    entry: Entry, folder: Path
) -> tuple[Iterator[tuple[int, np.ndarray, int]], tuple[np.ndarray, np.ndarray], str]:
    """As read, but the training examples come one by one.

    Of each its published position, image and label.
    """
    with _reading(folder):
        import tensorflow_datasets as tfds

        builder = tfds.builder_from_directory(folder)
        test = _read_split(builder, "test", entry)
    return _train_examples(builder, entry, folder), test, _origin(builder)


def _train_examples(
    builder: Any, entry: Entry, folder: Path
) -> Iterator[tuple[int, np.ndarray, int]]:
    count = builder.info.splits["train"].num_examples
    order = _published_order(builder, "train", count)
    with _reading(folder):
        for position, example in zip(order, _examples(builder, "train"), strict=True):
            image, label = _decoded(example)
            yield position, image.reshape(entry.image_shape), label


@contextlib.contextmanager
def _reading(folder: Path) -> Iterator[None]:
    try:
        with quiet_tfds():
            yield
    except Exception as error:
        reason = str(error).strip().split("\n")[0].rstrip(".")
        raise DataError(
            f"The data set prepared in {folder} cannot be read "
            f"({reason or type(error).__name__}): {_REMEDY}."
        ) from error


def _origin(builder: Any) -> str:
    return (builder.info.metadata or {}).get(
        "origin", "tensorflow-datasets' own builder"
    )


def _decoded(example: Any) -> tuple[np.ndarray, int]:
    from PIL import Image

    return np.asarray(Image.open(io.BytesIO(example["image"]))), int(example["label"])


def _read_split(
    builder: Any, split: str, entry: Entry
) -> tuple[np.ndarray, np.ndarray]:
    count = builder.info.splits[split].num_examples
    images = np.zeros((count, *entry.image_shape), np.uint8)
    labels = np.zeros(count, np.int32)
    order = _published_order(builder, split, count)
    for index, example in zip(order, _examples(builder, split), strict=True):
        images[index], labels[index] = _decoded(example)
    return images, labels


def _published_order(builder: Any, split: str, count: int) -> list[int]:
    """Which published image each stored one is.

    tensorflow-datasets stores examples in the order of a hash of their keys, and its
    builders of these data sets take the published position for the key.
    """
    from tensorflow_datasets.core import hashing

    if builder.info.disable_shuffling:
        return list(range(count))
    hasher = hashing.Hasher(split)
    return sorted(range(count), key=hasher.hash_key)


def _examples(builder: Any, split: str) -> Iterator[Any]:
    """Examples as stored, the images still PNG files; Grain reads them ahead."""
    import grain
    import tensorflow_datasets as tfds

    decoders = {"image": tfds.decode.SkipDecoding()}
    if builder.info.file_format.value == "tfrecord":
        for path in builder.info.splits[split].filepaths:
            for record in _tfrecords(Path(path)):
                yield builder.info.features.deserialize_example_np(
                    record, decoders=decoders
                )
    else:
        source = builder.as_data_source(split, decoders=decoders)
        starts = grain.MapDataset.range(0, len(source), _AT_ONCE)
        several = starts.map(
            lambda begin: source.__getitems__(
                [*range(begin, min(begin + _AT_ONCE, len(source)))]
            )
        )
        ahead = grain.ReadOptions(num_threads=1, prefetch_buffer_size=1)
        for some in several.to_iter_dataset(ahead):
            yield from some


def _tfrecords(path: Path) -> Iterator[bytes]:
    """Each record: 8 bytes of length, 4 of checksum, the record, 4 of checksum."""
    with path.open("rb") as file:
        while head := file.read(12):
            (length,) = struct.unpack("<Q4x", head)
            yield file.read(length)
            file.read(4)


@contextlib.contextmanager
def quiet_tfds() -> Iterator[None]:
    """Keeps tensorflow-datasets' chatter from the screen; its errors still rise."""
    from absl import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.FATAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            import tensorflow_datasets as tfds

            if not sys.stderr.isatty():
                tfds.disable_progress_bar()
            yield
    finally:
        logging.set_verbosity(verbosity)


def keep_decoded(arrays: Arrays, origin: str, path: Path) -> None:
    """Stores the arrays with their origin and fingerprint, whole or not at all."""
    with workshop(path.parent) as made:
        np.savez(
            made / path.name,
            origin=np.array(origin),
            fingerprint=np.array(fingerprint(arrays)),
            **arrays._asdict(),
        )
        os.replace(made / path.name, path)


def read_decoded(path: Path) -> tuple[Arrays, str, str]:
    """Arrays, origin and fingerprint as kept; ValueError when they are damaged."""
    *arrays, origin, expected = read_npz(path, *Arrays._fields, "origin", "fingerprint")
    if fingerprint(Arrays(*arrays)) != str(expected):
        raise ValueError("the fingerprint does not match")
    return Arrays(*arrays), str(origin), str(expected)


_DAMAGED = (
    OSError,
    EOFError,
    KeyError,  # an array is missing
    RuntimeError,  # a bit says that it is encrypted, or packed in some other way
    TypeError,  # one array, not a file of several
    ValueError,
    struct.error,
    zipfile.BadZipFile,
    zlib.error,
)


def read_npz(path: Path, *names: str) -> list[np.ndarray]:
    """Arrays of an .npz file; ValueError when they are not there, or damaged."""
    try:
        # Opened here, as NumPy leaves a damaged file open.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            return [arrays[name] for name in names]
    except _DAMAGED as error:
        raise ValueError(str(error)) from error
