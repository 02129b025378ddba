"""Rows that need not be in memory: the same bits, checked, and waited for out loud."""

import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jax_softmax import SoftmaxRegression, fit
from jax_softmax._shuffle import Blocks, RowsOf

pytestmark = pytest.mark.usefixtures("strict_types")

KEY = jax.random.key(0)
WAITED = "/jax_softmax/fit/waited_for_rows"


def problem(rows=103, features=4, classes=3):
    random = np.random.default_rng(0)
    x = random.normal(size=(rows, features)).astype(np.float32)
    labels = random.integers(0, classes, rows)
    return SoftmaxRegression.init(KEY, features, classes), x, labels


class OnDisk:
    """Rows from a memory-mapped file."""

    def __init__(self, path, x, labels):
        np.save(path, x)
        self.x, self.labels = np.load(path, mmap_mode="r"), labels

    def __len__(self):
        return len(self.labels)

    def read(self, wanted):
        for rows in wanted:
            yield np.asarray(self.x[rows]), self.labels[rows]


def test_rows_that_are_not_in_memory_give_the_same_bits(tmp_path):
    model, x, labels = problem()
    arguments = {"optimizer": optax.sgd(0.1), "key": KEY, "epochs": 2, "batch_size": 10}
    in_memory = list(fit(model, x, labels, **arguments))
    on_disk = list(fit(model, OnDisk(tmp_path / "x.npy", x, labels), **arguments))
    for a, b in zip(in_memory, on_disk, strict=True):
        assert a.train_loss == b.train_loss
        assert (a.model.w == b.model.w).all()


class Reading(OnDisk):
    """Rows as some function of what is wanted gives them."""

    def __init__(self, x, labels, read):
        self.x, self.labels, self._read = x, labels, read

    def read(self, wanted):
        return self._read(self, wanted)


def into_one_buffer(source, wanted):
    x, labels = np.empty_like(source.x), np.empty_like(source.labels)
    for rows in wanted:
        x[: len(rows)], labels[: len(rows)] = source.x[rows], source.labels[rows]
        yield x[: len(rows)], labels[: len(rows)]
        x[:], labels[:] = 0, 0


def of_another_byte_order(source, wanted):
    for rows in wanted:
        yield source.x[rows].astype(">f4"), source.labels[rows].astype(">i4")


@pytest.mark.parametrize("read", [into_one_buffer, of_another_byte_order])
def test_rows_however_they_are_read(read):
    model, x, labels = problem()
    arguments = {"optimizer": optax.sgd(0.1), "key": KEY, "epochs": 3, "batch_size": 10}
    *_, in_memory = fit(model, x, labels, **arguments)
    *_, same = fit(model, Reading(x, labels, read), **arguments)
    assert (same.model.w == in_memory.model.w).all()


@pytest.mark.parametrize(
    ("read", "sentence"),
    [
        (
            lambda s, wanted: iter(()),
            "x.read must yield rows 4 times here, it ended af",
        ),
        (
            lambda s, wanted: ((s.x[rows], s.labels[rows]) for rows in wanted[:1]),
            "ended after 1",
        ),
        (
            lambda s, wanted: (s.x[rows] for rows in wanted),
            "x.read must yield pairs, rows and their labels, got ndarray",
        ),
        (
            lambda s, wanted: ((s.x[rows[:5]], s.labels[rows[:5]]) for rows in wanted),
            r"x.read must yield the 100 rows that it is asked for, got shape \(5, 4\)",
        ),
        (
            lambda s, wanted: ((s.x[rows], np.eye(3, dtype=int)) for rows in wanted),
            r"the labels that x.read yields must have shape \(100,\), got \(3, 3\)",
        ),
        (
            lambda s, wanted: ((s.x[rows], s.labels[rows] / 2) for rows in wanted),
            r"the labels that x.read yields must be integer .*: convert them with ast",
        ),
        (
            lambda s, wanted: (
                (np.full((len(rows), 4), 2**40), s.labels[rows]) for rows in wanted
            ),
            "the rows that x.read yields must fit int32",
        ),
        (lambda s, wanted: (None for _ in wanted), "must yield pairs.*got NoneType"),
        (lambda s, wanted: None, "x.read must yield rows.*a generator.*got NoneType"),
    ],
    ids=[
        "nothing",
        "one time",
        "no labels",
        "few rows",
        "one-hot labels",
        "labels of another type",
        "rows of 64 bits",
        "None each time",
        "None",
    ],
)
def test_rows_that_are_not_as_asked_for(read, sentence, our_errors):
    model, x, labels = problem()
    source = Reading(x, labels, lambda s, wanted: read(s, list(wanted)))
    arguments = {"optimizer": optax.sgd(0.1), "key": KEY, "epochs": 2, "batch_size": 10}
    with pytest.raises((ValueError, TypeError), match=sentence):
        list(fit(model, source, **arguments))
    with pytest.raises(ValueError, match="x must have at least one row"):
        fit(model, Reading(x[:0], labels[:0], read), **arguments)
    with pytest.raises(TypeError, match="labels must not be given where x is Rows"):
        fit(model, source, labels, **arguments)


@pytest.fixture
def waits():
    """Seconds as jax.monitoring hears of them."""
    heard = []

    def listen(event, seconds, **_):
        if event == WAITED:
            heard.append(seconds)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield heard
    jax.monitoring.unregister_event_duration_listener(listen)


def slowly(seconds):
    def read(source, wanted):
        for rows in wanted:
            time.sleep(seconds)
            yield source.x[rows], source.labels[rows]

    return read


def test_the_device_waits_for_rows_that_are_slow(waits):
    model, x, labels = problem()
    source = Reading(x, labels, slowly(0.2))
    list(fit(model, source, optimizer=optax.sgd(0.1), key=KEY, epochs=2))
    blocks, after_the_last = waits[:-1], waits[-1]
    assert len(blocks) == 2
    assert min(blocks) > 0.1
    assert after_the_last < 0.1


def test_the_device_does_not_wait_for_rows_that_come_while_it_works(waits):
    def long_work(model, x, labels):
        numbers = jax.lax.fori_loop(0, 300, lambda _, a: jnp.sin(a), jnp.ones(10**6))
        return model.b.sum() + jax.lax.stop_gradient(numbers.sum())

    model, x, labels = problem()
    source = Reading(x, labels, slowly(0.02))
    run = {"optimizer": optax.sgd(0.1), "objective": long_work, "key": KEY, "epochs": 3}
    list(fit(model, source, **run))
    assert waits[0] >= 0.02  # for the first, it does
    assert waits[1:] == [0, 0, 0]


def test_what_is_wanted_is_a_sequence():
    wanted = RowsOf(Blocks(KEY, 20, 4, epochs=2, cut_every=1))
    everyone = list(wanted)
    np.testing.assert_array_equal(wanted[-1], everyone[-1])
    np.testing.assert_array_equal(wanted[2:4], everyone[2:4])
    with pytest.raises(IndexError):
        wanted[len(everyone)]
