"""The judge's derivative beside the function itself, along a line, in decimals.

With 120 digits a step may be so short that nothing smooth bends along it: its slope
before and behind the point is the derivative, or there is none. In a random line each
coordinate has the share of the slope that makes it count as much as any other, so a
rule that is wrong in a single entry, however small, shows.
"""

import decimal
from collections.abc import Sequence
from decimal import Decimal
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jax_softmax._gradient_decimals import DIGITS
from jax_softmax._gradient_digits import CONTEXT, Program, decimals
from jax_softmax._gradient_methods import Arrays, Matrices, Problem, quiet

_STEPS = Decimal("1e-20"), Decimal("1e-25")  # of a coordinate, and of the least
_ZERO = Decimal(0)
_LEAST_COORDINATE = Decimal("1e-12")
_LEAST_ENTRY = 1e-10  # of the largest: below it an entry counts for less
_PRECISE = decimal.Context(
    prec=2 * DIGITS, Emin=CONTEXT.Emin, Emax=CONTEXT.Emax, traps=[]
)
_NOISE = Decimal(10) ** (
    20 - 2 * DIGITS
)  # of values, twenty digits of which may cancel
_EPS64 = float(np.finfo(np.float64).eps)


class Slope(NamedTuple):
    """Along a line, for each entry of the outputs: the function's, and the judge's."""

    true: np.ndarray
    judged: np.ndarray
    kinked: np.ndarray
    """Where the slope before the point is not the one behind it."""
    far: np.ndarray
    """Where the judge's is another, by what the arguments' own types could tell."""

    @property
    def sound(self) -> bool:
        return not (self.kinked.any() or self.far.any())


@quiet()
def along_a_line(
    problem: Problem, exact: Matrices, types: Sequence[Any], seed: int
) -> Slope | None:
    """The function's slope in the direction of the problem, or in a random one.

    None where the function is not finite on the way.

    Raises:
        Unsupported: decimals cannot do it, or not in time.
    """
    moving, fixed = problem.moving, problem.fixed
    program = Program(problem.mapping, moving, fixed)
    exact = [np.nan_to_num(matrix, posinf=0, neginf=0) for matrix in exact]
    places = [Decimal(max(float(jnp.finfo(t).eps) / 4, 32 * _EPS64)) for t in types]
    with decimal.localcontext(_PRECISE):
        start = [decimals(leaf) for leaf in moving]
        rest = [decimals(leaf) for leaf in jax.tree.leaves(fixed)]
        terms, each = [decimals(matrix) for matrix in exact], 1
        if problem.direction is not None:
            v = [decimals(np.asarray(leaf)) for leaf in problem.direction]
        else:
            v = [decimals(leaf) for leaf in _weights(moving, exact, seed)]
            each = len(v)
            terms = [t * v[i % each].ravel() for i, t in enumerate(terms)]
        judged = _added(terms, each)
        # What rounding the terms to the arguments' own types may change.
        sizes = [abs(t) * places[i % len(places)] for i, t in enumerate(terms)]
        room = _added(sizes, each)
        reach = max(map(_reach, start, v))
        if reach == 0:
            return None

        def values(t: Decimal) -> Any:
            moved = [x + along * (t / reach) for x, along in zip(start, v, strict=True)]
            return np.concatenate([out.ravel() for out in program([*moved, *rest])])

        here, slope, gaps = values(_ZERO), judged, []
        for step in _STEPS:
            behind, before = values(step), values(-step)
            if not all(map(Decimal.is_finite, behind + before + here)):
                return None
            slope = (behind - before) / (2 * step) * reach
            gaps.append(abs(behind + before - 2 * here) / step * reach)
        wide, close = gaps
        room = room + max(*abs(here), Decimal(1)) * reach / _STEPS[-1] * _NOISE
        # What bends smoothly bends less on the shorter step.
        kinked = (close > wide / 2) & (close > room)
        far = abs(slope - judged) > room + close
    return Slope(
        slope.astype(float), judged.astype(float), kinked.astype(bool), far.astype(bool)
    )


def _weights(moving: Arrays, exact: Matrices, seed: int) -> list[np.ndarray]:
    """A random direction in which all entries of the derivative add much the same."""
    random, found = np.random.default_rng(seed), []
    for leaf, array in enumerate(moving):
        array = np.asarray(array)
        blocks = exact[leaf :: len(moving)]
        sizes = np.max([np.max(np.abs(block), axis=0) for block in blocks], axis=0)
        largest = np.max(sizes, initial=0.0) or 1.0
        drawn = random.uniform(0.5, 1.5, sizes.size) * random.choice(
            [-1, 1], sizes.size
        )
        weights = drawn / np.maximum(sizes / largest, _LEAST_ENTRY) / largest
        found.append(np.where(np.isfinite(array), weights.reshape(array.shape), 0.0))
    return found


def _added(terms: Sequence[Any], each: int) -> Any:
    """The sum of each row, over as many matrices as belong to one output."""
    rows = [term.sum(axis=1) for term in terms]
    return np.concatenate(
        [sum(rows[first : first + each]) for first in range(0, len(rows), each)]
    )


def _reach(x: Any, along: Any) -> Decimal:
    """How far a step of 1 goes, by the coordinate that goes farthest for its size."""
    steps = zip(x.ravel(), along.ravel(), strict=True)
    return max(
        abs(v) / max(abs(at), _LEAST_COORDINATE) if v else _ZERO for at, v in steps
    )
