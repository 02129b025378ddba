"""The judge of compare_gradients, and what float64 differences say about it."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from jax_softmax import _gradient_methods as methods

T = TypeVar("T")
Columns = Sequence[np.ndarray]
_EPS64 = float(np.finfo(np.float64).eps)


class Problem(NamedTuple):
    """A mapping, where it is, and a direction if only its product is wanted.

    With a direction the derivative is one column for each output; without one it is a
    matrix for each output and moving leaf, of which some columns are probed.
    """

    mapping: methods.Mapping
    moving: methods.Arrays
    fixed: methods.Arrays
    direction: methods.Arrays | None


class Witness(NamedTuple):
    """For each matrix: float64 differences, how far to trust them, and kinks."""

    slopes: methods.Matrices
    trust: methods.Matrices
    kinked: methods.Matrices
    below: methods.Matrices
    above: methods.Matrices
    crooked: tuple[int, ...]
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


@contextmanager
def quiet() -> Iterator[None]:
    """A step may leave the function's domain: no warning, and no error, comes of it."""
    with np.errstate(all="ignore"), jax.debug_nans(False):
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


def reverse(problem: Problem, run: Callable[..., Any] = jax.jit) -> methods.Matrices:
    """Reverse mode; of a product with a direction, reverse over what mapping does."""
    mapping, moving, fixed, direction = problem
    if direction is None:
        return methods.reverse_matrices(mapping, moving, fixed, run)

    def product(moving: methods.Arrays, fixed: methods.Arrays) -> list[Any]:
        inner, vector = fixed
        pairs = zip(mapping(moving, inner), vector, strict=True)
        return [sum(jnp.sum(leaf * v) for leaf, v in pairs)]

    rows = methods.reverse_matrices(product, moving, [fixed, direction], run)
    return [row.T for row in rows]


def forward(problem: Problem, columns: Columns) -> methods.Matrices:
    """Forward mode, at the probed columns."""
    mapping, moving, fixed, direction = problem
    if direction is not None:
        return methods.forward_along(mapping, moving, fixed, direction)
    return _by_leaf(
        columns,
        lambda leaf, at: methods.forward_columns(mapping, moving, fixed, leaf, at),
    )


@quiet()
def differences(
    problem: Problem, columns: Columns, step: float | None
) -> dict[str, methods.Matrices]:
    """Central and Richardson differences, in the arrays' own types."""

    def central(sampler: methods.Sampler, eps: float, _: float) -> methods.Matrices:
        return methods.central(sampler, step or eps ** (1 / 3))

    def richardson(sampler: methods.Sampler, eps: float, _: float) -> methods.Matrices:
        found = methods.richardson(sampler, step or eps ** (1 / 5), eps)
        return [slope for slope, _ in found]

    return {
        "central": _sampled(problem, columns, central),
        "richardson": _sampled(problem, columns, richardson),
    }


@quiet()
def complex_step(problem: Problem, columns: Columns) -> methods.Matrices:
    """The complex step; fails with what the function has against complex numbers."""
    mapping, moving, fixed, direction = problem
    with warnings.catch_warnings(), jax.numpy_dtype_promotion("standard"):
        warnings.simplefilter("ignore")
        if direction is not None:
            return methods.complex_along(mapping, moving, fixed, direction)
        return _by_leaf(
            columns,
            lambda leaf, at: methods.complex_coordinates(
                mapping, moving, fixed, leaf, at
            ),
        )


@quiet()
def witness(
    problem: Problem, columns: Columns, seed: int, exact: methods.Matrices | None
) -> Witness:
    """What differences in float64 say at the probed columns and on random lines.

    Where they have something against `exact`, at the probed columns, a step may have
    been too long for a function that bends on another scale than that of max(|x|, 1):
    there the best of many decides.
    """
    with float64():
        wide = widened(problem)
        found = _sampled(
            wide,
            columns,
            lambda s, _, size: methods.richardson(s, _EPS64**0.2, _EPS64, size),
        )
        kinks = _sampled(wide, columns, lambda s, *_: methods.one_sided(s, _EPS64))
        slopes, trust = ([part[i] for part in found] for i in range(2))
        kinked = [part[0] for part in kinks]
        suspects = [
            k
            | ~(abs(slope - right) <= 1e-6 * np.max(abs(right), initial=0) + 10 * room)
            for k, slope, room, right in zip(
                kinked, slopes, trust, exact or slopes, strict=True
            )
        ]
        if exact is not None and any(map(np.any, suspects)):
            best = _sampled(
                wide, columns, lambda s, _, size: methods.best_step(s, _EPS64, size)
            )
            for i, (slope, room, gap) in enumerate(best):
                again, bent = suspects[i], gap > 1e-2 * abs(slope) + room
                slopes[i] = np.where(again, slope, slopes[i])
                trust[i] = np.where(again, room, trust[i])
                kinked[i] &= bent
        crooked = _crooked(wide, seed) if wide.direction is None else ()
    return Witness(
        slopes=slopes,
        trust=trust,
        kinked=kinked,
        below=[below for _, below, _ in kinks],
        above=[above for _, _, above in kinks],
        crooked=crooked,
    )


def narrowing(problem: Problem) -> str | None:
    """What in the float64 run is not in float64, if anything."""
    with float64():
        wide = widened(problem)
        jaxpr = jax.make_jaxpr(wide.mapping)(wide.moving, wide.fixed)
    return methods.narrowing(jaxpr.jaxpr)


def _crooked(wide: Problem, seed: int) -> tuple[int, ...]:
    """Probed coordinates may miss a kink; a random line in all of them does not."""
    random, found = np.random.default_rng(seed), []
    for leaf, array in enumerate(wide.moving):
        direction = [np.zeros(a.shape) for a in wide.moving]
        signs = random.choice([-1.0, 1.0], array.shape)
        direction[leaf] = np.where(np.isfinite(array), signs, 0.0)
        line = methods.line_sampler(wide.mapping, wide.moving, wide.fixed, direction)
        if not any(np.any(k) for k, _, _ in methods.one_sided(line, _EPS64)):
            continue
        best = methods.best_step(line, _EPS64, _size(array))
        if any(np.any(gap > 1e-2 * abs(s) + room) for s, room, gap in best):
            found.append(leaf)
    return tuple(found)


def _sampled(
    problem: Problem,
    columns: Columns,
    way: Callable[[methods.Sampler, float, float], list[T]],
) -> list[T]:
    """`way` of a sampler, its type's eps and its largest number, for each matrix."""
    mapping, moving, fixed, direction = problem
    eps = [float(jnp.finfo(array.dtype).eps) for array in moving]
    sizes = list(map(_size, moving))
    if direction is not None:
        line = methods.line_sampler(mapping, moving, fixed, direction)
        return way(line, max(eps), max(sizes))
    return _by_leaf(
        columns,
        lambda leaf, at: way(
            methods.coordinate_sampler(mapping, moving, fixed, leaf, at),
            eps[leaf],
            sizes[leaf],
        ),
    )


def _size(array: Any) -> float:
    array = np.asarray(array).astype(np.float64)
    return float(np.max(abs(array), initial=0.0, where=np.isfinite(array)))


def _by_leaf(columns: Columns, way: Callable[[int, np.ndarray], list[T]]) -> list[T]:
    """The matrices of each leaf, put in order: outputs first, then leaves."""
    found = [way(leaf, at) for leaf, at in enumerate(columns)]
    return [matrix for output in zip(*found, strict=True) for matrix in output]
