"""Softmax regression as a scikit-learn estimator: the extra jax-softmax[sklearn]."""

import math
import warnings
from collections.abc import Callable
from numbers import Real
from typing import Any, Literal, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from numpy.typing import ArrayLike
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils import compute_class_weight
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data

from jax_softmax import _options as options
from jax_softmax._descent import Solver
from jax_softmax._reductions import log_softmax, softmax
from jax_softmax._regression import SoftmaxRegression
from jax_softmax._solve import solve

ENOUGH = 1e-9  # a gap of this share of the objective is no reason for a warning
FEATURES, ROWS = 32, 256  # the smallest sizes to pad to


class SoftmaxClassifier(ClassifierMixin, BaseEstimator):
    """L2-regularised softmax regression in float64, with scikit-learn's conventions.

        minimise  C * sum_i s_i nll_i + ||w||^2 / 2,   s_i = sample * class weight

    That is the objective of sklearn.linear_model.LogisticRegression, and C, coef_ and
    intercept_ mean the same: of two classes, they are for the second one's logit.

    Parameters:
        C: how much the data counts against the penalty on w; the biases are free.
        fit_intercept: whether there are biases.
        solver: "lbfgs" or "newton-cg".
        tol: of the 2-norm of the mean loss's gradient.
        max_iter: steps at most; a ConvergenceWarning says what is missing.
        class_weight: None, "balanced" or a dict of weights for labels.
        warm_start: go on from the coefficients of the last fit.

    Attributes:
        classes_, coef_, intercept_, n_iter_, n_features_in_: as in scikit-learn.
        certificate_: how near the optimum is; see jax_softmax.Certificate.

    >>> from jax_softmax.sklearn import SoftmaxClassifier
    >>> model = SoftmaxClassifier().fit([[0.0], [1.0], [2.0], [3.0]], list("aabb"))
    >>> print(model.predict([[0.5], [2.5]]), model.certificate_.converged)
    ['a' 'b'] True
    """

    def __init__(
        self,
        C: float = 1.0,
        *,
        fit_intercept: bool = True,
        solver: Solver = "lbfgs",
        tol: float = 1e-8,
        max_iter: int = 1000,
        class_weight: dict[Any, float] | Literal["balanced"] | None = None,
        warm_start: bool = False,
    ):
        self.C = C
        self.fit_intercept = fit_intercept
        self.solver = solver
        self.tol = tol
        self.max_iter = max_iter
        self.class_weight = class_weight
        self.warm_start = warm_start

    def fit(
        self, X: ArrayLike, y: ArrayLike, sample_weight: ArrayLike | None = None
    ) -> "SoftmaxClassifier":
        """Learn from X [rows, features] and labels y of any type."""
        if not (isinstance(self.C, Real) and 0 < self.C < math.inf):
            raise ValueError(f"C must be a finite number above 0, got {self.C}")
        if not (isinstance(self.tol, Real) and 0 <= self.tol < math.inf):
            raise ValueError(f"tol must be finite and not negative, got {self.tol!r}")
        options.flag("fit_intercept", self.fit_intercept)
        options.flag("warm_start", self.warm_start)
        options.at_least(0, "max_iter", self.max_iter)
        start = self._last_fit() if self.warm_start else None
        # pyright takes the defaults of validate_data, "no_validation", for its types.
        x, checked_y = cast(Any, validate_data)(self, X, y, dtype=np.float64)
        check_classification_targets(checked_y)
        classes, ids = np.unique(checked_y, return_inverse=True)
        features = x.shape[1]
        if len(classes) < 2:
            raise ValueError(
                "y must hold at least 2 classes, got one class: "
                f"{classes[0]} in all {len(ids)} rows"
            )
        fresh = classes, np.zeros((features, len(classes))), np.zeros(len(classes))
        if start is None or not (
            np.array_equal(start[0], classes) and start[1].shape == fresh[1].shape
        ):
            start = fresh
        weights = self._weights(classes, ids, sample_weight)
        binary = 2 if len(classes) == 2 else 1
        with jax.enable_x64(True):
            padded_x, padded_ids, padded_weights = _padded(x, ids, weights)
            w = np.zeros((padded_x.shape[1], len(classes)))
            w[:features] = start[1]
            b = start[2] if self.fit_intercept else np.zeros(len(classes))
            (w, b), certificate = solve(
                SoftmaxRegression(jnp.asarray(w), jnp.asarray(b)),
                padded_x,
                padded_ids,
                sample_weights=padded_weights,
                solver=cast(Solver, self.solver),
                l2=binary / (self.C * max(weights.sum(), np.finfo(float).tiny)),
                intercept=self.fit_intercept,
                tolerance=self.tol,
                max_iterations=self.max_iter,
            )
        w, b = np.asarray(w)[:features], np.asarray(b)
        self.classes_, self.certificate_ = classes, certificate
        self.coef_ = (w[:, 1:] - w[:, :1]).T if binary == 2 else w.T.copy()
        self.intercept_ = b[1:] - b[:1] if binary == 2 else b.copy()
        self.n_iter_ = np.array([max(1, certificate.iterations)])
        if not certificate.converged and (
            certificate.gap > ENOUGH * certificate.objective
        ):
            sentence = f"SoftmaxClassifier did not converge: {certificate.reason}"
            warnings.warn(sentence, ConvergenceWarning, stacklevel=2)
        return self

    def decision_function(self, X: ArrayLike) -> np.ndarray:
        """Logits [rows, classes]; of two classes, the second one's over the first's."""
        check_is_fitted(self)
        x = cast(Any, validate_data)(self, X, dtype=np.float64, reset=False)
        scores = x @ self.coef_.T + self.intercept_
        return scores[:, 0] if len(self.classes_) == 2 else scores

    def predict(self, X: ArrayLike) -> np.ndarray:
        """The most likely label of each row."""
        scores = self.decision_function(X)
        ids = (scores > 0).astype(int) if scores.ndim == 1 else scores.argmax(1)
        return self.classes_[ids]

    def predict_proba(self, X: ArrayLike) -> np.ndarray:
        """Probabilities, one column for each of classes_."""
        return _by_row(softmax, self._logits(X))

    def predict_log_proba(self, X: ArrayLike) -> np.ndarray:
        """Their logarithms, finite where a probability is too small to be written."""
        return _by_row(log_softmax, self._logits(X))

    def _logits(self, X: ArrayLike) -> np.ndarray:
        scores = self.decision_function(X)
        if scores.ndim == 1:
            return np.stack([np.zeros_like(scores), scores], axis=1)
        return scores

    def _last_fit(self) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
        if not hasattr(self, "coef_"):
            return None
        if len(self.classes_) == 2:
            signs = np.array([-0.5, 0.5])
            return self.classes_, self.coef_.T * signs, self.intercept_ * signs
        return self.classes_, self.coef_.T, self.intercept_

    def _weights(
        self, classes: np.ndarray, ids: np.ndarray, sample_weight: ArrayLike | None
    ) -> np.ndarray:
        """Sample weights times class weights."""
        weights = np.ones(len(ids))
        if sample_weight is not None:
            weights = np.asarray(sample_weight, np.float64)
        if weights.shape != ids.shape:
            raise ValueError(
                f"sample_weight must have shape {ids.shape}, got {weights.shape}"
            )
        if self.class_weight == "balanced":
            of_class = np.bincount(ids, weights, len(classes))
            share = weights.sum() / (len(classes) * np.where(of_class, of_class, 1))
        else:
            share = compute_class_weight(
                self.class_weight, classes=classes, y=classes[ids]
            )
        weights = weights * share[ids]
        if not (np.isfinite(weights).all() and (weights >= 0).all()):
            raise ValueError(
                "sample_weight and class_weight must be finite and not negative"
            )
        if not weights.any():
            raise ValueError(
                "sample_weight times class_weight is zero in all rows: none is left "
                "to learn from"
            )
        return weights


def _by_row(function: Callable[[Array], Array], logits: np.ndarray) -> np.ndarray:
    """A reduction of logits in float64, compiled once for near numbers of rows."""
    rows = len(logits)
    with jax.enable_x64(True):
        padded = np.pad(logits, ((0, _missing_rows(rows)), (0, 0)))
        return np.asarray(jax.jit(function)(padded))[:rows].copy()


def _padded(
    x: np.ndarray, ids: np.ndarray, weights: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows of weight 0 and features that are 0, so that near sizes share a program.

    A fold or a subset of columns is then solved by the program that is there already.
    """
    rows, features = x.shape
    more_rows, more_features = _missing_rows(rows), -features % FEATURES
    return (
        np.pad(x, ((0, more_rows), (0, more_features))),
        np.pad(ids, (0, more_rows)),
        np.pad(weights, (0, more_rows)),
    )


def _missing_rows(rows: int) -> int:
    """Up to the next multiple of a quarter of a power of two."""
    return -rows % max(ROWS, 2 ** ((rows - 1).bit_length() - 3))
