"""Training images that stay on disk, read by Grain while the device works.

A PNG takes longer to decode than a training step to run. So the images of the prepared
data set are written once as raw rows, read from tensorflow-datasets' source by Grain;
every epoch then reads those, in fit's order. Where it is in them is fit's epoch and
step, which a checkpoint has: Grain starts there, and reads the same blocks as ever.
"""

import math
import mmap
import os
from collections.abc import Iterable, Iterator, Sequence
from hashlib import sha256
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import numpy as np

from experiments import prepared
from experiments.catalog import (
    Arrays,
    Entry,
    check,
    fingerprint,
    idx_digest,
    idx_header,
)

TRAIN, REST = "train-images", "rest.npz"
AHEAD = 2  # blocks read before they are wanted
AROUND = 2**17  # bytes that Linux maps beside a row: 64 KB around either end
MAPPED = 2**24  # bytes, before their pages are given back
CHUNK = 2**14  # rows in memory while the file is written or checked


class Streamed:
    """Rows of a file and their labels; of the images, only a few blocks are in memory.

    Args:
        path: the images as raw bytes, one after the other.
        labels: one for each image.
        image_shape: of one image.
    """

    def __init__(self, path: Path, labels: np.ndarray, image_shape: Sequence[int]):
        self.path, self.labels = path, labels
        self.shape = (len(labels), *image_shape)
        import_module("grain")  # here, before any other thread imports

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, rows: slice) -> np.ndarray:
        """Consecutive images, in memory."""
        begin, end, _ = rows.indices(len(self))
        size = int(np.prod(self.shape[1:]))
        flat = np.fromfile(
            self.path, np.uint8, (end - begin) * size, offset=begin * size
        )
        return flat.reshape(-1, *self.shape[1:])

    def read(
        self, wanted: Sequence[np.ndarray]
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """As fit's Rows."""
        import grain

        with self.path.open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        source = _Source(mapped, self.labels, self.shape, wanted)
        options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=AHEAD)
        return iter(grain.MapDataset.source(source).to_iter_dataset(options))


def first(images: np.ndarray | Streamed, rows: int) -> np.ndarray | Streamed:
    """The first of them; the same file, as if it ended earlier."""
    if isinstance(images, Streamed):
        return Streamed(images.path, images.labels[:rows], images.shape[1:])
    return images[:rows]


class _Source:
    """What Grain reads from: the i-th element is the i-th block that is wanted.

    Rows are read in the order of the file, and its pages given back in between, or they
    would add up to all of it. Not more often than need be: each time, another thread
    that runs Python may go on for 5 ms.
    """

    def __init__(
        self,
        mapped: mmap.mmap,
        labels: np.ndarray,
        shape: tuple[int, ...],
        wanted: Sequence[np.ndarray],
    ):
        self._mapped, self._labels, self._wanted = mapped, labels, wanted
        size = int(np.prod(shape))
        self._images = np.frombuffer(mapped, np.uint8, size).reshape(shape)

    def __len__(self) -> int:
        return len(self._wanted)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        from jax_softmax._rows import aligned  # whoever only loads data needs no JAX

        rows = self._wanted[index]
        images = aligned((len(rows), *self._images.shape[1:]), self._images.dtype)
        most = images.nbytes + len(rows) * AROUND
        turns = math.ceil(min(most, len(self._mapped)) / MAPPED)
        for some in np.array_split(np.argsort(rows), turns):
            images[some] = self._images[rows[some]]
            self._mapped.madvise(mmap.MADV_DONTNEED)
        images.flags.writeable = False  # so that fit takes them without a copy
        return images, self._labels[rows]


# Position, image and label of each training example; the test arrays; their origin.
Opened = tuple[
    Iterable[tuple[int, np.ndarray, int]], tuple[np.ndarray, np.ndarray], str
]


class Kept(NamedTuple):
    """A data set whose training images are on disk."""

    train: Streamed
    test_images: np.ndarray
    test_labels: np.ndarray
    origin: str
    fingerprint: str


def keep(opened: Opened, entry: Entry, folder: Path) -> None:
    """Writes the images, each to its position, then all the rest, which makes it whole.

    Raises:
        DataError: it is not what the catalog describes.
        OSError: the folder cannot be written, or is full.
    """
    examples, test, origin = opened
    shape = (entry.counts[0], *entry.image_shape)
    labels = np.full(shape[0], -1, np.int32)
    with prepared.workshop(folder) as made:
        with (made / TRAIN).open("wb") as file:
            for position, image, label in examples:
                file.seek(position * image.nbytes)
                file.write(image.tobytes())
                labels[position] = label
        mapped = np.memmap(made / TRAIN, np.uint8, "r", shape=shape)
        arrays = check(
            Arrays(mapped, labels, *test), entry, [f"what {folder} gets"] * 4
        )
        np.savez(
            made / REST,
            origin=np.array(origin),
            fingerprint=np.array(fingerprint(arrays)),
            train_labels=labels,
            test_images=test[0],
            test_labels=test[1],
        )
        for name in (TRAIN, REST):
            os.replace(made / name, folder / name)


def open_kept(entry: Entry, folder: Path) -> Kept:
    """What keep wrote there.

    Raises:
        ValueError: nothing is there, or it is damaged.
    """
    names = ("train_labels", "test_images", "test_labels", "origin", "fingerprint")
    labels, test_images, test_labels, origin, expected = prepared.read_npz(
        folder / REST, *names
    )
    train = Streamed(folder / TRAIN, labels, entry.image_shape)
    try:
        found = _fingerprint(train, labels, test_images, test_labels)
    except OSError as error:
        raise ValueError(str(error)) from error
    if found != str(expected):
        raise ValueError("the fingerprint does not match")
    return Kept(train, test_images, test_labels, str(origin), str(expected))


def _fingerprint(train: Streamed, *others: np.ndarray) -> str:
    """catalog.fingerprint of the arrays, without having them in memory."""
    hasher = sha256(idx_header(train.shape))
    for begin in range(0, len(train), CHUNK):
        hasher.update(train[begin : begin + CHUNK].data)
    digests = [hasher.hexdigest(), *map(idx_digest, others)]
    return sha256("".join(digests).encode()).hexdigest()
