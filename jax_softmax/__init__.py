"""Softmax, cross-entropy and softmax regression for JAX, accurate to a few ULP."""

from jax_softmax._closed_form_regression import (
    regression_gradient as regression_gradient,
)
from jax_softmax._compare import compare_gradients as compare_gradients
from jax_softmax._fit import Epoch as Epoch
from jax_softmax._fit import NonFiniteLoss as NonFiniteLoss
from jax_softmax._fit import evaluate as evaluate
from jax_softmax._fit import fit as fit
from jax_softmax._gradient_report import GradientReport as GradientReport
from jax_softmax._gradient_report import GradientRow as GradientRow
from jax_softmax._losses import cross_entropy as cross_entropy
from jax_softmax._losses import cross_entropy_with_probs as cross_entropy_with_probs
from jax_softmax._losses import mean_loss as mean_loss
from jax_softmax._losses import nll_from_probs as nll_from_probs
from jax_softmax._reductions import log_softmax as log_softmax
from jax_softmax._reductions import logsumexp as logsumexp
from jax_softmax._reductions import softmax as softmax
from jax_softmax._regression import SoftmaxRegression as SoftmaxRegression
