"""solve: the optimum, bounds that hold, and an honest end when there is none."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from jax_softmax import (
    SoftmaxRegression,
    _full_batch,
    closed_form,
    cross_entropy,
    solve,
)

pytestmark = pytest.mark.usefixtures("strict_types")

L2 = 1e-3
SOLVERS = ["lbfgs", "newton-cg"]


@pytest.fixture(scope="module")
def data():
    random = np.random.default_rng(0)
    labels = random.integers(0, 4, 300)
    x = random.normal(size=(300, 6)) + random.normal(size=(4, 6))[labels]
    return x.astype(np.float32), labels


@pytest.fixture(scope="module")
def best(data):
    """scikit-learn's optimum in float64, C being 1 / (l2 * rows)."""
    x, labels = data
    C = 1 / (L2 * len(x))
    fitted = LogisticRegression(C=C, tol=1e-12, max_iter=10_000)
    fitted.fit(x.astype(np.float64), labels)
    return fitted.coef_.T


def start(features=6, classes=4):
    return SoftmaxRegression(jnp.zeros((features, classes)), jnp.zeros(classes))


@pytest.mark.parametrize("solver", SOLVERS)
def test_finds_scikit_learns_optimum(data, best, solver):
    model, certificate = solve(start(), *data, solver=solver, l2=L2)
    assert certificate.converged, certificate.reason
    assert certificate.gradient_norm <= 1e-5
    np.testing.assert_allclose(model.w, best, atol=5e-3)


@pytest.mark.parametrize("solver", SOLVERS)
def test_the_last_tile_overlaps_the_one_before(
    data, best, solver, monkeypatch, fresh_traces
):
    monkeypatch.setattr(_full_batch, "TILE_ELEMENTS", 1)  # five tiles of 64 rows
    model, certificate = solve(start(), *data, solver=solver, l2=L2)
    assert certificate.converged, certificate.reason
    np.testing.assert_allclose(model.w, best, atol=5e-3)


def test_the_certificate_counts_what_rounding_hides():
    random, l2 = np.random.default_rng(0), 1e-4
    for _ in range(4):
        x = (100 + random.normal(size=(300, 6))).astype(np.float32)
        labels = random.integers(0, 3, 300)
        model, certificate = solve(start(6, 3), x, labels, l2=l2, tolerance=1e-6)
        with jax.enable_x64(True):
            w, b, x = (jnp.asarray(array, jnp.float64) for array in (*model, x))
            y = jnp.asarray(labels)
            gradient = closed_form.regression_gradient(w, b, x, y, l2=l2)
            assert np.linalg.norm(gradient[0]) <= l2 * certificate.distance


def test_rows_of_weight_0_do_not_hide_that_classes_are_separable():
    x, labels = np.float32([[-2], [-1], [1], [2], [3]]), np.array([0, 0, 1, 1, 0])
    weights = np.array([1, 1, 1, 1, 0])
    _, certificate = solve(start(1, 2), x, labels, sample_weights=weights)
    assert certificate.reason.startswith("the classes are separable")


@pytest.mark.parametrize("tolerance", [1e-1, 1e-2, 1e-3, 1e-4])
def test_the_certificate_bounds_the_distance_and_the_gap(data, best, tolerance):
    x, labels = data
    model, certificate = solve(start(), x, labels, l2=L2, tolerance=tolerance)
    assert np.linalg.norm(np.asarray(model.w) - best) <= certificate.distance
    _, optimum = solve(start(), x, labels, l2=L2, tolerance=1e-6)
    assert certificate.objective - optimum.objective <= certificate.gap + 1e-6


@pytest.mark.parametrize(("solver", "passes"), [("lbfgs", 40), ("newton-cg", 70)])
def test_what_all_classes_share_takes_no_time(solver, passes, x64):
    """Only a tiny l2 sees it: 130 and 150 passes where it has to be searched for."""
    random = np.random.default_rng(0)
    x, w = random.normal(size=(500, 20)), random.normal(size=(20, 5))
    labels = (x @ w + random.gumbel(size=(500, 5))).argmax(1)
    for shared in (np.zeros((20, 1)), random.normal(size=(20, 1))):
        first = SoftmaxRegression(jnp.asarray(shared + np.zeros((20, 5))), jnp.zeros(5))
        model, certificate = solve(
            first, x, labels, solver=solver, l2=1e-6, tolerance=1e-10
        )
        assert certificate.converged, certificate.reason
        assert certificate.passes <= passes
        np.testing.assert_allclose(model.w.sum(1), 0, atol=1e-9)


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_warm_start_at_the_optimum_has_nothing_to_do(data, solver):
    there = solve(start(), *data, solver=solver, l2=L2).model
    again = solve(there, *data, solver=solver, l2=L2)
    assert again.certificate.iterations <= 1


def test_without_an_intercept_the_biases_stay(data):
    first = SoftmaxRegression(jnp.zeros((6, 4)), jnp.array([1.0, 2, 3, 4]))
    model, _ = solve(first, *data, l2=L2, intercept=False)
    np.testing.assert_array_equal(model.b, first.b)


def test_sample_weights_are_repeated_rows(data):
    x, labels = data
    twice = np.where(np.arange(len(x)) < 100, 2, 1)
    weighted = solve(start(), x, labels, l2=L2, sample_weights=twice.astype(np.float32))
    repeated = solve(start(), np.repeat(x, twice, 0), np.repeat(labels, twice), l2=L2)
    np.testing.assert_allclose(weighted.model.w, repeated.model.w, atol=5e-3)


def test_class_weights_are_sample_weights(data):
    x, labels = data
    weights = np.array([1.0, 2.0, 0.5, 3.0])
    by_class = solve(start(), x, labels, l2=L2, class_weights=weights)
    by_row = solve(start(), x, labels, l2=L2, sample_weights=weights[labels])
    np.testing.assert_array_equal(by_class.model.w, by_row.model.w)


@pytest.mark.parametrize("solver", SOLVERS)
def test_separable_classes_under_a_tiny_penalty_converge(x64, solver):
    x = np.array([[-2.0], [-1.0], [1.0], [2.0]])
    labels, l2 = np.array([0, 0, 1, 1]), 1e-9
    zeros = SoftmaxRegression(jnp.zeros((1, 2)), jnp.zeros(2))
    model, certificate = solve(zeros, x, labels, solver=solver, l2=l2, tolerance=1e-11)
    assert certificate.converged, certificate.reason
    margin = float(model.w[0, 1] - model.w[0, 0])
    # Where the slope of the loss is that of the penalty; by symmetry b is 0.
    slope = np.mean([np.abs(x[:, 0]) / (1 + np.exp(margin * np.abs(x[:, 0])))])
    assert slope == pytest.approx(l2 * margin / 2, rel=0.1)
    assert certificate.distance <= 0.1


@pytest.mark.parametrize("solver", SOLVERS)
def test_features_of_very_different_sizes_converge(x64, data, solver):
    x, labels = data
    x = x.astype(np.float64) * np.geomspace(1e-3, 1e3, x.shape[1])
    zeros = SoftmaxRegression(jnp.zeros((6, 4)), jnp.zeros(4))
    _, certificate = solve(zeros, x, labels, solver=solver, l2=1e-8, tolerance=1e-8)
    assert certificate.converged, certificate
    assert certificate.iterations < 100


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("size", [100, 1e4])
def test_from_weights_under_which_all_rows_are_certain(x64, data, solver, size):
    """Where nothing but l2 bends, and a bias not at all."""
    x, labels = data
    w = jnp.asarray(size * np.random.default_rng(1).normal(size=(6, 4)))
    far = SoftmaxRegression(w, jnp.zeros(4))
    x = x.astype(np.float64)
    certificate = solve(far, x, labels, solver=solver, l2=0.1).certificate
    assert certificate.converged, certificate
    assert certificate.iterations < 100


@pytest.mark.parametrize("solver", SOLVERS)
def test_separable_classes_without_a_penalty_say_so(solver):
    x, labels = np.array([[-2.0], [-1.0], [1.0], [2.0]], np.float32), [0, 0, 1, 1]
    model, certificate = solve(
        start(1, 2),
        x,
        np.array(labels),
        solver=solver,
        tolerance=1e-12,
        max_iterations=50,
    )
    assert not certificate.converged
    assert certificate.distance == np.inf
    assert (np.asarray(cross_entropy(model.logits(x), jnp.array(labels))) < 0.1).all()


def test_a_class_without_rows_has_no_best_bias(data):
    x, labels = data
    for l2 in (0.0, L2):
        certificate = solve(start(6, 5), x, labels, l2=l2).certificate
        assert certificate.converged == (l2 > 0)
        assert certificate.reason.startswith("a class has no rows") == (l2 == 0)


def test_bad_input_names_the_argument(data, our_errors):
    x, labels = data
    with pytest.raises(ValueError, match="labels"):
        solve(start(), x, labels[:5])
    with pytest.raises(ValueError, match="solver"):
        solve(start(), x, labels, solver="adam")
    weights = np.ma.masked_array(np.ones(len(x)))
    for change, sentence in (
        ({"l2": None}, "l2 must be a Python number.*got NoneType"),
        ({"l2": -1.0}, "l2 must not be negative, got -1.0"),
        ({"tolerance": np.inf}, "tolerance must be finite"),
        ({"max_iterations": 2.5}, "max_iterations must be a Python integer.*float"),
        ({"max_iterations": -1}, "max_iterations must be at least 0, got -1"),
        ({"transform": None}, "transform must be a function, got NoneType"),
        ({"intercept": "no"}, "intercept must be True or False, got str"),
        ({"sample_weights": weights}, "sample_weights must not be a masked array"),
    ):
        with pytest.raises((ValueError, TypeError), match=sentence):
            solve(start(), x, labels, **change)
    with pytest.raises(TypeError, match="x must be real numbers, got complex64"):
        solve(start(), x + 1j, labels)


def test_a_gradient_that_is_not_within_the_tolerance_is_not_said_to_be():
    """Computed afresh, at centred parameters, it may not be what the search saw."""
    random = np.random.default_rng(0)
    x = (1e3 * random.normal(size=(200, 4))).astype(np.float32)
    labels = random.integers(0, 2, 200)  # of three classes
    for solver in SOLVERS:
        for tolerance in (1e-3, 1e-4, 1e-5, 1e-6, 1e-7):
            _, certificate = solve(
                start(4, 3), x, labels, solver=solver, l2=0.1, tolerance=tolerance
            )
            within = certificate.gradient_norm <= tolerance
            assert within == certificate.converged
            assert within == ("within the tolerance" in certificate.reason)


@pytest.mark.parametrize("dtype", ["uint8", "uint32", "uint64", "int64"])
def test_labels_of_any_integer_type(data, dtype):
    x, labels = data
    of_type, plain = (
        solve(start(), x, y, l2=L2) for y in (labels.astype(dtype), labels)
    )
    assert of_type.certificate.converged
    np.testing.assert_array_equal(of_type.model.w, plain.model.w)


def test_what_converged_says_and_why_agree(data):
    norm = solve(start(), *data, max_iterations=0).certificate.gradient_norm
    near = solve(start(), *data, max_iterations=0, tolerance=1.5 * norm).certificate
    assert near.converged
    assert near.reason == "the gradient is within the tolerance"
    far = solve(start(), *data, max_iterations=0, tolerance=0.5 * norm).certificate
    assert not far.converged
    assert far.reason == "max_iterations were not enough"


@pytest.mark.usefixtures("our_errors")
@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"model": (1, 2)}, "model must be a SoftmaxRegression, got tuple"),
        (
            {"x": np.ones((300, 2, 3))},
            r"x must become \[rows, features\].*\(300, 2, 3\)",
        ),
        ({"x": np.ones((300, 5))}, r"as w has.*\(300, 5\).*\(6, 4\)"),
        ({"model": start(0), "x": np.ones((300, 0))}, "at least one; got"),
        ({"class_weights": {0: 1.0}}, "class_weights must be an array of 4 numbers"),
        (
            {"model": SoftmaxRegression(jnp.zeros((6, 4)), jnp.zeros(3))},
            r"b must have shape \(4,\), got \(3,\)",
        ),
        (
            {"sample_weights": np.zeros(300)},
            "sample_weights times class_weights are zero",
        ),
    ],
)
def test_what_does_not_fit_is_one_sentence(data, change, sentence):
    x, labels = data
    arguments = {"model": start(), "x": x, "labels": labels} | change
    with pytest.raises((TypeError, ValueError), match=sentence):
        solve(**arguments)
