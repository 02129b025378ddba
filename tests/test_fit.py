"""fit: every row once an epoch, exact evaluation, repeatable, and safe failures."""

import pickle
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jax_softmax import (
    NonFiniteLoss,
    Progress,
    SoftmaxRegression,
    cross_entropy,
    evaluate,
    fit,
)
from jax_softmax._shuffle import Blocks, epoch_order

pytestmark = pytest.mark.usefixtures("strict_types")

KEY = jax.random.key(0)
MOMENTUM = optax.sgd(0.1, momentum=0.9)


def problem(rows=103, features=4, classes=3):
    random = np.random.default_rng(0)
    x = random.normal(size=(rows, features)).astype(np.float32)
    labels = random.integers(0, classes, rows)
    return SoftmaxRegression.init(KEY, features, classes), x, labels


def visits_of_one_epoch(rows, batch_size, key):
    """With a loss linear in w, the summed gradient counts the visits of each row."""
    model = SoftmaxRegression(jnp.zeros((rows, 1)), jnp.zeros(1))

    def count(model, x, labels):
        return -(x @ model.w).sum()

    (epoch,) = fit(
        model,
        np.eye(rows, dtype=np.float32),
        np.zeros(rows, np.int32),
        optimizer=optax.sgd(1.0),
        key=key,
        epochs=1,
        batch_size=batch_size,
        objective=count,
    )
    return np.asarray(epoch.model.w[:, 0])


@pytest.mark.parametrize("batch_size", [1, 7, 10, 20, 23, 64])
def test_every_row_once_an_epoch(batch_size):
    assert (visits_of_one_epoch(20, batch_size, KEY) == 1).all()


def first_batches(epochs, seed):
    """The rows of each epoch's first batch, seen through an objective that tells."""
    rows = []

    def spy(model, x, labels):
        jax.debug.callback(lambda ids: rows.append(ids.tolist()), x[:, 0], ordered=True)
        return model.w.sum() * 0

    model, x, labels = problem(rows=50, features=1)
    x = np.arange(50, dtype=np.float32)[:, None]
    for _ in fit(
        model,
        x,
        labels,
        optimizer=optax.sgd(0.1),
        key=jax.random.key(seed),
        epochs=epochs,
        batch_size=50,
        objective=spy,
    ):
        jax.effects_barrier()
    return rows


def test_every_epoch_is_a_fresh_shuffle_and_the_seed_decides():
    orders = first_batches(3, seed=1)
    assert [sorted(order) for order in orders] == [list(range(50))] * 3
    assert len({tuple(order) for order in orders}) == 3
    assert first_batches(3, seed=1) == orders
    assert first_batches(1, seed=2) != orders[:1]


def test_batches_are_drawn_anew_and_not_only_reordered():
    """The book's loop fixes the batches once; here rows change company."""
    orders = first_batches(40, seed=0)
    together = np.mean([abs(o.index(0) - o.index(1)) < 10 for o in orders])
    assert 0.05 < together < 0.75


def test_same_key_same_bits():
    model, x, labels = problem()
    runs = [
        list(fit(model, x, labels, optimizer=MOMENTUM, key=KEY, epochs=3))
        for _ in range(2)
    ]
    for a, b in zip(*runs, strict=True):
        assert a.train_loss == b.train_loss
        assert (a.model.w == b.model.w).all()


@pytest.mark.parametrize("cut_every", [None, 1, 7, 10**6])
def test_blocks_cover_each_epoch_in_order(cut_every):
    rows, batch_size = 100_003, 64
    cut = list(Blocks(KEY, rows, batch_size, epochs=2, cut_every=cut_every))
    for epoch in (1, 2):
        mine = [block for block in cut if block.epoch == epoch]
        read = [block.rows[: block.steps * block.batch_size] for block in mine]
        order = epoch_order(KEY, epoch, rows)
        np.testing.assert_array_equal(np.concatenate(read), order)
        steps = np.cumsum([block.steps for block in mine])
        multiples = range(cut_every or rows, rows // batch_size, cut_every or rows)
        assert set(multiples) <= set(steps.tolist())
    assert len({len(block.rows) for block in cut}) == 2


def test_every_permutation_is_equally_likely():
    """6000 epochs of 4 rows: chi-squared over the 24 orders, 0.1 % from each tail."""
    orders = [tuple(epoch_order(KEY, epoch, 4)) for epoch in range(6000)]
    counts = np.unique(orders, axis=0, return_counts=True)[1]
    assert len(counts) == 24
    assert 7.5 < ((counts - 250) ** 2 / 250).sum() < 49.7


def test_watch_sees_the_steps_that_it_asked_for():
    model, x, labels = problem(rows=103)
    seen = []
    arguments = {"optimizer": optax.sgd(0.1), "key": KEY, "epochs": 2, "batch_size": 10}
    fit_again = fit(model, x, labels, **arguments, watch=seen.append, watch_every=4)
    assert len(list(fit_again)) == 2
    assert [(at.epoch, len(at.losses)) for at in seen] == [
        (epoch, steps) for epoch in (1, 2) for steps in (4, 8, 10)
    ]


def test_train_loss_weighs_the_short_last_batch_by_its_rows():
    model, x, labels = problem()
    (epoch,) = fit(
        model, x, labels, optimizer=optax.sgd(0.0), key=KEY, epochs=1, batch_size=50
    )
    exact = cross_entropy(model.logits(x), labels).mean()
    np.testing.assert_allclose(epoch.train_loss, exact, rtol=1e-6)


def test_validation_is_exact_over_all_rows():
    model, x, labels = problem(rows=2003)
    (epoch,) = fit(
        model,
        x,
        labels,
        optimizer=optax.sgd(0.0),
        key=KEY,
        epochs=1,
        validation=(x, labels),
    )
    z = np.asarray(x, np.float64) @ np.asarray(model.w, np.float64)
    nll = np.log(np.exp(z).sum(1)) - z[np.arange(2003), labels]
    assert epoch.validation_loss == pytest.approx(nll.mean(), rel=1e-6)
    assert epoch.validation_accuracy == pytest.approx((z.argmax(1) == labels).mean())


def test_images_stay_as_they_are_until_the_step():
    seen = []

    def transform(images):
        seen.append((images.dtype, images.shape))
        return images.reshape(len(images), -1).astype(jnp.float32) / 255

    images = np.random.default_rng(0).integers(0, 256, (10, 2, 2), np.uint8)
    model = SoftmaxRegression.init(KEY, 4, 2)
    list(
        fit(
            model,
            images,
            np.arange(10) % 2,
            optimizer=optax.sgd(0.1),
            key=KEY,
            epochs=2,
            batch_size=4,
            transform=transform,
        )
    )
    assert seen == [(jnp.uint8, (4, 2, 2)), (jnp.uint8, (2, 2, 2))]


def test_the_callers_model_and_earlier_epochs_stay_usable():
    model, x, labels = problem()
    epochs = list(fit(model, x, labels, optimizer=optax.sgd(0.1), key=KEY, epochs=3))
    assert np.isfinite(model.w).all()
    assert all(np.isfinite(epoch.model.w).all() for epoch in epochs)
    assert not (epochs[0].model.w == epochs[1].model.w).all()


def test_a_non_finite_loss_names_its_step_and_keeps_the_last_good_model():
    model, x, labels = problem(rows=100)
    x[labels == 0] = np.nan
    with pytest.raises(NonFiniteLoss, match="nan at step 1 of epoch 1") as caught:
        list(fit(model, x, labels, optimizer=optax.sgd(0.1), key=KEY, batch_size=10))
    assert (caught.value.model.w == model.w).all()
    copy = pickle.loads(pickle.dumps(caught.value))
    assert (str(copy), copy.step) == (str(caught.value), 1)


@pytest.mark.usefixtures("our_errors")
@pytest.mark.parametrize(
    ("model", "sentence"),
    [
        ({"w": np.ones((4, 3))}, r"model must have a method logits\(x\).*got dict"),
        (
            SoftmaxRegression(np.ones((4, 3), int), np.ones(3)),
            r"model\.w must be floating point, got int",
        ),
    ],
)
def test_models_that_cannot_be_trained(model, sentence):
    _, x, labels = problem()
    with pytest.raises(TypeError, match=sentence):
        fit(model, x, labels, optimizer=optax.sgd(0.1), key=KEY)
    with pytest.raises(TypeError, match=r"must have a method|must be floating"):
        evaluate(model, x, labels)


def test_divergence_keeps_a_model_whose_loss_was_finite():
    model, x, labels = problem()
    with pytest.raises(NonFiniteLoss) as caught:
        list(fit(model, x * 1e20, labels, optimizer=optax.sgd(1e19), key=KEY))
    kept = caught.value.model
    assert np.isfinite(cross_entropy(kept.logits(x * 1e20), labels)).all()


@dataclass
class Unhashable:
    def __call__(self, *of):
        return of


class NoPytree:
    def logits(self, x):
        return x


def test_models_that_are_no_pytree():
    _, x, labels = problem()
    for call in (
        lambda model: fit(model, x, labels, optimizer=MOMENTUM, key=KEY),
        lambda model: evaluate(model, x, labels),
    ):
        with pytest.raises(TypeError, match=r"must be a pytree, got NoPytree: reg"):
            call(NoPytree())
        with pytest.raises(TypeError, match=r"an instance, got the class SoftmaxRegr"):
            call(SoftmaxRegression)


def test_fit_is_not_to_be_traced():
    model, x, labels = problem()

    def train(x):
        return next(fit(model, x, labels, optimizer=MOMENTUM, key=KEY)).model

    with pytest.raises(TypeError, match="fit runs on the host"):
        jax.jit(train)(x)


def test_the_model_is_copied_at_the_call():
    model, x, labels = problem()
    w = model.w.copy()
    run = fit(model._replace(w=w), x, labels, optimizer=MOMENTUM, key=KEY)
    w.delete()
    assert np.isfinite(next(run).train_loss)


def test_validation_on_a_mesh_with_explicit_axes():
    model, x, labels = problem(rows=104)
    mesh = jax.make_mesh((4,), ("d",))
    on_all = jax.device_put(model, NamedSharding(mesh, P()))
    spread = jax.device_put((x, labels), NamedSharding(mesh, P("d")))
    want = evaluate(model, x, labels)
    for given in ((model, *spread), (on_all, x, labels), (on_all, *spread)):
        np.testing.assert_allclose(evaluate(*given), want, rtol=1e-6)
    arguments = {"optimizer": MOMENTUM, "key": KEY, "validation": (x, labels)}
    one, four = (next(fit(m, x, labels, **arguments)) for m in (model, on_all))
    assert four.validation_loss == pytest.approx(one.validation_loss, rel=1e-5)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"watch_every": 0}, "watch_every must be at least 1, got 0"),
        ({"epochs": -1}, "epochs must be at least 0, got -1"),
        ({"epochs": 1.5}, "epochs must be a Python integer.*got float"),
        ({"batch_size": 16.0}, "batch_size must be a Python integer.*got float"),
        ({"batch_size": True}, "batch_size must be a Python integer.*got bool"),
        ({"x": np.zeros((0, 4), np.float32)}, "x must have at least one row"),
        ({"labels": np.array(["a"] * 103)}, "labels must be an array of numbers"),
        ({"labels": np.zeros(5, int)}, r"labels must have shape \(103,\), got \(5,\)"),
        ({"x": np.array([["a"]] * 103)}, "x must be an array of numbers.*of <U1"),
        ({"x": np.ma.masked_array(np.zeros((103, 4)))}, "x must not be a masked array"),
        ({"validation": (np.zeros((2, 4)), np.zeros(3, int))}, "validation labels"),
        ({"validation": (np.zeros((2, 4)),)}, "validation must be a pair.*got 1"),
        ({"progress": ()}, "progress must be a Progress.*got tuple"),
        (
            {"progress": Progress.start({}, MOMENTUM)._replace(losses=np.zeros(2))},
            "progress has done 2 steps of an epoch that has 1: it belongs to another",
        ),
        ({"validation": 3}, "validation must be a pair, x and labels, got int"),
        (
            {"validation": (np.zeros((2, 3)), np.zeros(2, int))},
            "validation must fit the model and transform: x must have 4 features",
        ),
        ({"watch": 3}, "watch must be a function, got int"),
        ({"transform": Unhashable()}, "transform must be hashable.*got Unhashable"),
        ({"objective": Unhashable()}, "objective must be hashable.*got Unhashable"),
        ({"optimizer": "adam"}, "optimizer must be one of optax's.*'adam'"),
        (
            {"x": np.full((3, 4), 2**40)},
            r"x must fit int32.*1099511627776: convert with x.astype\(np.float32\)",
        ),
        ({"objective": None}, "objective must be a function, got NoneType"),
        ({"transform": "pixels"}, "transform must be a function, got str"),
        ({"key": 0}, "key must be a key.*got int"),
        (
            {"key": jax.random.split(KEY)},
            r"key must be one key, got keys of shape \(2,\)",
        ),
    ],
)
def test_bad_input_is_one_sentence(change, sentence, our_errors):
    model, x, labels = problem()
    arguments = {"x": x, "labels": labels, "optimizer": optax.sgd(0.1), "key": KEY}
    with pytest.raises((ValueError, TypeError), match=sentence):
        fit(model, **(arguments | change))


def test_evaluation_of_what_cannot_be_evaluated(our_errors):
    model, x, labels = problem()
    with pytest.raises(ValueError, match="x must have at least one row"):
        evaluate(model, x[:0], labels[:0])
    with pytest.raises(
        ValueError, match=r"labels must have shape \(103,\), got \(5,\)"
    ):
        evaluate(model, x, labels[:5])
    assert np.isnan(evaluate(model, np.where(x > 1, np.nan, x), labels)).all()


def test_accuracy_is_rounded_once(x64):
    """Times the rounded 1 / 60, it would be 1 ULP off."""
    labels = np.arange(60) % 2
    x = np.eye(2)[np.where(np.arange(60) < 56, labels, 1 - labels)]
    for dtype in (np.float32, np.float64):
        model = SoftmaxRegression(jnp.eye(2, dtype=dtype), jnp.zeros(2, dtype))
        accuracy = evaluate(model, x.astype(dtype), labels)[1]
        assert accuracy.dtype == dtype
        assert accuracy == dtype(56 / 60)


def test_an_objective_that_is_no_mean(our_errors):
    model, x, labels = problem()
    run = fit(
        model,
        x,
        labels,
        optimizer=MOMENTUM,
        key=KEY,
        objective=lambda model, x, labels: cross_entropy(model.logits(x), labels),
    )
    with pytest.raises(ValueError, match=r"what objective returns must be one number"):
        next(run)


def test_no_epochs_is_no_training():
    model, x, labels = problem()
    assert not list(fit(model, x, labels, optimizer=optax.sgd(0.1), key=KEY, epochs=0))


def test_arrays_that_are_changed_meanwhile_were_copied():
    model, x, labels = problem()
    arguments = {"optimizer": MOMENTUM, "key": KEY, "epochs": 2, "batch_size": 10}
    *_, undisturbed = fit(model, x, labels, **arguments, validation=(x, labels))
    disturbed = fit(model, x, labels, **arguments, validation=(x, labels))
    next(disturbed)
    x[:], labels[:] = 0, 0
    (last,) = disturbed
    assert (last.model.w == undisturbed.model.w).all()
    assert last.validation_loss == undisturbed.validation_loss


def test_a_label_that_32_bits_do_not_hold_is_no_class():
    model, x, labels = problem()
    labels = labels.astype(np.int64)
    labels[50] = 2**32
    with pytest.raises(NonFiniteLoss):
        list(fit(model, x, labels, optimizer=MOMENTUM, key=KEY, epochs=1))


@pytest.mark.parametrize("kinds", [(">f4", ">i8"), (">f8", ">u2")])
def test_arrays_of_another_byte_order(kinds):
    model, x, labels = problem()
    arguments = {"optimizer": MOMENTUM, "key": KEY, "epochs": 1, "batch_size": 10}
    (epoch,) = fit(model, x, labels, **arguments)
    swapped = x.astype(kinds[0]), labels.astype(kinds[1])
    (other,) = fit(model, *swapped, **arguments, validation=swapped)
    assert (other.model.w == epoch.model.w).all()
    assert other.validation_loss == float(evaluate(epoch.model, x, labels)[0])


def test_evaluation_of_another_byte_order():
    """Where arrays go into jax.jit as they are, the second call reads them wrongly."""
    model, x, labels = problem()
    native = evaluate(model, x, labels)
    for _ in range(3):
        assert evaluate(model, x.astype(">f4"), labels.astype(">i4")) == native


@pytest.mark.parametrize(
    "optimizer",
    [
        optax.lbfgs(),
        optax.chain(optax.sgd(0.3), optax.contrib.reduce_on_plateau(patience=2)),
        optax.contrib.schedule_free_sgd(0.3),
        optax.contrib.sam(optax.sgd(0.3), optax.sgd(0.01), sync_period=2),
    ],
    ids=["search along a line", "by the loss", "schedule free", "sharpness-aware"],
)
def test_optimizers_that_ask_for_more_than_a_gradient(optimizer):
    model, x, _ = problem()
    labels = x[:, :3].argmax(1)
    arguments = {"key": KEY, "epochs": 4, "batch_size": 50}
    with jax.numpy_dtype_promotion("standard"):  # which optax's own need
        *_, last = fit(model, x, labels, optimizer=optimizer, **arguments)
    *_, plain = fit(model, x, labels, optimizer=optax.sgd(0.3), **arguments)
    before = evaluate(model, x, labels)[0]
    gain = before - evaluate(last.model, x, labels)[0]
    assert gain > 0.5 * (before - evaluate(plain.model, x, labels)[0])


def test_a_float64_model_where_jax_has_no_float64():
    model, x, labels = problem()
    wide = SoftmaxRegression(*(np.asarray(leaf, np.float64) for leaf in model))
    arguments = {"optimizer": MOMENTUM, "key": KEY, "epochs": 1}
    (epoch,) = fit(wide, x, labels, **arguments)
    (same,) = fit(model, x, labels, **arguments)
    assert (epoch.model.w == same.model.w).all()


def test_losses_in_float64():
    model, x, labels = problem()
    with jax.enable_x64(True):
        wide = SoftmaxRegression(*(np.asarray(leaf, np.float64) for leaf in model))
        (epoch,) = fit(
            wide, x, labels, optimizer=optax.sgd(0.1), key=KEY, epochs=1, batch_size=103
        )
        exact, _ = evaluate(wide, x, labels)
    assert epoch.train_loss == pytest.approx(float(exact), rel=1e-14)
