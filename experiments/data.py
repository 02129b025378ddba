"""Image data sets as arrays: found, checked, prepared by tensorflow-datasets, kept.

`load` is the whole interface. A data set comes by the first road that is open:
prepared already, raw files on this machine, tensorflow-datasets' download, or Debian's
package of Fashion-MNIST. Whatever the road, the arrays are the same to the last bit.
"""

import os
import sys
from collections.abc import Callable
from hashlib import sha256
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments import fetching, prepared, rawfiles, stream
from experiments.cache import user_cache
from experiments.catalog import (
    CATALOG,
    DIGITS,
    Arrays,
    DataError,
    Entry,
    check,
    fingerprint,
)
from experiments.fetching import RoadClosed

__all__ = ["DataError", "Dataset", "available", "load", "load_streamed"]

DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")


class Dataset(NamedTuple):
    """A data set in memory, in published order.

    Attributes:
        name: its name in tensorflow-datasets, or "digits".
        source: where it came from, as a sentence to print.
        train_images: uint8 [n, height, width], with [3] behind for colours; or where
            to read them from.
        train_labels: int32 [n].
        test_images: like train_images.
        test_labels: like train_labels.
        class_names: a text for each label.
        fingerprint: sha256 of the unpacked content.
    """

    name: str
    source: str
    train_images: Any
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    class_names: tuple[str, ...]
    fingerprint: str


def load(name: str, data_dir: Path | None = None) -> Dataset:
    """The data set of that name, checked; fetched and prepared on the first call.

    Args:
        name: fashion_mnist, mnist, kmnist, cifar10 or digits.
        data_dir: look here and nowhere else, for a data set prepared by
            tensorflow-datasets or for the raw files. Without it: TFDS_DATA_DIR or
            ~/tensorflow_datasets, then the other roads.

    Raises:
        DataError: no such data set, no road to it, or damaged files.
    """
    entry = _entry(name)
    if entry is DIGITS:
        return _digits(data_dir)
    if data_dir is not None:
        data_dir = _filled_folder(Path(data_dir))
    reasons = []
    for title, road in _roads(entry, data_dir):
        try:
            return road()
        except RoadClosed as closed:
            reasons.append(f"{title}: {closed}")
    raise DataError(_no_road(entry, data_dir, reasons))


def load_streamed(name: str, data_dir: Path | None = None) -> Dataset:
    """As load, but the training images stay on disk and train_images reads them.

    Raises:
        DataError: as load does, or their rows cannot be written.
    """
    entry = _entry(name)
    if entry is DIGITS:
        whole = _digits(data_dir)
        folder = user_cache() / "digits"
        return _rows(entry, folder, lambda: _one_by_one(whole))
    if data_dir is not None:
        data_dir = _filled_folder(Path(data_dir))
    found = _find(entry, data_dir)
    if found is None:
        load(name, data_dir)  # which prepares it, by whatever road
        found = _find(entry, data_dir)
    assert found is not None
    folder = found / "rows" if _writable(found) else _cached("rows", found)
    return _rows(entry, folder, lambda: prepared.opened(entry, found))


def available(name: str, data_dir: Path | None = None) -> bool:
    """Whether load would succeed without any network: looks, but does not read."""
    entry = _entry(name)
    if entry is DIGITS or any(prepared.find(entry, root) for root in _roots(data_dir)):
        return True
    try:
        return any(rawfiles.find(entry, place) for place in _places(entry, data_dir))
    except DataError:
        return False


def _entry(name: str) -> Entry:
    if name not in CATALOG:
        raise DataError(
            f"There is no data set {name!r}: choose one of {', '.join(CATALOG)}."
        )
    return CATALOG[name]


def _filled_folder(folder: Path) -> Path:
    folder = folder.expanduser()
    remedy = "name the folder of a data set, or leave --data-dir out to have it found."
    try:
        if any(folder.iterdir()):
            return folder
    except NotADirectoryError:
        raise DataError(f"The data folder {folder} is not a folder: {remedy}") from None
    except FileNotFoundError:
        raise DataError(f"The data folder {folder} does not exist: {remedy}") from None
    except OSError as error:
        raise DataError(
            f"The data folder {folder} cannot be read ({error.strerror}): {remedy}"
        ) from None
    raise DataError(f"The data folder {folder} is empty: {remedy}")


def _roads(
    entry: Entry, data_dir: Path | None
) -> list[tuple[str, Callable[[], Dataset]]]:
    near = [
        ("prepared by tensorflow-datasets", lambda: _from_prepared(entry, data_dir)),
        ("raw files", lambda: _from_raw_files(entry, data_dir)),
    ]
    far = [
        ("download by tensorflow-datasets", lambda: _from_download(entry)),
        ("package of Debian", lambda: _from_debian(entry)),
    ]
    return near if data_dir else near + far


def _no_road(entry: Entry, data_dir: Path | None, reasons: list[str]) -> str:
    job = "uv run python -m experiments.fashion_mnist "
    job += f"--dataset {entry.name} --data-dir FOLDER"
    files = "FOLDER holding " + (
        f"{rawfiles.CIFAR10_BINARY} or {rawfiles.CIFAR10_PYTHON}"
        if entry.name == "cifar10"
        else f"{', '.join(rawfiles.IDX_FILES)}, plain or .gz"
    )
    package = (
        [f"  sudo apt-get install {entry.debian_package}"]
        if entry.debian_package
        else [f"  tfds build {entry.name}    (where TensorFlow is installed)"]
    )
    where = f" in {data_dir}" if data_dir else ""
    return "\n".join(
        [
            f"{entry.title} was not found{where}. Roads tried:",
            *(f"  {reason}" for reason in reasons),
            "Either of these commands helps:",
            *package,
            f"  {job}    ({files})",
        ]
    )


def _tfds_root(data_dir: Path | None) -> Path:
    standard = os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    return (data_dir or Path(standard)).expanduser()


def _roots(data_dir: Path | None) -> tuple[Path, Path]:
    """Where prepared data sets live: the usual folder, else one that we may write."""
    root = _tfds_root(data_dir)
    key = sha256(str(root.resolve()).encode()).hexdigest()[:12]
    return root, user_cache() / f"prepared-{key}"


def _writable(folder: Path) -> bool:
    while not os.path.exists(folder):
        folder = folder.parent
    return os.access(folder, os.W_OK | os.X_OK)


def _writable_root(data_dir: Path | None) -> Path:
    root = next(filter(_writable, _roots(data_dir)), None)
    if root is None:
        raise DataError(
            f"Neither {_tfds_root(data_dir)} nor {user_cache()} can be written: "
            "set TFDS_DATA_DIR to a folder of yours."
        )
    return root


def _package_folder(entry: Entry) -> Path:
    return user_cache() / str(entry.debian_package)


def _places(entry: Entry, data_dir: Path | None) -> tuple[Path, ...]:
    if data_dir is not None:
        return data_dir, data_dir / entry.name
    if entry.debian_package is None:
        return ()
    inside = DEBIAN_FOLDER.relative_to("/")
    return DEBIAN_FOLDER, _package_folder(entry) / inside


def _find(entry: Entry, data_dir: Path | None) -> Path | None:
    folders = (prepared.find(entry, root) for root in _roots(data_dir))
    return next(filter(None, folders), None)


def _cached(what: str, folder: Path) -> Path:
    """In the cache, for a prepared data set in a folder that we may not write."""
    info = (folder / "dataset_info.json").read_bytes()
    key = sha256(str(folder.resolve()).encode() + info).hexdigest()[:12]
    return user_cache() / f"{what}-{key}"


def _rows(entry: Entry, folder: Path, opened: Callable[[], stream.Opened]) -> Dataset:
    """From the rows in that folder, written there if need be."""
    try:
        kept = stream.open_kept(entry, folder)
    except ValueError:
        _say(f"Writing {entry.title} as rows in {folder}: once, in some seconds.")
        try:
            stream.keep(opened(), entry, folder)
        except OSError as error:
            raise DataError(
                f"{folder} cannot be written ({error.strerror}): make room there, or "
                "leave --stream out."
            ) from error
        kept = stream.open_kept(entry, folder)
    source = f"{entry.title} from {kept.origin}, streamed from {folder}."
    return Dataset(
        entry.name,
        source,
        kept.train,
        kept.train.labels,
        kept.test_images,
        kept.test_labels,
        entry.class_names,
        kept.fingerprint,
    )


def _from_prepared(entry: Entry, data_dir: Path | None) -> Dataset:
    if folder := _find(entry, data_dir):
        return _read_prepared(entry, folder)
    root = _tfds_root(data_dir)
    raise RoadClosed(f"{root / entry.name} holds no prepared version")


def _read_prepared(entry: Entry, folder: Path) -> Dataset:
    """From the decoded arrays beside the prepared data set, made if need be."""
    decoded = folder / "decoded.npz"
    if not decoded.exists() and not _writable(folder):
        decoded = _cached("decoded", folder).with_suffix(".npz")
    if decoded.exists():
        try:
            arrays, origin, digest = prepared.read_decoded(decoded)
            check(arrays, entry, [str(decoded)] * 4)
            return _dataset(entry, arrays, origin, folder, digest)
        except (ValueError, DataError):
            _say(f"{decoded} is damaged: making it again.")
    arrays, origin = prepared.read(entry, folder)
    try:
        prepared.keep_decoded(arrays, origin, decoded)
    except OSError as error:
        _say(f"{decoded} cannot be written ({error.strerror}): loading stays slow.")
    return _dataset(entry, arrays, origin, folder, fingerprint(arrays))


def _dataset(
    entry: Entry, arrays: Arrays, origin: str, folder: Path, fingerprint: str
) -> Dataset:
    source = f"{entry.title} from {origin}, prepared in {folder}."
    return Dataset(entry.name, source, *arrays, entry.class_names, fingerprint)


def _from_raw_files(entry: Entry, data_dir: Path | None) -> Dataset:
    places = _places(entry, data_dir)
    for place in places:
        if files := rawfiles.find(entry, place):
            origin = str(place) if data_dir else _debian(entry)
            return _prepare(entry, files, origin, data_dir)
    raise RoadClosed(
        f"none in {' or '.join(map(str, places))}"
        if places
        else "no --data-dir was given"
    )


def _prepare(
    entry: Entry, files: tuple[Path, ...], origin: str, data_dir: Path | None
) -> Dataset:
    arrays = rawfiles.read(entry, files)
    root = _writable_root(data_dir)
    _say(f"Preparing {entry.title} in {root}: once, in some seconds.")
    try:
        folder = prepared.prepare(entry, arrays, origin, root)
    except DataError:
        raise
    except Exception as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(
            f"{entry.title} cannot be prepared in {root} ({reason}): make room there, "
            "or set TFDS_DATA_DIR to another folder."
        ) from error
    return _read_prepared(entry, folder)


def _from_download(entry: Entry) -> Dataset:
    folder = _writable_root(None) / "downloads"
    _say(f"Trying tensorflow-datasets' download of {entry.title}.")
    files = fetching.download(entry, folder)
    return _prepare(entry, files, "tensorflow-datasets' download", None)


def _from_debian(entry: Entry) -> Dataset:
    if entry.debian_package is None:
        raise RoadClosed(f"Debian has none of {entry.title}")
    _say(f"Trying {_debian(entry)}.")
    fetching.unpack_debian_package(entry.debian_package, _package_folder(entry))
    files = rawfiles.find(entry, _places(entry, None)[-1])
    if files is None:
        raise RoadClosed(f"{entry.debian_package} has no files in {DEBIAN_FOLDER}")
    return _prepare(entry, files, _debian(entry), None)


def _debian(entry: Entry) -> str:
    return f"Debian's package {entry.debian_package}"


def _digits(data_dir: Path | None) -> Dataset:
    """The 1797 images that scikit-learn brings along: every fifth one is for testing.

    Its pixels are counts from 0 to 16; they are scaled to 0..255 and rounded.
    """
    if data_dir is not None:
        raise DataError(
            f"The digits are bundled with scikit-learn and not read from {data_dir}: "
            "leave --data-dir out."
        )
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    images = np.rint(pixels * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8)
    labels = labels.astype(np.int32)
    is_test = np.arange(len(labels)) % 5 == 4
    arrays = Arrays(
        images[~is_test], labels[~is_test], images[is_test], labels[is_test]
    )
    check(arrays, DIGITS, ["scikit-learn's digits"] * 4)
    source = (
        "The 1797 handwritten digits bundled with scikit-learn, every fifth for "
        "testing, pixels scaled from 0..16 to 0..255."
    )
    return Dataset("digits", source, *arrays, DIGITS.class_names, fingerprint(arrays))


def _one_by_one(whole: Dataset) -> stream.Opened:
    examples = zip(count(), whole.train_images, whole.train_labels)
    return examples, (whole.test_images, whole.test_labels), whole.source


def _say(sentence: str) -> None:
    print(sentence, file=sys.stderr)
