"""sweep: every model as fit alone would train it, whatever becomes of the others."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments import data
from experiments import sweep as experiment
from experiments.command import Failed
from jax_softmax import SoftmaxRegression, fit, sweep

ROWS, FEATURES, CLASSES, SEEDS = 43, 5, 3, 2
RANDOM = np.random.default_rng(0)
X = RANDOM.normal(size=(ROWS, FEATURES)).astype(np.float32)
LABELS = RANDOM.integers(0, CLASSES, ROWS)
KEYS = jax.random.split(jax.random.key(1), SEEDS)


def models(keys=KEYS):
    return jax.vmap(lambda key: SoftmaxRegression.init(key, FEATURES, CLASSES))(keys)


def swept(optimizer, settings, **options):
    options = {"epochs": 3, "batch_size": 20, "validation": (X, LABELS)} | options
    epochs = sweep(
        models(),
        X,
        LABELS,
        optimizer=optimizer,
        settings=settings,
        keys=KEYS,
        **options,
    )
    return list(epochs)


def of(tree, *index):
    return jax.tree.map(lambda leaf: leaf[index], tree)


def clipped_momentum(setting):
    clip = optax.clip_by_global_norm(setting["clip"])
    return optax.chain(clip, optax.sgd(setting["rate"], momentum=0.9))


def less_on_a_plateau(rate):
    return optax.chain(optax.sgd(rate), optax.contrib.reduce_on_plateau(patience=1))


@pytest.mark.parametrize(
    ("optimizer", "settings"),
    [
        (optax.sgd, np.array([0.01, 0.5])),
        (lambda s: optax.adam(s[0], b1=s[1]), (np.array([0.01, 0.1]), np.ones(2) / 2)),
        (clipped_momentum, {"rate": np.ones(2) / 9, "clip": np.array([0.1, 0.5])}),
        (less_on_a_plateau, np.array([0.01, 0.5])),
    ],
    ids=["sgd", "adam", "clipped momentum", "by the loss"],
)
def test_each_model_is_the_one_that_fit_trains(optimizer, settings):
    epochs = swept(optimizer, settings)
    assert [epoch.number for epoch in epochs] == [1, 2, 3]
    for place in ((0, 1), (1, 0)):
        seed, setting = place
        alone = fit(
            of(models(), seed),
            X,
            LABELS,
            optimizer=optimizer(jax.tree.map(float, of(settings, setting))),
            key=KEYS[seed],
            epochs=3,
            batch_size=20,
            validation=(X, LABELS),
        )
        for one, many in zip(alone, epochs, strict=True):
            got = of(many.model, *place)
            np.testing.assert_allclose(got.w, one.model.w, rtol=1e-4, atol=1e-6)
            np.testing.assert_allclose(got.b, one.model.b, rtol=1e-4, atol=1e-6)
            for name in ("train_loss", "validation_loss", "validation_accuracy"):
                expected = pytest.approx(getattr(one, name), rel=1e-5)
                assert getattr(many, name)[place] == expected


def test_a_diverging_model_does_not_disturb_the_others():
    healthy = np.array([0.01, 0.1])
    alone = swept(optax.sgd, healthy)[-1]
    together = swept(optax.sgd, np.array([0.01, 1e38, 0.1]))[-1]
    assert not np.isfinite(together.train_loss[:, 1]).any()
    others = np.array([0, 2])
    np.testing.assert_allclose(
        together.model.w[:, others], alone.model.w, rtol=1e-6, atol=1e-7
    )
    np.testing.assert_allclose(
        together.train_loss[:, others], alone.train_loss, rtol=1e-6
    )


def test_a_sweep_is_traced_once():
    traces = []

    def transform(x):
        traces.append(x.shape)
        return x

    swept(optax.sgd, np.array([0.1]), transform=transform, validation=None)
    assert traces == [(20, FEATURES), (3, FEATURES)]  # the short last batch is another


def test_another_byte_order():
    native = swept(optax.sgd, np.array([0.1]))[-1]
    swapped = X.astype(">f4"), LABELS.astype(">i4")
    for _ in range(2):
        *_, last = sweep(
            models(),
            *swapped,
            optimizer=optax.sgd,
            settings=np.array([0.1]),
            keys=KEYS,
            epochs=3,
            batch_size=20,
            validation=swapped,
        )
        assert (last.model.w == native.model.w).all()
        assert (last.validation_loss == native.validation_loss).all()


def test_images_stay_as_they_are():
    images = RANDOM.integers(0, 256, (50, 2, 2), np.uint8)
    epoch = list(
        sweep(
            jax.vmap(lambda key: SoftmaxRegression.init(key, 4, 2))(KEYS),
            images,
            np.arange(50) % 2,
            optimizer=optax.sgd,
            settings=jnp.array([0.1]),
            keys=KEYS,
            epochs=1,
            transform=lambda i: i.reshape(len(i), -1) / jnp.float32(255),
        )
    )[-1]
    assert epoch.model.w.shape == (SEEDS, 1, 4, 2)
    assert epoch.validation_loss is None
    assert np.isfinite(epoch.train_loss).all()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"x": X[:0]}, "x must have at least one row"),
        ({"labels": LABELS[:5]}, "labels must have shape"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"epochs": -1}, "epochs must be at least 0, got -1"),
        ({"epochs": 2.0}, "epochs must be a Python integer.*got float"),
        ({"validation": (X,)}, "validation must be a pair.*got 1"),
        ({"keys": KEYS[:1]}, "keys and models must share one leading axis"),
        ({"settings": 0.1}, "settings must be arrays with a leading axis"),
        ({"settings": [0.1, 0.5]}, "settings must be arrays with a leading axis"),
        ({"settings": {}}, "settings must be arrays with a leading axis.*got {}"),
        ({"x": np.ma.masked_array(X)}, "x must not be a masked array"),
        ({"keys": np.arange(2)}, "each of keys must be a key, as jax.random.key"),
        ({"keys": jax.random.PRNGKey(1)}, "each of keys must be a key.*raw numbers"),
        ({"validation": (X[:, :1], LABELS)}, "validation must fit the model and tran"),
        ({"objective": "ce"}, "objective must be a function, got str"),
        ({"transform": None}, "transform must be a function, got NoneType"),
        ({"optimizer": optax.sgd(0.1)}, "optimizer must make one of optax's from a"),
        (
            {"settings": (np.ones(2), np.ones(3))},
            "settings must share one leading axis",
        ),
    ],
)
def test_bad_input_is_one_sentence(change, sentence, our_errors):
    arguments = {
        "models": models(),
        "x": X,
        "labels": LABELS,
        "optimizer": optax.sgd,
        "settings": np.array([0.1]),
        "keys": KEYS,
    }
    with pytest.raises((ValueError, TypeError), match=sentence):
        sweep(**(arguments | change))


def test_a_rate_at_which_fit_diverges_ends_the_experiment_in_a_sentence(
    tmp_path, monkeypatch
):
    def group(dataset, rates, keys, batch_size, epochs):
        lost = np.full((1, 1), np.nan)
        models = jax.tree.map(lambda leaf: leaf[None], experiment.starts(keys, dataset))
        return experiment.Group(batch_size, lost, lost, lost, 1.0), models

    monkeypatch.setattr(experiment, "group", group)
    monkeypatch.setattr(experiment, "largest_curvature", lambda *_: (np.nan, np.nan))
    monkeypatch.setattr(experiment, "sweep", lambda *_, **__: ())
    sizes = dict.fromkeys(("rates", "seeds", "epochs", "rounds"), 1)
    sizes |= {"lowest": 1e38, "highest": 1e38, "batch_sizes": (256,)}
    with pytest.raises(Failed, match=r"^Stopped: the loss became inf .* was 1e\+38; "):
        experiment.run(experiment.Settings(dataset="digits", out=tmp_path, **sizes))
    assert list(tmp_path.iterdir()) == []


def test_a_rate_at_which_fit_diverges_does_not_stop_the_timing_of_the_others():
    dataset = data.load("digits", None)
    found = experiment.throughput(dataset, np.array([0.1, 1e38]), KEYS, rounds=1)
    assert found["models"] == 4
    assert found["speedup"] > 0


def test_a_model_without_logits_and_an_objective_of_its_own():
    def squares(model, x, labels):
        return jnp.square(x @ model["w"]).mean()

    start = {"w": jnp.ones((SEEDS, FEATURES))}
    options = {"optimizer": optax.sgd, "settings": jnp.array([0.1]), "keys": KEYS}
    (epoch,) = sweep(start, X, LABELS, epochs=1, objective=squares, **options)
    assert np.abs(epoch.model["w"]).max() < 1
    with pytest.raises(TypeError, match=r"model must have a method logits\(x\)"):
        next(sweep(start, X, LABELS, **options))


def test_the_rows_may_change_afterwards():
    x, labels = X.copy(), LABELS.copy()
    options = {"optimizer": optax.sgd, "settings": jnp.array([0.1]), "keys": KEYS}
    run = sweep(models(), x, labels, epochs=2, **options)
    next(run)
    x[:], labels[:] = 0, 0
    (want,) = [*sweep(models(), X, LABELS, epochs=2, **options)][1:]
    np.testing.assert_array_equal(next(run).train_loss, want.train_loss)


def test_what_an_optimizer_is_made_of_a_setting(our_errors):
    swept = sweep(
        models(),
        X,
        LABELS,
        optimizer=lambda setting: setting,
        settings=np.array([0.1]),
        keys=KEYS,
    )
    with pytest.raises(TypeError, match="what optimizer makes of a setting must be"):
        next(swept)
