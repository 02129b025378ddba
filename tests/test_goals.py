"""experiments.solvers and experiments.sweep: goals, and where descent is stable."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from experiments import sweep
from experiments.solvers_race import RIVAL, goals, race
from experiments.solvers_runs import Point
from jax_softmax import SoftmaxRegression

PEER = [Point(1, 3.0, 1.0), Point(2, 2.0, 9e-5), Point(4, 1.5, 9e-5), Point(8, 1, 1e-9)]


def test_goals_are_where_each_tolerance_ends_the_run():
    default, tight = goals(PEER).values()
    assert default == (PEER[1], True)
    assert tight == (PEER[3], True)
    assert list(goals(PEER[:3]).values())[1] == (PEER[2], False)


def test_the_slower_of_our_runs_counts_and_who_never_arrives_has_no_ratio():
    curves = {
        RIVAL: [PEER],
        "ours": [[Point(0.1, 2.5), Point(0.2, 1.9)], [Point(0.5, 1.9)]],
    }
    default, tight = race(curves, minimum=0.9, limit=100)
    assert default["ratio"] == pytest.approx(0.5 / 2)
    assert default["gap"] == pytest.approx(2.0 - 0.9)
    assert tight["ratio"] is None


def test_the_largest_curvature_is_the_largest_eigenvalue_of_the_hessian():
    keys = jax.random.split(jax.random.key(0))
    x = jax.random.normal(keys[0], (20, 3)) * jnp.array([3.0, 1.0, 1.0])
    model = SoftmaxRegression.init(keys[1], 3, 4, scale=1.0)
    labels = jnp.zeros(20, int)
    flat, unravel = ravel_pytree(model)
    hessian = jax.hessian(lambda v: unravel(v).objective(x, labels))(flat)
    value, residual = sweep.largest_curvature(model, x)
    assert residual < 1e-3 * value
    assert value == pytest.approx(np.linalg.eigvalsh(hessian)[-1], rel=1e-4)
