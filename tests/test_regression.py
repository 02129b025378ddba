"""The model: shapes, objective, and its gradient against paper."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_softmax import SoftmaxRegression, closed_form, compare_gradients
from jax_softmax._regression import MANY_CLASSES

KEY = jax.random.key(0)

pytestmark = pytest.mark.usefixtures("strict_types")


def batch_of(classes):
    random = np.random.default_rng(0)
    model = SoftmaxRegression(
        jnp.array(random.normal(size=(7, classes)), jnp.float32),
        jnp.array(random.normal(size=classes), jnp.float32),
    )
    x = jnp.array(random.normal(size=(11, 7)), jnp.float32)
    return model, x, jnp.array(random.integers(0, classes, 11))


@pytest.fixture
def batch():
    return batch_of(5)


def test_init_draws_the_books_weights():
    model = SoftmaxRegression.init(jax.random.key(0), features=784, classes=10)
    assert model.w.shape == (784, 10)
    assert float(model.w.std()) == pytest.approx(0.01, rel=0.03)
    assert abs(float(model.w.mean())) < 5e-4
    assert not model.b.any()


def test_objective_is_mean_cross_entropy_plus_penalty(batch):
    model, x, labels = batch
    z = np.asarray(x, np.float64) @ np.asarray(model.w, np.float64) + model.b
    nll = np.log(np.exp(z).sum(1)) - z[np.arange(11), labels]
    penalty = 0.3 / 2 * np.sum(np.asarray(model.w, np.float64) ** 2)
    got = model.objective(x, labels, l2=0.3)
    np.testing.assert_allclose(got, nll.mean() + penalty, rtol=2e-6)


@pytest.mark.parametrize("l2", [0.0, 0.3])
@pytest.mark.parametrize("classes", [5, MANY_CLASSES - 1, MANY_CLASSES])
def test_gradient_is_the_one_on_paper(classes, l2):
    compare_gradients(
        lambda model, x, labels: SoftmaxRegression.objective(model, x, labels, l2=l2),
        lambda model, x, labels: SoftmaxRegression(
            *closed_form.regression_gradient(*model, x, labels, l2=l2)
        ),
        *batch_of(classes),
        floor=1.0,
    ).raise_if(ulp=8)


@pytest.mark.parametrize("classes", [MANY_CLASSES - 1, MANY_CLASSES])
def test_logits_of_any_batch_axes(classes):
    model, x, _ = batch_of(classes)
    many = np.asarray(x, np.float64) @ np.asarray(model.w, np.float64) + model.b
    np.testing.assert_allclose(model.logits(x), many, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(model.logits(x[0]), many[0], rtol=1e-5, atol=1e-5)
    boxed = model.logits(x[:10].reshape(2, 5, 7))
    np.testing.assert_allclose(boxed, many[:10].reshape(2, 5, -1), rtol=1e-5, atol=1e-5)


def test_masked_rows_do_not_count(batch):
    model, x, labels = batch
    where = jnp.arange(11) < 6
    poisoned = x.at[6:].set(jnp.nan)
    value, gradient = jax.value_and_grad(SoftmaxRegression.objective)(
        model, x[:6], labels[:6]
    )
    masked, masked_gradient = jax.value_and_grad(
        lambda model: model.objective(poisoned, labels, where=where)
    )(model)
    np.testing.assert_allclose(masked, value, rtol=1e-6)
    for a, b in zip(masked_gradient, gradient, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)


def test_predict_takes_the_largest_logit_and_the_first_of_equals():
    model = SoftmaxRegression(jnp.eye(3), jnp.zeros(3))
    x = jnp.array([[0.0, 2.0, 1.0], [1.0, 1.0, 0.0]])
    assert model.predict(x).tolist() == [1, 0]
    assert model.predict(x[0]).shape == ()


@pytest.mark.usefixtures("our_errors")
@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (
            lambda model, x: model.logits(x[:, :6]),
            r"x must have 7 features, got shape \(11, 6\)",
        ),
        (
            lambda model, x: model._replace(b=jnp.zeros(1)).logits(x),
            r"b must have shape \(5,\), got \(1,\)",
        ),
        (lambda model, x: model.init(0, 7, 5), "key must be a key.*got int"),
        (
            lambda model, x: model.init(KEY, -1, 5),
            "features must be at least 1, got -1",
        ),
        (lambda model, x: model.init(KEY, 7, 5.0), "classes must be a Python integer"),
        (lambda model, x: model.init(KEY, 7, 5, dtype=int), "dtype must be floating"),
        (
            lambda model, x: jax.tree.map(lambda a: a[None, None], model).predict(x),
            r"w must be \[features, classes\], got shape \(1, 1, 7, 5\): .*take one",
        ),
        (
            lambda model, x: model.init(jnp.uint32(5), 7, 5),
            r"key must be a key.*raw numbers of shape \(\)",
        ),
        (
            lambda model, x: model.init(np.array([1, 2, 3], np.uint32), 7, 5),
            r"key must be a key.*raw numbers of shape \(3,\)",
        ),
    ],
)
def test_bad_input_is_one_sentence(batch, call, sentence):
    model, x, _ = batch
    with pytest.raises((ValueError, TypeError), match=sentence):
        call(model, x)


def test_a_scale_of_another_type_does_not_decide_the_type_of_w():
    for scale in (np.float64(0.5), jnp.float32(0.5)):
        model = SoftmaxRegression.init(KEY, 7, 5, scale=scale, dtype=jnp.bfloat16)
        assert model.w.dtype == model.b.dtype == jnp.bfloat16


def test_the_penalty_of_16_bit_weights_does_not_overflow():
    model = SoftmaxRegression(jnp.full((3, 4), 300, jnp.float16), jnp.zeros(4))
    objective = model.objective(jnp.zeros((1, 3)), jnp.zeros(1, int), l2=1e-6)
    assert objective == pytest.approx(np.log(4) + 1e-6 / 2 * 12 * 300**2, rel=1e-6)


def test_lists_of_numbers_are_what_numpy_makes_of_them(our_errors):
    model = SoftmaxRegression.init(KEY, 2, 3)
    x = [[1, 2.5], [True, 0]]
    np.testing.assert_array_equal(model.logits(x), model.logits(np.float32(x)))
    with pytest.raises(TypeError, match="x must be an array of numbers, got list"):
        model.logits([[1.0, 2.0], [3.0]])
    with pytest.raises(ValueError, match="x must fit int32"):
        model.logits([[1, 2**40]])
