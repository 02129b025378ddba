"""Softmax, cross-entropy and softmax regression for JAX, accurate to a few ULP.

Losses are one per row, from logits, and pure functions of arrays; average them yourself
or with mean_loss:

>>> logits, labels = jnp.array([[20.0, 0.0, 0.0], [0.0, 0.0, 0.0]]), jnp.array([0, 2])
>>> losses = cross_entropy(logits, labels)
>>> print(losses, mean_loss(losses))
[4.1223074e-09 1.0986123e+00] 0.54930615
>>> print(jax.grad(lambda z: cross_entropy(z, labels).mean())(logits).shape)
(2, 3)

From features and weights, without the logits of a large vocabulary in memory:

>>> x, w = jnp.ones((2, 8)), jnp.zeros((8, 3))
>>> print(mean_linear_cross_entropy(x, w, labels))
1.0986123

And any gradient beside the one on paper:

>>> report = compare_gradients(logsumexp, softmax, jnp.array([1.0, 2.0, 3.0]))
>>> report.raise_if(ulp=3)
"""

from jax_softmax import closed_form as closed_form
from jax_softmax._compare import compare_gradients as compare_gradients
from jax_softmax._conformal import adaptive_scores as adaptive_scores
from jax_softmax._conformal import conformal_threshold as conformal_threshold
from jax_softmax._decisions import confusion_matrix as confusion_matrix
from jax_softmax._decisions import decision_costs as decision_costs
from jax_softmax._decisions import expected_costs as expected_costs
from jax_softmax._decisions import least_cost_decision as least_cost_decision
from jax_softmax._decisions import top_k_accuracy as top_k_accuracy
from jax_softmax._distributions import Logits as Logits
from jax_softmax._distributions import Probs as Probs
from jax_softmax._divergences import cross_entropy_between as cross_entropy_between
from jax_softmax._divergences import js_divergence as js_divergence
from jax_softmax._divergences import kl_divergence as kl_divergence
from jax_softmax._evaluation import evaluate as evaluate
from jax_softmax._fit import Epoch as Epoch
from jax_softmax._fit import NonFiniteLoss as NonFiniteLoss
from jax_softmax._fit import Progress as Progress
from jax_softmax._fit import fit as fit
from jax_softmax._gradient_report import GradientReport as GradientReport
from jax_softmax._gradient_report import GradientRow as GradientRow
from jax_softmax._information import entropy as entropy
from jax_softmax._information import perplexity as perplexity
from jax_softmax._linear import linear_cross_entropy as linear_cross_entropy
from jax_softmax._linear import mean_linear_cross_entropy as mean_linear_cross_entropy
from jax_softmax._linear_summary import LinearSoftmaxSummary as LinearSoftmaxSummary
from jax_softmax._linear_summary import linear_softmax_summary as linear_softmax_summary
from jax_softmax._losses import cross_entropy as cross_entropy
from jax_softmax._losses import cross_entropy_with_probs as cross_entropy_with_probs
from jax_softmax._losses import mean_loss as mean_loss
from jax_softmax._losses import nll_from_probs as nll_from_probs
from jax_softmax._reductions import log_softmax as log_softmax
from jax_softmax._reductions import logsumexp as logsumexp
from jax_softmax._reductions import softmax as softmax
from jax_softmax._regression import SoftmaxRegression as SoftmaxRegression
from jax_softmax._reliability import BrierParts as BrierParts
from jax_softmax._reliability import Reliability as Reliability
from jax_softmax._reliability import brier_decomposition as brier_decomposition
from jax_softmax._reliability import brier_score as brier_score
from jax_softmax._reliability import (
    expected_calibration_error as expected_calibration_error,
)
from jax_softmax._reliability import reliability as reliability
from jax_softmax._rows import Rows as Rows
from jax_softmax._solve import Certificate as Certificate
from jax_softmax._solve import Solution as Solution
from jax_softmax._solve import solve as solve
from jax_softmax._sweep import SweepEpoch as SweepEpoch
from jax_softmax._sweep import sweep as sweep
from jax_softmax._tables import conditional_entropy as conditional_entropy
from jax_softmax._tables import mutual_information as mutual_information
from jax_softmax._temperature_scaling import TemperatureScaling as TemperatureScaling
from jax_softmax._temperature_scaling import temperature_scaling as temperature_scaling
from jax_softmax._vector_scaling import VectorScaling as VectorScaling
from jax_softmax._vector_scaling import vector_scaling as vector_scaling
