"""First and second derivatives against plain float64 without custom rules."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_softmax as js

pytestmark = pytest.mark.usefixtures("strict_types")

INF = np.inf
ROWS = {
    "plain": [0.3, -1.2, 2.0, 0.7],
    "ties": [1.0, 1.0, 1.0, 0.0],
    "certain": [30.0, 0.0, 1.0, -1.0],
    "shifted": [1000.0, 1001.0, 999.0, 1000.5],
    "ruled out": [0.5, -INF, 1.5, -INF],
    "one possible": [-INF, -INF, 2.0, -INF],
}
LABEL = 2
TARGET = np.array([0.25, 0.0, 0.75, 0.0])


def plain_log_softmax(z):
    """Over the possible classes only, which are known before tracing."""
    return z - jnp.log(jnp.exp(z - z.max()).sum()) - z.max()


FUNCTIONS = {
    "logsumexp": (js.logsumexp, lambda z: jnp.log(jnp.exp(z - 1).sum()) + 1),
    "softmax": (
        lambda z: js.softmax(z)[LABEL],
        lambda z: jnp.exp(plain_log_softmax(z))[-1],
    ),
    "log_softmax": (
        lambda z: js.log_softmax(z)[LABEL],
        lambda z: plain_log_softmax(z)[-1],
    ),
    "cross_entropy": (
        lambda z: js.cross_entropy(z, LABEL),
        lambda z: -plain_log_softmax(z)[-1],
    ),
    "smoothed": (
        lambda z: js.cross_entropy(z, LABEL, label_smoothing=0.2),
        lambda z: -0.8 * plain_log_softmax(z)[-1] - 0.2 * plain_log_softmax(z).mean(),
    ),
    "soft labels": (
        lambda z: js.cross_entropy_with_probs(z, jnp.asarray(TARGET, z.dtype)),
        None,
    ),
}


def reference(name, z):
    """Value, gradient and Hessian in float64; a class that is ruled out has zeros."""
    possible = np.flatnonzero(z > -INF)
    order = np.append(possible[possible != LABEL], LABEL)  # the label last
    plain = FUNCTIONS[name][1]
    if plain is None:
        target = TARGET[order]

        def plain(z):
            return -(target * plain_log_softmax(z)).sum()

    def shifted(z):
        return plain(z - z.max()) + (z.max() if name == "logsumexp" else 0)

    with jax.enable_x64(True):
        inner = jnp.asarray(z[order], jnp.float64)
        top = float(inner.max())

        def centred(z):
            return plain(z - top) + (top if name == "logsumexp" else 0)

        gradient, hessian = np.zeros(len(z)), np.zeros((len(z), len(z)))
        exact = jax.jit(
            lambda z: (centred(z), jax.grad(centred)(z), jax.hessian(centred)(z))
        )
        value, gradient[order], hessian[np.ix_(order, order)] = exact(inner)
        return float(value), gradient, hessian


SECOND = {
    "forward over reverse": lambda f: jax.jacfwd(jax.grad(f)),
    "reverse over reverse": lambda f: jax.jacrev(jax.grad(f)),
    "forward over forward": lambda f: jax.jacfwd(jax.jacfwd(f)),
}


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_first_and_second_derivatives(name, row):
    f, z = FUNCTIONS[name][0], np.array(ROWS[row])
    if name in ("soft labels",) and not np.isfinite(z[0]):
        pytest.skip("a target on a class that is ruled out is an infinite loss")
    value, gradient, hessian = reference(name, z)
    z = jnp.asarray(z, jnp.float32)
    close = partial(np.testing.assert_allclose, rtol=2e-5, atol=1e-12)
    close(jax.jit(f)(z), value, rtol=1e-6)
    close(jax.jit(jax.grad(f))(z), gradient)
    close(jax.jit(jax.jacfwd(f))(z), gradient)
    for way, second in SECOND.items():
        got = jax.jit(second(f))(z)
        scale = np.abs(hessian).max()
        close(got, hessian, atol=2e-6 * scale + 1e-12, err_msg=way)
    direction = jnp.asarray([1.0, -2.0, 0.5, 3.0])
    close(jax.jvp(f, (z,), (direction,))[1], gradient @ direction, atol=1e-6)


@pytest.mark.parametrize("name", ["cross_entropy", "cross_entropy_with_probs"])
def test_dropped_rows_have_no_derivatives_of_any_order(name):
    z = jnp.array([[np.nan, INF, -INF], [0.0, 1.0, 2.0]])
    keep = jnp.array([False, True])
    if name == "cross_entropy":
        f = partial(js.cross_entropy, labels=jnp.array([-100, 0]), where=keep)
    else:
        f = partial(js.cross_entropy_with_probs, probs=z * 0 + 0.5, where=keep)

    def total(z):
        return f(z).sum()

    for second in SECOND.values():
        hessian = second(total)(z)
        assert np.isfinite(hessian).all()
        np.testing.assert_array_equal(hessian[0], 0)
        np.testing.assert_array_equal(hessian[:, :, 0], 0)


def test_targets_have_a_derivative_too():
    z = jnp.array([[1.0, 2.0, -INF]])
    probs = jnp.array([[0.25, 0.75, 0.0]])
    gradient = jax.grad(lambda t: js.cross_entropy_with_probs(z, t).sum())(probs)
    np.testing.assert_allclose(gradient[:, :2], -js.log_softmax(z)[:, :2])
    assert gradient[0, 2] == 0


def test_targets_that_do_not_add_up_to_1():
    z, t = jnp.array([0.0, 1.0, 3.0]), jnp.array([0.5, 0.0, 2.0])
    gradient = jax.grad(js.cross_entropy_with_probs)(z, t)
    want = 2.5 * np.asarray(js.softmax(z)) - t
    np.testing.assert_allclose(gradient, want, rtol=1e-5)


def test_random_cotangents_scale_each_row():
    z = jax.random.normal(jax.random.key(0), (4, 5))
    y, g = jnp.arange(4), jnp.array([1.0, -2.0, 0.0, 3.0])
    _, pullback = jax.vjp(lambda z: js.cross_entropy(z, y), z)
    rows = jax.vmap(jax.grad(js.cross_entropy))(z, y)
    np.testing.assert_allclose(pullback(g)[0], g[:, None] * rows, rtol=1e-6)


ROWWISE = {
    "logsumexp": lambda z, y: js.logsumexp(z),
    "softmax": lambda z, y: js.softmax(z)[..., 0],
    "log_softmax": lambda z, y: js.log_softmax(z)[..., 0],
    "cross_entropy": js.cross_entropy,
    "smoothed": partial(js.cross_entropy, label_smoothing=0.1),
    "soft labels": lambda z, y: js.cross_entropy_with_probs(z, js.softmax(z)),
}


@pytest.mark.parametrize("name", ROWWISE)
def test_no_derivative_is_larger_than_the_input(name):
    rows, classes = 3, 1031
    z, y = jnp.ones((rows, classes)), jnp.zeros(rows, jnp.int32)

    def total(z):
        return ROWWISE[name](z, y).sum()

    derivatives = (
        jax.grad(total),
        lambda z: jax.jvp(total, (z,), (z,)),
        lambda z: jax.jvp(jax.grad(total), (z,), (z,)),
        jax.grad(lambda z: (jax.grad(total)(z) * z).sum()),
    )
    for derivative in derivatives:
        assert largest(jax.make_jaxpr(derivative)(z).jaxpr) <= rows * classes


def largest(jaxpr):
    """The elements of the largest array in a jaxpr and all that it calls."""
    sizes = [np.prod(v.aval.shape) for e in jaxpr.eqns for v in e.outvars]
    for equation in jaxpr.eqns:
        for parameter in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda p: hasattr(p, "jaxpr")
        ):
            inner = getattr(parameter, "jaxpr", parameter)
            if hasattr(inner, "eqns"):
                sizes.append(largest(inner))
    return max(sizes, default=0)
