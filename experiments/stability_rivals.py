"""The softmaxes and cross-entropies that people write, and the exact answers.

The reference is float64, written plainly. Logits in a narrower type subtract without
error there, |z - z'| <= 150 costs exp at most 150 * 2^-53 of its value, and nothing
that nearly cancels is ever subtracted: its own error is below 1e-6 float32 ULP. The
test holds it against mpmath.
"""

import os
from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

import jax_softmax
from experiments import torch_peer
from experiments.gradient_cases import at_label, textbook_softmax
from experiments.measure import Contender, compiled

OURS = "jax_softmax"


def smart(z: Array) -> Array:
    """The thread's slightly smart one: the row's maximum goes first."""
    return textbook_softmax(z - z.max(-1, keepdims=True))


SOFTMAXES = {
    "naive": textbook_softmax,
    "slightly smart": smart,
    OURS: jax_softmax.softmax,
}


def by_definition(z: Array, y: Array) -> Array:
    """-sum_j y_j log(y_hat_j), with a one-hot y."""
    return -(jax.nn.one_hot(y, z.shape[-1]) * jnp.log(smart(z))).sum(-1)


def by_index(z: Array, y: Array) -> Array:
    """-log(y_hat[range(n), y])."""
    return -jnp.log(at_label(smart(z), y))


def by_log_softmax(z: Array, y: Array) -> Array:
    """-log_softmax(x)[range(n), y]: no probability is ever rounded."""
    return -at_label(jax.nn.log_softmax(z), y)


Prepare = Callable[[np.ndarray, np.ndarray], Contender]


class Rival(NamedTuple):
    """A cross-entropy: what it gives for logits and labels, and ready to be timed."""

    results: Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]
    """The losses, and the gradient of their sum."""
    losses: Prepare
    with_gradient: Prepare


def in_jax(function: Callable[[Any, Any], Array]) -> Rival:
    """A rival from losses of (logits, labels): compiled, gradient by autodiff."""

    @jax.jit
    def with_gradient(z: Array, y: Array) -> tuple[Array, Array]:
        losses, back = jax.vjp(lambda z: function(z, y), z)
        return losses, back(jnp.ones_like(losses))[0]

    def results(z: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        losses, gradient = with_gradient(z, y)
        return np.asarray(losses), np.asarray(gradient)

    def prepared(work: Callable[[Any, Any], Any]) -> Prepare:
        return lambda z, y: compiled(work, jnp.asarray(z), jnp.asarray(y))

    return Rival(results, prepared(function), prepared(with_gradient))


def in_torch() -> Rival:
    """torch's cross_entropy, eager, its threads asleep between calls."""
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    torch: Any = import_module("torch")

    def function(z: Any, y: Any) -> Any:
        return torch.nn.functional.cross_entropy(z, y, reduction="none")

    def and_gradient(z: Any, y: Any) -> tuple[Any, Any]:
        losses = function(z, y)
        return losses.detach(), torch.autograd.grad(losses.sum(), z)[0]

    def results(z: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        losses, gradient = with_gradient(z, y).run()
        return torch_peer.numbers(losses), torch_peer.numbers(gradient)

    def losses(z: np.ndarray, y: np.ndarray) -> Contender:
        logits, labels = torch_peer.tensor(z, "float32"), torch_peer.tensor(y, "int64")
        return torch_peer.contender(lambda: function(logits, labels))

    def with_gradient(z: np.ndarray, y: np.ndarray) -> Contender:
        logits = torch_peer.tensor(z, "float32", differentiated=True)
        labels = torch_peer.tensor(y, "int64")
        return torch_peer.contender(lambda: and_gradient(logits, labels))

    return Rival(results, losses, with_gradient)


@cache
def rivals() -> dict[str, Rival]:
    """Every cross-entropy that is installed, ours last."""
    functions = {
        "definition": by_definition,
        "indexing": by_index,
        "log_softmax": by_log_softmax,
        "optax": optax.softmax_cross_entropy_with_integer_labels,
    }
    peers = {name: in_jax(function) for name, function in functions.items()}
    if torch_peer.INSTALLED:
        peers["torch"] = in_torch()
    return peers | {OURS: in_jax(jax_softmax.cross_entropy)}


def exact_softmax(logits: np.ndarray) -> np.ndarray:
    """Probabilities in float64."""
    z = logits.astype(np.float64)
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def exact_losses(
    logits: np.ndarray, labels: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Losses and the gradient of their sum in float64.

    loss = log1p(rest), where rest is the sum of exp(z_j - z_y) over the other classes;
    gradient exp(z_j - z_y) / (1 + rest), and -rest / (1 + rest) at the label.
    """
    z, rows = logits.astype(np.float64), np.arange(len(labels))
    odds = np.exp(z - z[rows, labels][:, None])
    odds[rows, labels] = 0
    rest = odds.sum(-1)
    odds[rows, labels] = -rest
    return np.log1p(rest), odds / (1 + rest)[:, None]


def ulp_error(got: Any, exact: np.ndarray) -> np.ndarray:
    """|got - exact| in units in the last place of got's type at the exact value.

    A result too small for the type's normal numbers may be 0; nan is infinitely wrong.
    """
    kind = jnp.finfo(got.dtype)
    tiny = float(kind.tiny)
    got = np.asarray(got).astype(np.float64)
    unit = np.exp2(np.floor(np.log2(np.maximum(np.abs(exact), tiny)))) * float(kind.eps)
    error = np.nan_to_num(np.abs(got - exact) / unit, nan=np.inf, posinf=np.inf)
    return np.where((np.abs(exact) < tiny) & (got == 0), 0, error)


def relative_error(got: np.ndarray, exact: np.ndarray) -> np.ndarray:
    """|got - exact| / |exact|; nan is infinitely wrong."""
    error = np.abs(got.astype(np.float64) - exact) / np.abs(exact)
    return np.nan_to_num(error, nan=np.inf, posinf=np.inf)
