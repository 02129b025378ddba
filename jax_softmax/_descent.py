"""Down the bowl: directions from L-BFGS or truncated Newton, one search along them."""

from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from jax_softmax._full_batch import (
    FullBatch,
    Parameters,
    RowLogits,
    no_preconditioner,
    outcome,
    precondition,
)

Solver = Literal["lbfgs", "newton-cg"]

MEMORY = 30  # steps that L-BFGS remembers
CONJUGATE_STEPS = 200  # the most Hessian products for one Newton step
FIRST_LOOK = 8.0  # passes until the curvature is looked at again, and then 4 x as many
TRIALS = 30  # of a step length
HALVINGS = 10  # of one that is too long, before it is cut by more
PATIENCE = 20  # iterations without progress

RUNNING, CONVERGED, EXHAUSTED, STALLED, NOT_FINITE = range(5)


class Search(NamedTuple):
    """Where the search stands."""

    v: Parameters
    z: RowLogits
    value: Array
    gradient: Parameters
    first_norm: Array
    least_norm: Array
    steps: Array  # of L-BFGS: differences of v, oldest first
    bends: Array  # and of the gradient
    preconditioner: Array
    next_look: Array
    passes: Array
    iterations: Array
    idle: Array
    lost: Array  # whether the last direction led nowhere
    status: Array


def descend(
    batch: FullBatch, v: Parameters, tolerance: Array, most: Array, solver: Solver
) -> Search:
    """Step until the gradient's norm is within the tolerance, or something ends it."""
    sample = batch.sample(len(v), v.dtype)
    direction = {"lbfgs": _lbfgs, "newton-cg": _newton}[solver]

    def step(s: Search) -> Search:
        s = lax.cond(s.passes >= s.next_look, look_again, lambda s: s, s)
        dv, products = direction(batch, s)
        dv = jnp.where(s.lost | ~jnp.isfinite(dv).all(), -s.gradient, dv)
        dz = batch.logits(dv)
        t, found = _step_length(batch, s, dv, dz)
        v, z = s.v + t * dv, s.z + t * dz
        value, gradient = batch.value_and_gradient(v, z)
        norm = jnp.linalg.norm(gradient)
        hidden = 2 * jnp.finfo(v.dtype).eps * jnp.abs(s.value)
        fall = -jnp.vdot(s.gradient, dv)  # twice what a Newton step promises
        is_rounding = (fall > 0) & (fall <= 8 * hidden)
        progress = (value < s.value - hidden) | (norm < 0.9 * s.least_norm)
        bend, dv = gradient - s.gradient, t * dv
        useful = jnp.vdot(dv, bend) > 0
        idle = jnp.where(progress, 0, s.idle + 1)
        iterations = s.iterations + 1
        status = jnp.select(
            [
                ~jnp.isfinite(value + norm),
                norm <= tolerance,
                (~found & (s.lost | is_rounding)) | (idle >= PATIENCE),
                iterations >= most,
            ],
            [NOT_FINITE, CONVERGED, STALLED, EXHAUSTED],
            RUNNING,
        )
        return s._replace(
            v=v,
            z=z,
            value=value,
            gradient=gradient,
            least_norm=jnp.minimum(norm, s.least_norm),
            steps=_remembered(s.steps, dv, useful),
            bends=_remembered(s.bends, bend, useful),
            next_look=jnp.where(found & s.lost, 0, s.next_look),
            passes=s.passes + 1 + products,
            iterations=iterations,
            idle=idle,
            lost=~found,
            status=status,
        )

    def look_again(s: Search) -> Search:
        return s._replace(
            z=batch.logits(s.v),
            preconditioner=batch.preconditioner(sample, s.v, shared=s.iterations == 0),
            next_look=jnp.maximum(FIRST_LOOK, 4 * s.passes),
            passes=s.passes + 0.5,
        )

    memory = MEMORY if solver == "lbfgs" else 0
    z = batch.logits(v)
    value, gradient = batch.value_and_gradient(v, z)
    norm = jnp.linalg.norm(gradient)
    start = Search(
        v=v,
        z=z,
        value=value,
        gradient=gradient,
        first_norm=norm,
        least_norm=norm,
        steps=jnp.zeros((memory, *v.shape), v.dtype),
        bends=jnp.zeros((memory, *v.shape), v.dtype),
        preconditioner=no_preconditioner(v),
        next_look=jnp.float32(0),
        passes=jnp.float32(1),
        iterations=jnp.int32(0),
        idle=jnp.int32(0),
        lost=jnp.bool_(False),
        status=jnp.select(
            [~jnp.isfinite(value + norm), norm <= tolerance, most <= 0],
            [NOT_FINITE, CONVERGED, EXHAUSTED],
            RUNNING,
        ),
    )
    return lax.while_loop(lambda s: s.status == RUNNING, step, start)


def _lbfgs(batch: FullBatch, s: Search) -> tuple[Parameters, Array]:
    """Minus the inverse Hessian that the last steps suggest, times the gradient."""
    curvature = jax.vmap(jnp.vdot)(s.steps, s.bends)
    known = curvature > 0
    inverse = jnp.where(known, 1 / jnp.where(known, curvature, 1), 0)

    def down(q: Array, pair: tuple[Array, Array, Array]) -> tuple[Array, Array]:
        step, bend, rho = pair
        share = rho * jnp.vdot(step, q)
        return q - share * bend, share

    def up(q: Array, pair: tuple[Array, Array, Array, Array]) -> tuple[Array, None]:
        step, bend, rho, share = pair
        return q + (share - rho * jnp.vdot(bend, q)) * step, None

    pairs = (s.steps, s.bends, inverse)
    q, shares = lax.scan(down, s.gradient, pairs, reverse=True)
    q, _ = lax.scan(up, precondition(s.preconditioner, q), (*pairs, shares))
    return -q, jnp.float32(0)


def _newton(batch: FullBatch, s: Search) -> tuple[Parameters, Array]:
    """Conjugate gradients on H d = -gradient, the more exact the nearer the optimum."""
    probs = outcome(s.z, batch.labels).probs
    solve_blocks = partial(precondition, s.preconditioner)
    norm = jnp.linalg.norm(s.gradient)
    accuracy = jnp.minimum(0.25, jnp.sqrt(norm / s.first_norm))

    def unsolved(state: tuple[Any, ...]) -> Array:
        *_, size, count = state
        return (size > accuracy**2 * first) & (count < CONJUGATE_STEPS)

    def step(state: tuple[Any, ...]) -> tuple[Any, ...]:
        d, r, q, size, count = state
        product = batch.hessian_product(probs, q)
        bend = jnp.vdot(q, product)
        t = jnp.where(bend > 0, size / bend, 0)
        d, r = d + t * q, r - t * product
        u = solve_blocks(r)
        next_size = jnp.where(bend > 0, jnp.vdot(r, u), 0)
        return d, r, u + next_size / size * q, next_size, count + 1

    r = -s.gradient
    u = solve_blocks(r)
    first = jnp.vdot(r, u)
    d, *_, count = lax.while_loop(
        unsolved, step, (jnp.zeros_like(r), r, u, first, jnp.int32(0))
    )
    return d, count.astype(jnp.float32)


def _step_length(
    batch: FullBatch, s: Search, dv: Parameters, dz: RowLogits
) -> tuple[Array, Array]:
    """t with |slope(t)| <= |slope(0)| / 2 and no higher objective, near 1 if it can be.

    The objective along a line is convex: Newton's method on its slope, in a bracket.
    """
    steepest = 0.5 * jnp.abs(jnp.vdot(s.gradient, dv))
    no_higher = s.value + 4 * jnp.finfo(s.v.dtype).eps * jnp.abs(s.value)

    def searching(state: tuple[Array, ...]) -> Array:
        *_, trials, found = state
        return ~found & (trials < TRIALS)

    def attempt(state: tuple[Array, ...]) -> tuple[Array, ...]:
        t, low, high, trials, _ = state
        value, slope, bend = batch.slopes(s.v, s.z, dv, dz, t)
        is_lower = value <= no_higher
        found = is_lower & (jnp.abs(slope) <= steepest)
        too_far = ~is_lower | (slope > 0)
        low, high = jnp.where(too_far, low, t), jnp.where(too_far, t, high)
        newton = t - slope / jnp.where(bend > 0, bend, 1)
        # Where rows are certain a step may be too long by many powers of ten.
        many = (low == 0) & (trials >= HALVINGS)
        between = jnp.where(many, high / 16, (low + high) / 2)
        middle = jnp.where(jnp.isinf(high), 10 * t, between)
        inside = (bend > 0) & (newton > low) & (newton < jnp.minimum(high, 10 * t))
        return (
            jnp.where(found, t, jnp.where(inside, newton, middle)),
            low,
            high,
            trials + 1,
            found,
        )

    one = jnp.ones((), s.v.dtype)
    t, low, *_, found = lax.while_loop(
        searching,
        attempt,
        (one, 0 * one, jnp.inf * one, jnp.int32(0), jnp.bool_(False)),
    )
    leads_down = jnp.vdot(s.gradient, dv) < 0
    return jnp.where(found, t, low), leads_down & (found | (low > 0))


def _remembered(old: Array, new: Array, useful: Array) -> Array:
    if not len(old):
        return old
    return jnp.where(useful, jnp.concatenate([old[1:], new[None]]), old)
