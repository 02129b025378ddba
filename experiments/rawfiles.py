"""Data sets as their authors publish them: IDX files and the archives of CIFAR-10."""

import gzip
import io
import math
import os
import pickle
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from experiments.catalog import Arrays, DataError, Entry, check, idx_header

IDX_FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)
CIFAR10_BINARY = "cifar-10-binary.tar.gz"
CIFAR10_PYTHON = "cifar-10-python.tar.gz"


def find(entry: Entry, folder: Path) -> tuple[Path, ...] | None:
    """The files of the data set in a folder, None where there is not one of them.

    Raises:
        DataError: some of the files are there and others are missing.
    """
    if entry.name == "cifar10":
        archives = (folder / name for name in (CIFAR10_BINARY, CIFAR10_PYTHON))
        return next(((path,) for path in archives if os.path.isfile(path)), None)
    files = [_plain_or_gzipped(folder, name) for name in IDX_FILES]
    missing = [n for n, file in zip(IDX_FILES, files, strict=True) if file is None]
    if len(missing) == len(files):
        return None
    if missing:
        raise DataError(
            f"{folder} lacks {' and '.join(missing)} (plain or .gz) beside the other "
            f"files of {entry.title}: add what is missing."
        )
    return tuple(file for file in files if file is not None)


def _plain_or_gzipped(folder: Path, name: str) -> Path | None:
    candidates = (folder / name, folder / f"{name}.gz")
    return next((path for path in candidates if os.path.isfile(path)), None)


def read(entry: Entry, files: tuple[Path, ...]) -> Arrays:
    """The four arrays in published order, checked against the catalog.

    Raises:
        DataError: a file is unreadable, damaged, or not what the catalog describes.
    """
    if entry.name == "cifar10":
        (archive,) = files
        return check(_read_cifar10(archive), entry, (str(archive),) * 4)
    arrays = Arrays(*map(read_idx, files, (3, 1, 3, 1)))
    arrays = arrays._replace(
        train_labels=arrays.train_labels.astype(np.int32),
        test_labels=arrays.test_labels.astype(np.int32),
    )
    return check(arrays, entry, [*map(str, files)])


def read_idx(path: Path, rank: int) -> np.ndarray:
    """The array of unsigned bytes in an IDX file, plain or gzipped.

    Raises:
        DataError: the file is unreadable, damaged, or of another kind or rank.
    """
    content = _unpacked(path)
    magic = idx_header((0,) * rank)[:4]
    if content[:4] != magic:
        raise DataError(
            f"{path} is not the IDX file it should be: it begins with "
            f"{content[:4].hex(' ') or 'nothing'} instead of {magic.hex(' ')}; "
            "fetch it again."
        )
    start = 4 + 4 * rank
    shape = tuple(
        int.from_bytes(content[at : at + 4], "big") for at in range(4, start, 4)
    )
    if len(content) != start + math.prod(shape):
        raise DataError(
            f"{path} is truncated or damaged: its header promises "
            f"{start + math.prod(shape)} bytes and {len(content)} are there; "
            "fetch it again."
        )
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


def _unpacked(path: Path) -> bytes:
    try:
        content = path.read_bytes()
        is_gzip = content[:2] == b"\x1f\x8b"
        return gzip.decompress(content) if is_gzip else content
    except (OSError, EOFError, zlib.error) as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> DataError:
    if isinstance(error, OSError) and error.strerror:
        return DataError(f"{path} cannot be read: {error.strerror}.")
    reason = str(error).split("\n")[0].rstrip(".:")
    return DataError(f"{path} is truncated or damaged ({reason}): fetch it again.")


def _read_cifar10(path: Path) -> Arrays:
    """Both published forms: .bin batches, and .pkl batches of the Python archive."""
    try:
        batches = dict(_cifar10_batches(path))
        train = [batches[f"data_batch_{number}"] for number in range(1, 6)]
        test = [batches["test_batch"]]
    except KeyError as error:
        raise DataError(f"{path} lacks the batch {error}: fetch it again.") from error
    except (tarfile.TarError, ValueError) as error:
        raise _damaged(path, error) from error
    return Arrays(*_stack_cifar10(train), *_stack_cifar10(test))


def _cifar10_batches(path: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Each batch by name: rows of one label and 3072 pixels, colours outermost."""
    with tarfile.open(fileobj=io.BytesIO(_unpacked(path)), mode="r:") as archive:
        for member in archive:
            name = Path(member.name).name.removesuffix(".bin")
            if "_batch" not in name or (file := archive.extractfile(member)) is None:
                continue
            content = file.read()
            if member.name.endswith(".bin"):
                rows = np.frombuffer(content, np.uint8).reshape(-1, 3073)
            else:
                rows = _unpickle_batch(content)
            yield name, rows


def _stack_cifar10(batches: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    rows = np.concatenate(batches)
    images = rows[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return np.ascontiguousarray(images), rows[:, 0].astype(np.int32)


class _ArraysOnly(pickle.Unpickler):
    """A pickle can name any function to call: only NumPy's array makers may be."""

    def find_class(self, module: str, name: str) -> object:
        if (module.split(".")[0], name) in {
            ("numpy", "_reconstruct"),
            ("numpy", "ndarray"),
            ("numpy", "dtype"),
            ("_codecs", "encode"),
        }:
            return super().find_class(module.replace("numpy.core", "numpy._core"), name)
        raise ValueError(f"its pickle asks for {module}.{name}")


def _unpickle_batch(content: bytes) -> np.ndarray:
    try:
        batch = _ArraysOnly(io.BytesIO(content), encoding="latin1").load()
        labels = np.array(batch["labels"], np.uint8)
        return np.column_stack([labels, batch["data"]])
    except Exception as error:  # a damaged pickle can raise anything
        raise ValueError(f"a batch is no pickle of CIFAR-10: {error}") from error
