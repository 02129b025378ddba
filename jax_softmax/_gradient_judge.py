"""The judge of compare_gradients, and what float64 differences say about it."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jax_softmax._gradient_digits import in_decimals
from jax_softmax._gradient_line import Slope, along_a_line
from jax_softmax._gradient_methods import (
    Columns,
    Matrices,
    Problem,
    along,
    best_step,
    by_line,
    one_sided,
    quiet,
    reverse,
    richardson,
)

_BEYOND_DECIMALS = (
    TypeError,
    ValueError,
    NotImplementedError,
    ArithmeticError,
    LookupError,
)


class Judgement(NamedTuple):
    """The judge's derivative, and whether the function itself bears it out."""

    exact: Matrices
    short_of_decimals: str | None
    """Why float64 has judged, where it has."""
    slope: Slope | None
    """Along a line in decimals, where they can do that."""

    @property
    def sound(self) -> bool:
        return self.slope is not None and self.slope.sound


class Witness(NamedTuple):
    """For each matrix at the probed columns: float64 differences, and kinks."""

    slopes: Matrices
    trust: Matrices
    near: Matrices
    """Whether the judge's derivative is what these slopes say, by that trust."""
    kinked: Matrices
    below: Matrices
    above: Matrices
    crooked: Sequence[int]
    """Leaves along which a random line, not a coordinate, has a kink."""

    def close(self, matrix: int) -> np.ndarray:
        """The slope from next to the point, with few digits."""
        return (self.below[matrix] + self.above[matrix]) / 2


@contextmanager
def float64() -> Iterator[None]:
    """x64 inside, the caller's setting outside.

    Arrays that a function captured stay in their type, and may meet float64 ones.
    """
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        yield


def widened(problem: Problem) -> Problem:
    """The same numbers in float64; call it inside `float64()`."""
    return jax.tree.map(
        lambda leaf: (
            jnp.asarray(np.asarray(leaf).astype(np.float64))
            if hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.floating)
            else leaf
        ),
        problem,
    )


def judgement(judged: Problem, seed: int, *, given: bool) -> Judgement:
    """By decimals where they can, and by float64 where not or a judge was given."""
    with float64():
        wide = widened(judged)
        try:
            in_float64 = reverse(wide)
        except Exception as error:
            error.add_note(
                "compare_gradients: this is the judge, on float64 arguments. Pass "
                "arrays that the function captures as arguments, or give another "
                "judge=."
            )
            raise
        if given:
            return Judgement(in_float64, "it was given, to keep its digits", None)
        try:
            exact = reverse(wide, in_decimals)
        except _BEYOND_DECIMALS as refusal:
            return Judgement(in_float64, first_line(refusal), None)
        types = [array.dtype for array in judged.moving]
        try:
            return Judgement(exact, None, along_a_line(wide, exact, types, seed))
        except _BEYOND_DECIMALS:
            return Judgement(exact, None, None)


def first_line(refusal: Exception) -> str:
    return (str(refusal).strip() or type(refusal).__name__).splitlines()[0]


@quiet()
def witness(
    judged: Problem, columns: Columns, seed: int, right: Matrices, *, sound: bool
) -> Witness:
    """What float64 differences say at the probed columns, where `right` is the judge's.

    Where they have something against it, a step may have been too long for a function
    that bends on another scale than that of max(|x|, 1): there the best of many
    decides, and random lines look for kinks beside the columns. Where the judge is
    known to be sound, neither matters.
    """
    with float64():
        wide = widened(judged)
        slopes, trust = map(list, zip(*by_line(wide, columns, richardson), strict=True))
        sides = by_line(wide, columns, one_sided)
        kinked, below, above = map(list, zip(*sides, strict=True))
        kinked = [kink.astype(bool) for kink in kinked]

        def near() -> Matrices:
            return [
                np.abs(slope - exact) <= 1e-6 * largest(exact) + 10 * room
                for slope, room, exact in zip(slopes, trust, right, strict=True)
            ]

        again = [k | ~n for k, n in zip(kinked, near(), strict=True)]
        if not sound and any(map(np.any, again)):
            for i, best in enumerate(by_line(wide, columns, best_step)):
                slopes[i] = np.where(again[i], best[0], slopes[i])
                trust[i] = np.where(again[i], best[1], trust[i])
                kinked[i] &= _bent(best)
        crooked = [] if sound or wide.direction is not None else _crooked(wide, seed)
        return Witness(slopes, trust, near(), kinked, below, above, crooked)


def largest(exact: np.ndarray) -> float:
    """The largest finite size."""
    return float(np.max(np.abs(exact), initial=0.0, where=np.isfinite(exact)))


def _crooked(wide: Problem, seed: int) -> list[int]:
    """Probed coordinates may miss a kink; a random line in all of them does not."""
    random, found = np.random.default_rng(seed), []
    for leaf, array in enumerate(wide.moving):
        direction = [np.zeros(a.shape) for a in wide.moving]
        signs = random.choice([-1.0, 1.0], array.shape)
        direction[leaf] = np.where(np.isfinite(array), signs, 0.0)
        line = along(wide, direction)
        kinked = any(np.any(kinked) for kinked, _, _ in one_sided(line))
        if kinked and any(np.any(_bent(best)) for best in best_step(line)):
            found.append(leaf)
    return found


def _bent(best: np.ndarray) -> Any:
    slope, trust, gap = best
    return gap > 1e-2 * abs(slope) + trust


def narrowing(judged: Problem) -> str | None:
    """What in the float64 run is not in float64, if anything."""
    with float64():
        wide = widened(judged)
        jaxpr = jax.make_jaxpr(wide.mapping)(wide.moving, wide.fixed).jaxpr
    for equation in operations(jaxpr):
        taken, given = (
            {v.aval.dtype for v in variables if hasattr(v.aval, "dtype")}
            for variables in (equation.invars, equation.outvars)
        )
        for dtype in given if np.dtype(np.float64) in taken else ():
            if jnp.issubdtype(dtype, jnp.inexact) and jnp.finfo(dtype).bits < 64:
                return f"{equation.primitive} to {dtype}"
    return None


def operations(jaxpr: Any) -> Iterator[Any]:
    """The equations of a program, and of those inside its calls, loops and choices."""
    for equation in jaxpr.eqns:
        params = jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda p: hasattr(p, "eqns")
        )
        bodies = [getattr(param, "jaxpr", param) for param in params]
        bodies = [body for body in bodies if hasattr(body, "eqns")]
        for body in bodies:
            yield from operations(body)
        if not bodies:
            yield equation
