"""Classes over devices, tokens over devices, and both: the same answers as on one.

On the four devices that conftest asks for, as 1 x 4, 2 x 2 and 4 x 1. Most rows have
classes that do not divide: the last devices hold padding, one of them nothing else.
"""

from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference as ref
import test_accuracy as accuracy
import test_contract as contract
from jax.sharding import PartitionSpec as P

import jax_softmax as js

SHAPES = [(1, 4), (2, 2), (4, 1)]  # data x model
PADDING = 7.0  # of logits: ruled out, whatever it is
ROWS, COLUMNS, BY_CLASS = P("data"), P(None, "model"), P("data", "model")


@lru_cache
def mesh_of(shape):
    auto = (jax.sharding.AxisType.Auto,) * 2
    return jax.make_mesh(shape, ("data", "model"), axis_types=auto)


over_meshes = pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s[0]}x{s[1]}")


@pytest.fixture(autouse=True)
def _strict(strict_types):
    pass


def sharded(f, shape, in_specs, out_specs, **options):
    mesh = mesh_of(shape)
    return jax.jit(
        jax.shard_map(f, mesh=mesh, in_specs=in_specs, out_specs=out_specs, **options)
    )


def padded(columns, value):
    """Classes in four equal parts."""
    missing = -columns.shape[-1] % 4
    return np.pad(columns, ((0, 0), (0, missing)), constant_values=value)


def in_fours(rows):
    """Rows, some of them twice, that divide among four devices."""
    return rows[np.arange(-(-len(rows) // 4) * 4) % len(rows)]


def every_loss(shape, classes):
    """(loss, its gradient) of cross_entropy, plain and smoothed, and of soft labels."""
    of = {"axis_name": "model"}

    def losses(z, labels, targets):
        smoothed = {"label_smoothing": accuracy.SMOOTHING}
        labelled = partial(js.cross_entropy, labels=labels, classes=classes, **of)
        ids = jnp.arange(z.shape[1]) + jax.lax.axis_index("model") * z.shape[1]

        def soft(z):
            possible = jnp.where(ids < classes, z, -jnp.inf)
            return js.cross_entropy_with_probs(possible, targets, **of)

        functions = labelled, partial(labelled, **smoothed), soft
        return [(f(z), jax.grad(lambda z, f=f: f(z).sum())(z)) for f in functions]

    return sharded(losses, shape, (BY_CLASS, ROWS, BY_CLASS), [(ROWS, BY_CLASS)] * 3)


@pytest.mark.parametrize(("shape", "n"), [*((s, 10) for s in SHAPES), ((2, 2), 1001)])
def test_as_accurate_as_on_one_device(shape, n):
    c = accuracy.case(n, rows=2)
    found = every_loss(shape, n)(
        in_fours(padded(c.z, PADDING)),
        in_fours(c.labels),
        in_fours(padded(c.targets, 0)),
    )
    rows = len(c.z)
    (loss, grad), (smooth, smooth_grad), (soft, soft_grad) = jax.tree.map(
        lambda leaf: np.asarray(leaf)[:rows], found
    )
    for leaf in (grad, smooth_grad, soft_grad):
        np.testing.assert_array_equal(leaf[:, n:], 0)
    results = {
        accuracy.cross_entropy: loss,
        accuracy.cross_entropy_gradient: grad[:, :n],
        accuracy.smoothed: smooth,
        accuracy.smoothed_gradient: smooth_grad[:, :n],
        accuracy.soft_labels: soft,
        accuracy.soft_labels_gradient: soft_grad[:, :n],
    }
    for promise, result in results.items():
        errors = promise(c, lambda _, result=result: lambda *_: result)
        accuracy.within(errors, c.names, accuracy.BOUNDS[promise])


@over_meshes
def test_the_contract_at_the_edges(shape):
    """Three classes on four devices: some are alone on theirs, one device is empty."""
    table = list((contract.TABLE | contract.BAD_LABELS).items())
    rows = [row for _, row in table]
    logits = padded(np.asarray([row.logits for row in rows], np.float32), PADDING)
    labels = np.asarray([row.label for row in rows])
    where = np.asarray([row.keep for row in rows])

    def total(z, y, w):
        out = js.cross_entropy(z, y, where=w, axis_name="model", classes=3)
        return out.sum(), out

    run = sharded(
        jax.grad(total, has_aux=True), shape, (BY_CLASS, ROWS, ROWS), (BY_CLASS, ROWS)
    )
    found = run(*map(in_fours, (logits, labels, where)))
    for (key, row), grad, loss in zip(table, *found, strict=False):
        np.testing.assert_allclose(loss, row.loss, rtol=1e-6, err_msg=key)
        np.testing.assert_allclose(grad[:3], row.gradient, rtol=1e-6, err_msg=key)
        np.testing.assert_array_equal(grad[3], grad[3] * 0, err_msg=key)


@pytest.mark.parametrize("check_vma", [True, False])
def test_derivatives_from_outside(check_vma):
    """Not multiplied by the devices; forward mode and Hessian products too."""
    rng = np.random.default_rng(0)
    z, dz = rng.normal(0, 3, (2, 8, 12)).astype(np.float32)
    labels = rng.integers(0, 12, 8)
    weights = rng.normal(size=8).astype(np.float32)
    options = {"label_smoothing": 0.1}
    spread = sharded(
        partial(js.cross_entropy, axis_name=("data", "model"), **options),
        (2, 2),
        (P(None, ("data", "model")), P()),
        P(),
        check_vma=check_vma,
    )

    def derivatives(loss):
        grad = jax.grad(lambda z: (weights * loss(z, labels)).sum())
        return jax.jvp(lambda z: loss(z, labels), (z,), (dz,)), jax.jvp(
            grad, (z,), (dz,)
        )

    got = jax.jit(partial(derivatives, spread))()
    want = jax.jit(partial(derivatives, partial(js.cross_entropy, **options)))()
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), got, want)


def test_bfloat16_logits():
    z = jnp.asarray(np.random.default_rng(0).normal(0, 5, (16, 1000)), jnp.bfloat16)
    labels = np.arange(16)
    exact = ref.softmax(np.asarray(z))

    def losses(z, y):
        out = partial(js.cross_entropy, labels=y, axis_name="model")
        return out(z), jax.grad(lambda z: out(z).sum())(z)

    loss, grad = sharded(losses, (2, 2), (BY_CLASS, ROWS), (ROWS, BY_CLASS))(z, labels)
    assert loss.dtype == jnp.float32
    assert grad.dtype == jnp.bfloat16
    assert ref.ulp_error(loss, -ref.at(exact.log_probs, labels)).max() <= 2


@pytest.mark.usefixtures("our_errors")
def test_mistakes():
    z, labels = np.zeros((2, 3), np.float32), np.zeros(2, int)
    with pytest.raises(ValueError, match=r"axis_name must name mesh axes.*'model'"):
        js.cross_entropy(z, labels, axis_name="model")
    with pytest.raises(ValueError, match=r"classes must be in \[1, 3\].*got 4"):
        js.cross_entropy(z, labels, classes=4)
