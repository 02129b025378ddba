"""Gradients, Jacobians and Hessian products as on paper; no code of the losses in them.

>>> print(softmax_jacobian(jnp.zeros(2)))
[[ 0.25 -0.25]
 [-0.25  0.25]]
"""

from jax_softmax._closed_form import log_softmax_jvp as log_softmax_jvp
from jax_softmax._closed_form import log_softmax_vjp as log_softmax_vjp
from jax_softmax._closed_form import logsumexp_gradient as logsumexp_gradient
from jax_softmax._closed_form import logsumexp_hessian as logsumexp_hessian
from jax_softmax._closed_form import logsumexp_hvp as logsumexp_hvp
from jax_softmax._closed_form import softmax_jacobian as softmax_jacobian
from jax_softmax._closed_form import softmax_jvp as softmax_jvp
from jax_softmax._closed_form import softmax_vjp as softmax_vjp
from jax_softmax._closed_form import z_loss_gradient as z_loss_gradient
from jax_softmax._closed_form import z_loss_hessian as z_loss_hessian
from jax_softmax._closed_form import z_loss_hvp as z_loss_hvp
from jax_softmax._closed_form_losses import (
    cross_entropy_gradient as cross_entropy_gradient,
)
from jax_softmax._closed_form_losses import (
    cross_entropy_hessian as cross_entropy_hessian,
)
from jax_softmax._closed_form_losses import cross_entropy_hvp as cross_entropy_hvp
from jax_softmax._closed_form_losses import (
    cross_entropy_with_probs_gradient as cross_entropy_with_probs_gradient,
)
from jax_softmax._closed_form_losses import (
    cross_entropy_with_probs_hessian as cross_entropy_with_probs_hessian,
)
from jax_softmax._closed_form_losses import (
    cross_entropy_with_probs_hvp as cross_entropy_with_probs_hvp,
)
from jax_softmax._closed_form_losses import (
    temperature_curvature as temperature_curvature,
)
from jax_softmax._closed_form_losses import temperature_gradient as temperature_gradient
from jax_softmax._closed_form_regression import (
    regression_empirical_fisher_vp as regression_empirical_fisher_vp,
)
from jax_softmax._closed_form_regression import (
    regression_fisher_vp as regression_fisher_vp,
)
from jax_softmax._closed_form_regression import (
    regression_gauss_newton_vp as regression_gauss_newton_vp,
)
from jax_softmax._closed_form_regression import (
    regression_gradient as regression_gradient,
)
from jax_softmax._closed_form_regression import regression_hessian as regression_hessian
from jax_softmax._closed_form_regression import regression_hvp as regression_hvp
from jax_softmax._closed_form_regression import (
    regression_per_example_gradient_norms as regression_per_example_gradient_norms,
)
from jax_softmax._closed_form_regression import (
    regression_per_example_gradients as regression_per_example_gradients,
)
