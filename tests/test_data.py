"""Every road to a data set, and everything that can be wrong with one on the way."""

import gzip
import http.server
import io
import json
import os
import pickle
import signal
import struct
import subprocess
import sys
import tarfile
import threading
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from experiments import catalog, data, fetching, prepared, rawfiles
from experiments.catalog import Arrays

SMALL = catalog.MNIST._replace(counts=(30, 20), class_counts=None)
SMALL_FASHION = catalog.FASHION_MNIST._replace(counts=(30, 20), class_counts=None)


def small_arrays(shape=(28, 28), seed=0) -> Arrays:
    rng = np.random.default_rng(seed)

    def half(count):
        images = rng.integers(0, 256, (count, *shape), np.uint8)
        return images, np.arange(count, dtype=np.int32) % 10

    return Arrays(*half(30), *half(20))


def idx_bytes(array: np.ndarray) -> bytes:
    return catalog.idx_header(array.shape) + array.astype(np.uint8).tobytes()


def write_idx_files(folder: Path, arrays: Arrays, zipped=False) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, array in zip(rawfiles.IDX_FILES, arrays, strict=True):
        content = idx_bytes(array)
        if zipped:
            (folder / f"{name}.gz").write_bytes(gzip.compress(content))
        else:
            (folder / name).write_bytes(content)


def assert_same(dataset: data.Dataset, arrays: Arrays) -> None:
    for field in Arrays._fields:
        np.testing.assert_array_equal(getattr(dataset, field), getattr(arrays, field))
    assert dataset.train_images.dtype == dataset.test_images.dtype == np.uint8
    assert dataset.train_labels.dtype == dataset.test_labels.dtype == np.int32
    assert dataset.fingerprint == catalog.fingerprint(arrays)


@pytest.fixture
def arrays(monkeypatch, tmp_path) -> Arrays:
    """Small stand-ins for MNIST and Fashion-MNIST, in a world of their own."""
    arrays = small_arrays()
    digests = tuple(map(catalog.idx_digest, arrays))
    fashion = SMALL_FASHION._replace(digests=digests)
    monkeypatch.setitem(catalog.CATALOG, "mnist", SMALL)
    monkeypatch.setitem(catalog.CATALOG, "fashion_mnist", fashion)
    monkeypatch.setattr(data, "DEBIAN_FOLDER", tmp_path / "debian")
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return arrays


@pytest.fixture
def no_network(monkeypatch, tmp_path):
    """No tools on the PATH, and addresses where nobody listens."""
    monkeypatch.setenv("PATH", str(tmp_path))
    urls = tuple(f"http://127.0.0.1:9/{name}.gz" for name in rawfiles.IDX_FILES)
    monkeypatch.setattr(fetching, "registered_urls", lambda entry: urls)


@pytest.mark.parametrize("zipped", [False, True], ids=["plain", "gz"])
@pytest.mark.parametrize("name", ["mnist", "fashion_mnist"])
def test_idx_files_in_a_folder(arrays, tmp_path, name, zipped, capsys):
    write_idx_files(tmp_path / "raw", arrays, zipped)
    first = data.load(name, tmp_path / "raw")
    assert_same(first, arrays)
    assert "Preparing" in capsys.readouterr().err
    again = data.load(name, tmp_path / "raw")
    assert_same(again, arrays)
    assert again.source == first.source
    assert capsys.readouterr() == ("", "")


def test_what_is_prepared_is_a_data_set_of_tensorflow_datasets(arrays, tmp_path):
    import tensorflow_datasets as tfds

    write_idx_files(tmp_path, arrays)
    data.load("mnist", tmp_path)
    builder = tfds.builder_from_directory(tmp_path / "mnist" / "3.0.1")
    source = builder.as_data_source("test")
    assert len(source) == 20
    np.testing.assert_array_equal(source[7]["image"][..., 0], arrays.test_images[7])
    assert source[7]["label"] == 7


def test_a_prepared_data_set_needs_nothing_else(arrays, tmp_path):
    entry = catalog.CATALOG["fashion_mnist"]
    assert not data.available("fashion_mnist")
    prepared.prepare(entry, arrays, "a test", tmp_path / "tfds")
    assert data.available("fashion_mnist")
    dataset = data.load("fashion_mnist")
    assert_same(dataset, arrays)
    assert "from a test, prepared in" in dataset.source


def build_shuffled(arrays: Arrays, root: Path) -> Path:
    """What the builder of tensorflow-datasets makes: published positions as keys."""
    import tensorflow_datasets as tfds

    class Mnist(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("3.0.1")

        def _info(self):
            features = {
                "image": tfds.features.Image(shape=(28, 28, 1)),
                "label": tfds.features.ClassLabel(num_classes=10),
            }
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features)
            )

        def _split_generators(self, dl_manager):
            del dl_manager
            return {
                "train": self._generate_examples(*arrays[:2]),
                "test": self._generate_examples(*arrays[2:]),
            }

        def _generate_examples(self, images, labels):
            for key, (image, label) in enumerate(zip(images, labels, strict=True)):
                yield key, {"image": prepared.png(image), "label": int(label)}

    with prepared.quiet_tfds():
        builder = Mnist(data_dir=root, file_format="array_record")
        builder.download_and_prepare()
    return root / "mnist" / "3.0.1"


def test_published_order_is_restored(arrays, tmp_path):
    build_shuffled(arrays, tmp_path / "tfds")
    dataset = data.load("mnist")
    assert_same(dataset, arrays)
    assert "tensorflow-datasets' own builder" in dataset.source


def test_tfrecord_is_read_without_tensorflow(arrays, tmp_path):
    from array_record.python import array_record_module

    folder = build_shuffled(arrays, tmp_path / "tfds")
    for path in folder.glob("*.array_record*"):
        reader = array_record_module.ArrayRecordReader(str(path))
        records = reader.read_all()
        reader.close()
        tfrecord = path.with_name(path.name.replace("array_record", "tfrecord"))
        tfrecord.write_bytes(
            b"".join(struct.pack("<Q4x", len(r)) + r + b"\0" * 4 for r in records)
        )
        path.unlink()
    info = folder / "dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    assert json.loads(info.read_text())["fileFormat"] == "tfrecord"
    assert_same(data.load("mnist"), arrays)
    assert "tensorflow" not in sys.modules


@pytest.mark.parametrize("build", ["ours", "shuffled"])
def test_streamed_it_is_the_same(arrays, tmp_path, capsys, build):
    if build == "shuffled":
        build_shuffled(arrays, tmp_path)
    else:
        write_idx_files(tmp_path, arrays)
    for said in ("as rows", ""):
        streamed = data.load_streamed("mnist", tmp_path)
        assert said in capsys.readouterr().err
        images = streamed.train_images
        assert images.path.exists()
        assert_same(streamed._replace(train_images=images[:]), arrays)


def spoil(path: Path, change) -> None:
    path.write_bytes(change(path.read_bytes()))


@pytest.mark.parametrize(
    ("file", "change", "sentence"),
    [
        (0, lambda c: c[:-1], "truncated"),
        (0, lambda c: c + b"\0", "truncated or damaged"),
        (0, lambda c: b"\0\0\x08\x01" + c[4:], "begins with 00 00 08 01"),
        (1, lambda c: b"PK\3\4" + c[4:], "begins with 50 4b 03 04"),
        (2, lambda c: b"", "begins with nothing"),
        (3, lambda c: c[:-1] + b"\x0a", "labels go from 0 to 10"),
        (0, lambda c: idx_bytes(np.zeros((29, 28, 28))), r"\(29, 28, 28\)"),
        (2, lambda c: idx_bytes(np.zeros((20, 27, 28))), r"\(20, 27, 28\)"),
        (0, lambda c: c[:-1] + bytes([c[-1] ^ 1]), "sha256"),
        (3, lambda c: c[:-1] + b"\1", "sha256"),
        (1, lambda c: gzip.compress(c)[:-9], "truncated or damaged"),
        (1, lambda c: gzip.compress(c)[:20] + b"????", "truncated or damaged"),
    ],
)
def test_a_bad_file_is_named(arrays, tmp_path, file, change, sentence):
    write_idx_files(tmp_path / "raw", arrays)
    bad = tmp_path / "raw" / rawfiles.IDX_FILES[file]
    spoil(bad, change)
    with pytest.raises(data.DataError, match=sentence) as raised:
        data.load("fashion_mnist", tmp_path / "raw")
    assert str(bad) in str(raised.value)
    assert "\n" not in str(raised.value)
    assert sorted(os.listdir(tmp_path / "raw")) == sorted(rawfiles.IDX_FILES)


def test_class_counts_tell_look_alikes_apart(arrays, tmp_path, monkeypatch):
    strict = SMALL._replace(class_counts=(4, 2, *(3,) * 8))
    monkeypatch.setitem(catalog.CATALOG, "mnist", strict)
    write_idx_files(tmp_path, arrays)
    with pytest.raises(data.DataError, match=r"train-labels.* is not MNIST"):
        data.load("mnist", tmp_path)


def test_one_data_set_is_not_taken_for_another(arrays, tmp_path, monkeypatch):
    digest = catalog.idx_digest(arrays.test_images)
    monkeypatch.setitem(catalog._OWNERS, digest, "Fashion-MNIST")
    write_idx_files(tmp_path, arrays)
    with pytest.raises(data.DataError, match="not MNIST: it holds Fashion-MNIST"):
        data.load("mnist", tmp_path)


def test_missing_file_is_named(arrays, tmp_path):
    write_idx_files(tmp_path, arrays)
    (tmp_path / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(data.DataError, match="lacks t10k-labels-idx1-ubyte"):
        data.load("mnist", tmp_path)
    assert not data.available("mnist", tmp_path)


def test_the_package_of_debian_is_found(arrays, tmp_path, no_network):
    write_idx_files(data.DEBIAN_FOLDER, arrays, zipped=True)
    assert data.available("fashion_mnist")
    dataset = data.load("fashion_mnist")
    assert_same(dataset, arrays)
    assert "Debian's package dataset-fashion-mnist" in dataset.source


def test_the_package_of_debian_is_fetched(arrays, tmp_path, monkeypatch, no_network):
    """apt-get and dpkg-deb are played by two scripts."""
    write_idx_files(tmp_path / "served", arrays, zipped=True)
    tools = {
        "apt-get": 'for name; do :; done; echo a package > "$name.deb"',
        "dpkg-deb": (
            'test -s "$2" && target="$3$DEBIAN" && mkdir -p "$target" && '
            'cp "$SERVED"/* "$target"'
        ),
    }
    (tmp_path / "bin").mkdir()
    for name, script in tools.items():
        tool = tmp_path / "bin" / name
        tool.write_text(f"#!/bin/sh\n{script}\n")
        tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    monkeypatch.setenv("DEBIAN", str(data.DEBIAN_FOLDER))
    monkeypatch.setenv("SERVED", str(tmp_path / "served"))
    assert_same(data.load("fashion_mnist"), arrays)
    assert data.available("fashion_mnist")
    assert os.listdir(tmp_path / "cache/jax_softmax") == ["dataset-fashion-mnist"]


@pytest.fixture
def server(arrays, tmp_path, monkeypatch):
    """A host on this machine in the place of the one that has the files."""
    write_idx_files(tmp_path / "served", arrays, zipped=True)

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, format, *args):
            pass

    handler = partial(Quiet, directory=str(tmp_path / "served"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as httpd:
        threading.Thread(target=httpd.serve_forever, args=(0.01,)).start()
        base = f"http://127.0.0.1:{httpd.server_port}"
        urls = tuple(f"{base}/{name}.gz" for name in rawfiles.IDX_FILES)
        monkeypatch.setattr(fetching, "registered_urls", lambda entry: urls)
        yield tmp_path / "served", urls
        httpd.shutdown()


def register(monkeypatch, folder: Path, urls) -> None:
    from tensorflow_datasets.core.download import checksums

    infos = {
        url: checksums.compute_url_info(folder / url.rsplit("/")[-1]) for url in urls
    }
    monkeypatch.setattr(fetching, "url_infos", lambda entry: infos)


def test_download_by_tensorflow_datasets(arrays, server, monkeypatch):
    register(monkeypatch, *server)
    dataset = data.load("mnist")
    assert_same(dataset, arrays)
    assert "tensorflow-datasets' download" in dataset.source


def test_download_of_another_file_is_refused(arrays, server, monkeypatch):
    register(monkeypatch, *server)
    write_idx_files(server[0], small_arrays(seed=1), zipped=True)
    with pytest.raises(data.DataError, match=r"download.*[Cc]hecksum"):
        data.load("mnist")


def test_download_from_a_host_without_the_file(arrays, server, monkeypatch):
    for file in server[0].iterdir():
        file.unlink()
    with pytest.raises(data.DataError, match="answers 404"):
        data.load("mnist")


def test_download_from_a_host_that_falls_silent(arrays, server, monkeypatch):
    register(monkeypatch, *server)
    monkeypatch.setattr(fetching, "STALL_SECONDS", 0.5)
    released = threading.Event()

    def say_little(handler, source, outputfile):
        outputfile.write(source.read(20))
        released.wait(20)

    monkeypatch.setattr(http.server.SimpleHTTPRequestHandler, "copyfile", say_little)
    start = time.monotonic()
    with pytest.raises(data.DataError, match=r"download.*timed out"):
        data.load("mnist")
    assert time.monotonic() - start < 10
    released.set()


def test_registered_addresses():
    for name in ("fashion_mnist", "mnist", "kmnist"):
        urls = fetching.registered_urls(catalog.CATALOG[name])
        assert [url.rsplit("/")[-1] for url in urls] == [
            f"{file}.gz" for file in rawfiles.IDX_FILES
        ]
    (url,) = fetching.registered_urls(catalog.CIFAR10)
    assert url.endswith("cifar-10-binary.tar.gz")


def test_when_every_road_is_closed(arrays, no_network):
    start = time.monotonic()
    with pytest.raises(data.DataError) as raised:
        data.load("fashion_mnist")
    assert time.monotonic() - start < 20
    message = str(raised.value)
    for part in (
        "Fashion-MNIST was not found",
        "prepared by tensorflow-datasets: ",
        "raw files: none in ",
        "download by tensorflow-datasets: http://127.0.0.1:9/",
        "does not answer",
        "package of Debian: this machine has no apt-get",
        "sudo apt-get install dataset-fashion-mnist",
        "--dataset fashion_mnist --data-dir FOLDER",
    ):
        assert part in message


def test_unknown_name():
    with pytest.raises(data.DataError, match=r"'fashion'.*fashion_mnist, mnist, kmnis"):
        data.load("fashion")
    with pytest.raises(data.DataError, match="'fashion'"):
        data.available("fashion")


def test_folders_without_data(arrays, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "README").write_text("")
    for name, sentence in {
        "empty": "is empty",
        "missing": "does not exist",
        "file": "is not a folder",
        "other": "was not found in",
    }.items():
        with pytest.raises(data.DataError, match=sentence) as raised:
            data.load("fashion_mnist", tmp_path / name)
        assert str(tmp_path / name) in str(raised.value)
        assert not data.available("fashion_mnist", tmp_path / name)


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c[:-100],
        lambda c: c[:5000] + bytes([c[5000] ^ 1]) + c[5001:],
        lambda c: b"x",
    ],
    ids=["truncated", "changed", "nonsense"],
)
def test_damaged_cache_is_made_again(arrays, tmp_path, capsys, change):
    write_idx_files(tmp_path, arrays)
    data.load("mnist", tmp_path)
    decoded = tmp_path / "mnist" / "3.0.1" / "decoded.npz"
    spoil(decoded, change)
    capsys.readouterr()
    assert_same(data.load("mnist", tmp_path), arrays)
    assert "decoded.npz is damaged: making it again." in capsys.readouterr().err
    assert_same(data.load("mnist", tmp_path), arrays)
    assert capsys.readouterr().err == ""


def test_cache_with_another_fingerprint_is_made_again(arrays, tmp_path, capsys):
    write_idx_files(tmp_path, arrays)
    data.load("mnist", tmp_path)
    decoded = tmp_path / "mnist" / "3.0.1" / "decoded.npz"
    with np.load(decoded) as kept:
        content = dict(kept)
    content["train_images"] = content["train_images"] ^ 1
    np.savez(decoded, **content)
    capsys.readouterr()
    assert_same(data.load("mnist", tmp_path), arrays)
    assert "damaged" in capsys.readouterr().err


@pytest.mark.parametrize(
    "change", [lambda c: c[:50], lambda c: c[:9000] + b"????" + c[9004:]]
)
def test_damaged_prepared_data_set_is_named(arrays, tmp_path, change):
    folder = prepared.prepare(SMALL, arrays, "a test", tmp_path / "tfds")
    spoil(next(folder.glob("mnist-train*")), change)
    with pytest.raises(data.DataError, match="delete that folder") as raised:
        data.load("mnist")
    assert str(folder) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_another_data_set_under_a_known_name_is_refused(arrays, tmp_path):
    entry = catalog.CATALOG["fashion_mnist"]
    prepared.prepare(entry, small_arrays(seed=1), "a test", tmp_path / "tfds")
    with pytest.raises(
        data.DataError, match=r"train_images of .* is not Fashion-MNIST"
    ):
        data.load("fashion_mnist")


def test_a_folder_in_the_way_is_named(arrays, tmp_path):
    write_idx_files(tmp_path, arrays)
    (tmp_path / "mnist" / "3.0.1" / "something").mkdir(parents=True)
    with pytest.raises(data.DataError, match="is in the way"):
        data.load("mnist", tmp_path)


PREPARING = r"""
import os
import sys
import time
from pathlib import Path
import numpy as np
from experiments import catalog, data, prepared
entry = catalog.MNIST._replace(counts=(30, 20), class_counts=None)
catalog.CATALOG["mnist"] = entry
if sys.argv[2] == "slowly":
    make = prepared.png
    def png(image):
        os.write(1, b"started\n")
        time.sleep(0.05)
        return make(image)
    prepared.png = png
print(data.load("mnist", Path(sys.argv[1])).fingerprint)
"""


def start_preparing(folder: Path, *, slowly: bool) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", PREPARING, folder, "slowly" if slowly else "at once"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[1],
    )


def test_a_killed_preparation_leaves_nothing_to_be_taken_for_whole(arrays, tmp_path):
    write_idx_files(tmp_path, arrays)
    with start_preparing(tmp_path, slowly=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "started\n"
        process.send_signal(signal.SIGKILL)
        process.communicate()
    (leftover,) = tmp_path.glob(".unfinished-*")
    assert prepared.find(SMALL, tmp_path) is None
    os.utime(leftover, (0, 0))
    assert_same(data.load("mnist", tmp_path), arrays)
    assert not leftover.exists()


def test_two_processes_prepare_at_once(arrays, tmp_path):
    write_idx_files(tmp_path, arrays)
    both = [start_preparing(tmp_path, slowly=False) for _ in range(2)]
    for process in both:
        out, err = process.communicate()
        assert out.strip() == catalog.fingerprint(arrays), err
    assert not list(tmp_path.glob("**/.unfinished-*"))


def test_a_folder_that_cannot_be_written(arrays, tmp_path, monkeypatch):
    write_idx_files(tmp_path / "raw", arrays)
    before = sorted(os.listdir(tmp_path / "raw"))
    writable = data._writable
    raw = tmp_path / "raw"
    monkeypatch.setattr(data, "_writable", lambda f: f != raw and writable(f))
    assert_same(data.load("mnist", raw), arrays)
    assert sorted(os.listdir(raw)) == before
    monkeypatch.setattr(data, "_writable", lambda folder: False)
    with pytest.raises(data.DataError, match="can be written"):
        data.load("fashion_mnist", raw)


def cifar10_rows(arrays: Arrays) -> list[np.ndarray]:
    images = np.concatenate([arrays.train_images, arrays.test_images])
    labels = np.concatenate([arrays.train_labels, arrays.test_labels])
    pixels = images.transpose(0, 3, 1, 2).reshape(len(images), -1)
    rows = np.column_stack([labels.astype(np.uint8), pixels])
    return [*np.split(rows[:30], 5), rows[30:]]


def write_cifar10(folder: Path, arrays: Arrays, kind: str) -> Path:
    path = folder / f"cifar-10-{kind}.tar.gz"
    names = [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]
    with tarfile.open(path, "w:gz") as archive:
        for name, rows in zip(names, cifar10_rows(arrays), strict=True):
            if kind == "binary":
                name, content = f"cifar-10-batches-bin/{name}.bin", rows.tobytes()
            else:
                batch = {"labels": rows[:, 0].tolist(), "data": rows[:, 1:]}
                name = f"cifar-10-batches-py/{name}"
                content = pickle.dumps(batch, protocol=2)
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


@pytest.fixture
def colours(arrays, monkeypatch) -> Arrays:
    small = catalog.CIFAR10._replace(counts=(30, 20), class_counts=None)
    monkeypatch.setitem(catalog.CATALOG, "cifar10", small)
    return small_arrays((32, 32, 3))


@pytest.mark.parametrize("kind", ["binary", "python"])
def test_archives_of_cifar10(colours, tmp_path, kind):
    write_cifar10(tmp_path, colours, kind)
    assert_same(data.load("cifar10", tmp_path), colours)


@pytest.mark.parametrize("kind", ["binary", "python"])
@pytest.mark.parametrize(
    "change",
    [lambda c: c[:-2000], lambda c: c[:60000] + b"????" + c[60004:], lambda c: b"x"],
)
def test_damaged_archive_is_named(colours, tmp_path, kind, change):
    path = write_cifar10(tmp_path, colours, kind)
    spoil(path, change)
    with pytest.raises(data.DataError, match=r"truncated|lacks|cannot be") as raised:
        data.load("cifar10", tmp_path)
    assert str(path) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_pickle_runs_no_code(colours, tmp_path):
    bad = pickle.dumps({"labels": os.getcwd, "data": []}, protocol=2)
    with tarfile.open(tmp_path / "cifar-10-python.tar.gz", "w:gz") as archive:
        member = tarfile.TarInfo("cifar-10-batches-py/data_batch_1")
        member.size = len(bad)
        archive.addfile(member, io.BytesIO(bad))
    with pytest.raises(data.DataError, match="asks for"):
        data.load("cifar10", tmp_path)


def test_digits_need_nothing():
    assert data.available("digits")
    digits = data.load("digits")
    assert digits.train_images.shape == (1438, 8, 8)
    assert digits.test_images.shape == (359, 8, 8)
    assert digits.train_images.dtype == np.uint8
    assert (digits.train_images.min(), digits.train_images.max()) == (0, 255)
    assert set(np.unique(digits.test_labels)) == set(range(10))
    assert digits.fingerprint == data.load("digits").fingerprint
    assert "scikit-learn" in digits.source


def real(name: str) -> data.Dataset:
    if not data.available(name):
        pytest.skip(f"{name} is not on this machine: experiments.data.load fetches it")
    return data.load(name)


def test_real_fashion_mnist():
    fashion = real("fashion_mnist")
    arrays = Arrays(*(getattr(fashion, field) for field in Arrays._fields))
    with pytest.raises(data.DataError, match="it holds Fashion-MNIST"):
        catalog.check(arrays, catalog.KMNIST, ["here"] * 4)
    assert fashion.train_images.shape == (60_000, 28, 28)
    assert fashion.test_images.shape == (10_000, 28, 28)
    assert fashion.class_names[fashion.train_labels[0]] == "ankle boot"
    assert fashion.fingerprint.startswith("d1fd84a877f3b78f")
    start = time.perf_counter()
    data.load("fashion_mnist")
    assert time.perf_counter() - start < 1


@pytest.mark.parametrize("name", ["mnist", "kmnist", "cifar10"])
def test_real_others(name):
    dataset = real(name)
    assert len(dataset.train_images) in (50_000, 60_000)


def test_loading_what_is_prepared_imports_little(arrays, tmp_path):
    write_idx_files(tmp_path, arrays)
    data.load("mnist", tmp_path)
    code = PREPARING + (
        "heavy = {'tensorflow_datasets', 'PIL', 'sklearn', 'requests', 'jax'}\n"
        "print(sorted(heavy & set(sys.modules)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, tmp_path, "at once"],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[1],
    )
    assert done.stdout.splitlines() == [catalog.fingerprint(arrays), "[]"]
    assert done.stderr == ""
