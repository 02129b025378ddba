"""What each data set is, and how to tell that we hold it and nothing else."""

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class DataError(Exception):
    """A data set cannot be used; its text is one sentence for the user."""


class Arrays(NamedTuple):
    """Images as uint8 [n, height, width(, colours)], labels as int32 [n]."""

    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray


class Entry(NamedTuple):
    """One data set of the catalog.

    Attributes:
        name: its name in tensorflow-datasets.
        title: its name in a sentence.
        version: the version tensorflow-datasets gives it.
        image_shape: height, width, and 3 for colours.
        counts: images for training and for testing.
        class_names: a text for each label.
        class_counts: training images of each class, which tells look-alikes apart.
        digests: sha256 of the four unpacked IDX files in the order of Arrays, where
            known: the arrays of every road are compared with them.
        debian_package: the package of Debian that holds its IDX files.
    """

    name: str
    title: str
    version: str
    image_shape: tuple[int, ...]
    counts: tuple[int, int]
    class_names: tuple[str, ...]
    class_counts: tuple[int, ...] | None = None
    digests: tuple[str, ...] | None = None
    debian_package: str | None = None


FASHION_MNIST = Entry(
    name="fashion_mnist",
    title="Fashion-MNIST",
    version="3.0.1",
    image_shape=(28, 28),
    counts=(60_000, 10_000),
    class_names=(
        *("t-shirt", "trouser", "pullover", "dress", "coat"),
        *("sandal", "shirt", "sneaker", "bag", "ankle boot"),
    ),
    class_counts=(6000,) * 10,
    digests=(
        "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
        "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
        "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
        "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
    ),
    debian_package="dataset-fashion-mnist",
)
MNIST = Entry(
    name="mnist",
    title="MNIST",
    version="3.0.1",
    image_shape=(28, 28),
    counts=(60_000, 10_000),
    class_names=tuple("0123456789"),
    class_counts=(5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949),
)
KMNIST = Entry(
    name="kmnist",
    title="Kuzushiji-MNIST",
    version="3.0.1",
    image_shape=(28, 28),
    counts=(60_000, 10_000),
    class_names=("o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo"),
    class_counts=(6000,) * 10,
)
CIFAR10 = Entry(
    name="cifar10",
    title="CIFAR-10",
    version="3.0.2",
    image_shape=(32, 32, 3),
    counts=(50_000, 10_000),
    class_names=(
        *("airplane", "automobile", "bird", "cat", "deer"),
        *("dog", "frog", "horse", "ship", "truck"),
    ),
    class_counts=(5000,) * 10,
)
DIGITS = Entry(
    name="digits",
    title="the handwritten digits of scikit-learn",
    version="1.0.0",
    image_shape=(8, 8),
    counts=(1438, 359),
    class_names=tuple("0123456789"),
)
CATALOG = {
    entry.name: entry for entry in (FASHION_MNIST, MNIST, KMNIST, CIFAR10, DIGITS)
}
_OWNERS = {
    digest: entry.title for entry in CATALOG.values() for digest in entry.digests or ()
}


def check(
    arrays: Arrays, entry: Entry, places: Sequence[str], remedy: str = "fetch it again"
) -> Arrays:
    """The arrays themselves, once they are known to be the data set.

    `places` says of each array where it came from, for the error.

    Raises:
        DataError: wrong count, shape, label or content, and of which array.
    """
    train, test = entry.counts
    counts = (train, train, test, test)
    digests = entry.digests or (None,) * 4
    for place, array, count, digest in zip(
        places, arrays, counts, digests, strict=True
    ):
        sizes = () if array.ndim == 1 else entry.image_shape
        if reason := (
            _wrong_shape(array, (count, *sizes))
            or (array.ndim == 1 and _wrong_labels(array, len(entry.class_names)))
            or _wrong_content(array, digest, entry.title)
        ):
            raise DataError(f"{place} is not {entry.title}: {reason}; {remedy}.")
    if entry.class_counts is not None:
        found = np.bincount(arrays.train_labels, minlength=len(entry.class_names))
        if tuple(found) != entry.class_counts:
            raise DataError(
                f"{places[1]} is not {entry.title}: it has {found.tolist()} images of "
                f"the classes and not {list(entry.class_counts)}; {remedy}."
            )
    return arrays


def _wrong_shape(array: np.ndarray, shape: tuple[int, ...]) -> str | None:
    if array.shape == shape:
        return None
    return f"it holds an array of shape {array.shape} where {shape} belongs"


def _wrong_labels(labels: np.ndarray, classes: int) -> str | None:
    if labels.min() >= 0 and labels.max() < classes:
        return None
    return (
        f"its labels go from {labels.min()} to {labels.max()} where 0 to {classes - 1} "
        "belong"
    )


def _wrong_content(array: np.ndarray, digest: str | None, title: str) -> str | None:
    found = idx_digest(array)
    if digest is None:
        owner = _OWNERS.get(found, title)
        return None if owner == title else f"it holds {owner}"
    if found == digest:
        return None
    return (
        f"the sha256 of its unpacked content is {found[:12]}... where "
        f"{digest[:12]}... belongs"
    )


def fingerprint(arrays: Arrays) -> str:
    """One sha256 over those of the four arrays: the same by whichever road."""
    digests = "".join(idx_digest(array) for array in arrays)
    return hashlib.sha256(digests.encode()).hexdigest()


def idx_digest(array: np.ndarray) -> str:
    """sha256 of the array written as an unpacked IDX file of unsigned bytes."""
    hasher = hashlib.sha256(idx_header(array.shape))
    hasher.update(np.ascontiguousarray(array, dtype=np.uint8).data)
    return hasher.hexdigest()


def idx_header(shape: tuple[int, ...]) -> bytes:
    """Two zeros, 8 for unsigned bytes, the rank, then each size in 4 bytes."""
    sizes = b"".join(size.to_bytes(4, "big") for size in shape)
    return bytes((0, 0, 8, len(shape))) + sizes
