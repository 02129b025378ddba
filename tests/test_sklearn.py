"""SoftmaxClassifier: scikit-learn's own checks, LogisticRegression's numbers."""

import pickle
import subprocess
import sys

import numpy as np
import pytest
from sklearn.datasets import load_digits, load_iris
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

from jax_softmax.sklearn import SoftmaxClassifier

X, Y = load_iris(return_X_y=True)
SPECIES = np.array(["setosa", "versicolor", "virginica"])[Y]


@pytest.mark.usefixtures("our_errors")
@parametrize_with_checks([SoftmaxClassifier()])
def test_what_scikit_learn_asks_of_an_estimator(estimator, check):
    check(estimator)


def peer(**options):
    """By newton-cg: its lbfgs gives up 2.5e-4 away from the optimum at C = 100."""
    exact = {"solver": "newton-cg", "tol": 1e-10, "max_iter": 10_000}
    return LogisticRegression(**(exact | options))


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"C": 0.01},
        {"C": 100.0},
        {"fit_intercept": False},
        {"class_weight": "balanced"},
        {"class_weight": {"versicolor": 5.0}},
        {"solver": "newton-cg"},
    ],
    ids=str,
)
def test_the_coefficients_are_scikit_learns(classes, options):
    rows = SPECIES != "virginica" if classes == 2 else slice(None)
    x, y = X[rows], SPECIES[rows]
    weights = np.random.default_rng(0).uniform(0.1, 3, len(y))
    ours = SoftmaxClassifier(**options).fit(x, y, sample_weight=weights)
    theirs = peer(**options).fit(x, y, sample_weight=weights)
    assert ours.coef_.shape == theirs.coef_.shape
    assert ours.certificate_.converged
    np.testing.assert_allclose(ours.coef_, theirs.coef_, atol=1e-4)
    np.testing.assert_allclose(ours.intercept_, theirs.intercept_, atol=1e-4)
    np.testing.assert_allclose(
        ours.predict_proba(x), theirs.predict_proba(x), atol=1e-5
    )
    np.testing.assert_allclose(
        ours.decision_function(x), theirs.decision_function(x), atol=1e-3
    )
    assert (ours.predict(x) == theirs.predict(x)).all()


def test_in_a_pipeline_and_a_grid_search():
    pipeline = make_pipeline(StandardScaler(), SoftmaxClassifier())
    search = GridSearchCV(pipeline, {"softmaxclassifier__C": [0.01, 1.0]}, cv=3)
    search.fit(X, SPECIES)
    assert search.best_params_ == {"softmaxclassifier__C": 1.0}
    assert search.score(X, SPECIES) > 0.95
    assert set(search.predict(X)) == set(SPECIES)


def test_a_warm_start_has_little_left_to_do():
    for rows in (slice(None, 100), slice(None)):  # two classes, and three
        model = SoftmaxClassifier(warm_start=True).fit(X[rows], SPECIES[rows])
        first = model.coef_
        assert model.fit(X[rows], SPECIES[rows]).n_iter_[0] <= 2
        np.testing.assert_allclose(model.coef_, first, atol=1e-8)


@pytest.mark.parametrize("solver", ["lbfgs", "newton-cg"])
def test_a_warm_start_from_hardly_any_penalty(solver):
    x = np.random.default_rng(2).normal(size=(100, 5))
    y = x[:, :3].argmax(1)
    model = SoftmaxClassifier(C=1e8, warm_start=True, solver=solver).fit(x, y)
    model.set_params(C=1.0).fit(x, y)
    np.testing.assert_allclose(model.coef_, SoftmaxClassifier().fit(x, y).coef_, 1e-5)


def test_without_an_intercept_a_warm_start_has_none():
    model = SoftmaxClassifier(warm_start=True).fit(X, SPECIES)
    assert model.intercept_.any()
    model.set_params(fit_intercept=False).fit(X, SPECIES)
    assert not model.intercept_.any()
    want = SoftmaxClassifier(fit_intercept=False).fit(X, SPECIES)
    np.testing.assert_allclose(model.coef_, want.coef_, atol=1e-5)


def test_log_probabilities_where_probabilities_end():
    model = SoftmaxClassifier(C=1e3).fit([[0.0], [1.0]], ["no", "yes"])
    far = [[-1e4], [1e4]]
    log_probs = model.predict_log_proba(far)
    assert np.isfinite(log_probs).all()
    assert log_probs[0, 1] < -1e4
    np.testing.assert_array_equal(model.predict_proba(far), [[1, 0], [0, 1]])


def test_too_few_steps_are_said():
    with pytest.warns(ConvergenceWarning, match="max_iterations were not enough"):
        SoftmaxClassifier(max_iter=2).fit(X, SPECIES)
    with pytest.warns(ConvergenceWarning):  # 0.4 % above the minimum
        model = SoftmaxClassifier(max_iter=8).fit(X, SPECIES)
    assert model.certificate_.gap < 0.01 * model.certificate_.objective


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"C": 0.0}, "C must be a finite number above 0"),
        ({"C": np.inf}, "C must be a finite number above 0, got inf"),
        ({"solver": "sag"}, "solver must be"),
        ({"tol": -1.0}, "tol must be finite and not negative"),
        ({"tol": None}, "tol must be finite and not negative, got None"),
        ({"fit_intercept": 0}, "fit_intercept must be True or False, got int"),
        ({"warm_start": "abc"}, "warm_start must be True or False, got str"),
        ({"max_iter": 2.5}, "^max_iter must be a Python integer, got float"),
        ({"max_iter": -1}, "max_iter must be at least 0, got -1"),
        ({"class_weight": {"setosa": np.nan}}, "class_weight must be finite"),
    ],
)
def test_bad_parameters_are_one_sentence(options, sentence, our_errors):
    with pytest.raises((ValueError, TypeError), match=sentence):
        SoftmaxClassifier(**options).fit(X, SPECIES)


def test_no_row_that_counts_is_said_in_the_words_of_the_estimator():
    with pytest.raises(ValueError, match=r"^sample_weight times class_weight is"):
        SoftmaxClassifier().fit(X, SPECIES, sample_weight=np.zeros(len(X)))


@pytest.mark.parametrize("weight", [np.nan, np.inf, -1.0])
def test_bad_weights_are_named(weight):
    weights = np.where(np.arange(len(X)) == 3, weight, 1.0)
    with pytest.raises(ValueError, match="sample_weight and class_weight must be fin"):
        SoftmaxClassifier().fit(X, SPECIES, sample_weight=weights)


def test_it_can_be_pickled():
    model = SoftmaxClassifier().fit(X, SPECIES)
    again = pickle.loads(pickle.dumps(model))
    assert (again.predict(X) == model.predict(X)).all()
    assert again.certificate_ == model.certificate_


def test_digits_without_scaling():
    x, y = load_digits(return_X_y=True)
    model = SoftmaxClassifier(C=1e-3).fit(x, y)
    assert model.certificate_.distance < 1e-3
    assert model.score(x, y) > 0.95


def test_scikit_learn_stays_out_of_the_library():
    code = "import sys, jax_softmax; sys.exit('sklearn' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_warm_start_with_other_features_is_a_fresh_one():
    x = np.random.default_rng(0).normal(size=(60, 4))
    y = np.arange(60) % 3
    model = SoftmaxClassifier(warm_start=True)
    for features in (4, 2, 1, 4):
        model.fit(x[:, :features], y)
        want = SoftmaxClassifier().fit(x[:, :features], y)
        np.testing.assert_allclose(model.coef_, want.coef_, atol=1e-6)
