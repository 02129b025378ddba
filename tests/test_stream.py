"""Images that stay on disk: the same bits as in memory, and memory that stays flat."""

import subprocess
import sys
from functools import partial

import jax
import numpy as np
import optax
import pytest

from experiments import catalog, data, stream
from experiments.catalog import DataError
from experiments.stream import Streamed
from jax_softmax import SoftmaxRegression, fit

ENTRY = catalog.MNIST._replace(counts=(300, 20), class_counts=None, image_shape=(4, 4))


@pytest.fixture
def opened():
    """Examples in another order than published, test arrays, origin."""
    numbers = np.random.default_rng(0)
    images = numbers.integers(0, 256, (320, 4, 4), np.uint8)
    labels = np.arange(320, dtype=np.int32) % 10
    order = numbers.permutation(300).tolist()
    examples = [(i, images[i], int(labels[i])) for i in order]
    return examples, (images[300:], labels[300:]), "here"


def in_memory(opened):
    return tuple(map(np.array, zip(*(e[1:] for e in sorted(opened[0])), strict=True)))


def test_what_is_kept_is_found(opened, tmp_path):
    stream.keep(opened, ENTRY, tmp_path / "rows")
    kept = stream.open_kept(ENTRY, tmp_path / "rows")
    images, labels = in_memory(opened)
    np.testing.assert_array_equal(kept.train[:], images)
    np.testing.assert_array_equal(kept.train[7:9], images[7:9])
    np.testing.assert_array_equal(kept.train.labels, labels)
    np.testing.assert_array_equal(kept.test_images, opened[1][0])
    arrays = catalog.Arrays(images, labels, *opened[1])
    assert kept.fingerprint == catalog.fingerprint(arrays)
    assert kept.origin == "here"
    assert sorted(p.name for p in (tmp_path / "rows").iterdir()) == [
        "rest.npz",
        "train-images",
    ]


@pytest.mark.parametrize("file", ["rest.npz", "train-images"])
def test_what_is_damaged_is_not_used(opened, tmp_path, file):
    with pytest.raises(ValueError, match="No such file"):
        stream.open_kept(ENTRY, tmp_path)
    stream.keep(opened, ENTRY, tmp_path)
    content = bytearray((tmp_path / file).read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / file).write_bytes(content)
    with pytest.raises(ValueError, match=r"fingerprint|CRC"):
        stream.open_kept(ENTRY, tmp_path)
    (tmp_path / file).write_bytes(content[:-100])
    with pytest.raises(ValueError, match=r"fingerprint|not a zip|reshape"):
        stream.open_kept(ENTRY, tmp_path)
    (tmp_path / file).unlink()
    with pytest.raises(ValueError, match="No such file"):
        stream.open_kept(ENTRY, tmp_path)


def test_another_file_in_its_place_is_not_used(opened, tmp_path):
    stream.keep(opened, ENTRY, tmp_path)
    np.savez(tmp_path / "rest.npz", others=np.zeros(3))
    with pytest.raises(ValueError, match="train_labels"):
        stream.open_kept(ENTRY, tmp_path)
    with (tmp_path / "rest.npz").open("wb") as file:
        np.save(file, np.zeros(3))
    with pytest.raises(ValueError, match="context manager"):
        stream.open_kept(ENTRY, tmp_path)


def test_a_set_that_is_not_whole_is_refused(opened, tmp_path):
    examples, *rest = opened
    with pytest.raises(DataError, match="labels go from -1"):
        stream.keep((examples[1:], *rest), ENTRY, tmp_path)
    assert not list(tmp_path.iterdir())


def test_streamed_or_in_memory_the_same_bits(opened, tmp_path, monkeypatch):
    """From the start, and from within an epoch that the other one began."""
    monkeypatch.setattr("jax_softmax._shuffle.BLOCK_ROWS", 64)
    stream.keep(opened, ENTRY, tmp_path)
    images, labels = in_memory(opened)
    on_disk = stream.open_kept(ENTRY, tmp_path).train
    model = SoftmaxRegression.init(jax.random.key(0), 16, 10)
    moments = []
    run = partial(
        fit,
        model,
        optimizer=optax.adam(0.1),
        key=jax.random.key(1),
        epochs=3,
        batch_size=16,
        transform=lambda x: x.reshape(len(x), -1) / np.float32(255),
        watch_every=5,
    )
    whole = list(run(images, labels, watch=moments.append))
    seen = []
    streams = list(run(on_disk, watch=seen.append))
    for a, b in zip(whole + moments, streams + seen, strict=True):
        jax.tree.map(np.testing.assert_array_equal, a, b)
    assert {5, 10, 15} <= {len(moment.losses) for moment in moments}
    goes_on = list(run(on_disk, progress=moments[5]))
    jax.tree.map(np.testing.assert_array_equal, goes_on[-1], whole[-1])


TEN_TIMES = """
import resource, sys
from pathlib import Path
import jax, numpy as np, optax
from experiments.stream import Streamed
from jax_softmax import SoftmaxRegression, _shuffle, fit

BUDGET = 64 * 2**20
_shuffle.BLOCK_ROWS = 2**12
rows = 10 * BUDGET // 784
with open(sys.argv[1], "wb") as file:
    file.truncate(rows * 784)
model = SoftmaxRegression.init(jax.random.key(0), 784, 10)
def features(images):
    return images.reshape(len(images), -1) / np.float32(255)
def train(rows):
    images = Streamed(Path(sys.argv[1]), labels[:rows], (28, 28))
    run = fit(model, images, optimizer=optax.sgd(0.1), key=jax.random.key(1), epochs=1,
              batch_size=2048, transform=features)
    for epoch in run:
        return epoch
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
labels = np.random.default_rng(0).integers(0, 10, rows).astype(np.int32)
train(2**12 + rows % 2048)  # both programs are compiled
before = peak()
train(rows)
print(peak() - before, BUDGET, Path(sys.argv[1]).stat().st_size)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="sparse files, RSS in kilobytes")
def test_memory_stays_flat_on_ten_times_its_budget(tmp_path):
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", TEN_TIMES, str(tmp_path / "images")],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    grown, budget, size = map(int, done.stdout.split())
    assert size > 9.99 * budget
    assert grown < budget


def test_the_digits_streamed(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    whole = data.load("digits")
    for said in ("once, in some seconds", ""):
        streamed = data.load_streamed("digits")
        assert said in capsys.readouterr().err
        assert isinstance(streamed.train_images, Streamed)
        np.testing.assert_array_equal(streamed.train_images[:], whole.train_images)
        np.testing.assert_array_equal(streamed.train_labels, whole.train_labels)
        assert streamed.fingerprint == whole.fingerprint
    monkeypatch.setattr(stream.np, "savez", _full)
    (tmp_path / "jax_softmax/digits/rest.npz").unlink()
    with pytest.raises(DataError, match=r"No space left.*leave --stream out"):
        data.load_streamed("digits")


def _full(*_, **__):
    raise OSError(28, "No space left on device")


def test_grain_is_there_before_other_threads_import():
    """While it is imported, all that other threads import is put off, and fails."""
    program = """
import sys
from pathlib import Path
import numpy as np
from experiments.stream import Streamed
assert "grain" not in sys.modules
Streamed(Path("none"), np.zeros(3, np.int32), (4, 4))
assert "grain" in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], check=True)
