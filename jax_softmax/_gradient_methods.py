"""Ways to a derivative: reverse, forward, differences, complex step; and kinks.

A mapping takes (moving, fixed), two lists of arrays, to a list of arrays. Its
derivatives are matrices, one for each output and moving leaf (in that order), with the
output's entries down and the leaf's across. All ways but reverse mode walk along lines,
one for each column, and find a vector for each output.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Arrays = Sequence[Any]
Mapping = Callable[[Arrays, Arrays], list[Any]]
Matrices = list[np.ndarray]
Columns = Sequence[np.ndarray]


class Problem(NamedTuple):
    """A mapping, where it is, and a direction if only its product is wanted.

    With a direction the derivative is one column for each output; without one it is a
    matrix for each output and moving leaf, of which some columns are probed.
    """

    mapping: Mapping
    moving: Arrays
    fixed: Arrays
    direction: Arrays | None


@contextmanager
def quiet() -> Iterator[None]:
    """A step may leave the function's domain: no warning, and no error, comes of it."""
    with np.errstate(all="ignore"), jax.debug_nans(False):
        yield


class Line(NamedTuple):
    """A straight line through the point: of each leaf these places move, so fast."""

    problem: Problem
    speeds: dict[int, tuple[np.ndarray, np.ndarray]]
    size: float
    """The largest number of these leaves."""

    @property
    def eps(self) -> float:
        moving = self.problem.moving
        return max(float(jnp.finfo(moving[leaf].dtype).eps) for leaf in self.speeds)

    def moved(self, arrays: Arrays, by: Callable[[np.ndarray], Any]) -> list[Any]:
        """Copies of the arrays, each moving entry put `by` of its speed further."""
        moved = list(arrays)
        for leaf, (places, speed) in self.speeds.items():
            # In NumPy: a copy costs less than a compiled update for every shape.
            moved[leaf] = array = np.array(arrays[leaf], order="C")
            flat = array.reshape(-1)
            # Complex numbers stay, and all others are rounded from float64 only.
            flat[places] = (flat[places] + by(speed)).astype(array.dtype)
        return moved

    def sample(self, multiples: Sequence[float]) -> tuple[list[np.ndarray], np.ndarray]:
        """values[output]: [points, entries], and how far each point is in truth.

        In multiples of a natural length, max(median |moving entry|, 1) / sqrt(||v||): a
        function that adds all entries up feels a step of ||v||, one that keeps them
        apart a step of 1; the root is between the two.
        """
        mapping, moving, fixed, _ = self.problem
        start = self.entries(moving)
        finite = np.isfinite(start)
        speed = np.concatenate([speed for _, speed in self.speeds.values()])
        speed = np.where(finite, speed, 0)
        length = max(1.0, np.median(np.abs(start[finite])) if finite.any() else 1.0)
        length /= np.sqrt(np.linalg.norm(speed))
        values, offsets = [], []
        for t in np.multiply(multiples, length):
            moved = self.moved(moving, lambda v, t=t: t * v)
            values.append([wide(output).ravel() for output in mapping(moved, fixed)])
            gone = np.where(finite, self.entries(moved) - start, 0)
            offsets.append(gone @ speed / (speed @ speed))
        return [np.stack(o) for o in zip(*values, strict=True)], np.array(offsets)

    def entries(self, arrays: Arrays) -> np.ndarray:
        """Those entries of the arrays that move."""
        found = [
            np.asarray(arrays[leaf]).reshape(-1)[places]
            for leaf, (places, _) in self.speeds.items()
        ]
        return np.concatenate([wide(entries) for entries in found])


def along(problem: Problem, direction: Arrays) -> Line:
    """The line on which all entries move in a direction."""
    speeds = [wide(v).ravel() for v in direction]
    moving = {i: (np.flatnonzero(v), v[v != 0]) for i, v in enumerate(speeds)}
    return Line(problem, moving, max(map(_size, problem.moving)))


def coordinates(problem: Problem, leaf: int, places: np.ndarray) -> list[Line]:
    """The lines on which one entry of a leaf moves."""
    size = _size(problem.moving[leaf])
    return [Line(problem, {leaf: (at, np.ones(1))}, size) for at in places[:, None]]


def by_line(
    problem: Problem, columns: Columns, way: Callable[[Line], Sequence[np.ndarray]]
) -> Matrices:
    """A way's vectors as columns: along the direction, or the probed coordinates."""
    if problem.direction is not None:
        groups = [[along(problem, problem.direction)]]
    else:
        groups = [coordinates(problem, *probed) for probed in enumerate(columns)]
    found = [zip(*map(way, lines), strict=True) for lines in groups]
    return [np.stack(o, axis=-1) for output in zip(*found, strict=True) for o in output]


def reverse(problem: Problem, run: Callable[..., Any] = jax.jit) -> Matrices:
    """Reverse mode: jax.grad of a scalar, jax.jacrev of anything else.

    Of a product with a direction, reverse over what the mapping does.
    """
    mapping, moving, fixed, direction = problem
    if direction is not None:

        def product(moving: Arrays, fixed: Arrays) -> list[Any]:
            inner, vector = fixed
            pairs = zip(mapping(moving, inner), vector, strict=True)
            return [sum(jnp.sum(leaf * v) for leaf, v in pairs)]

        rows = reverse(Problem(product, moving, [fixed, direction], None), run)
        return [row.T for row in rows]
    outputs = jax.eval_shape(mapping, moving, fixed)
    if len(outputs) == 1 and outputs[0].shape == ():
        gradient = run(jax.grad(lambda *arrays: mapping(*arrays)[0]))
        return [wide(leaf).reshape(1, -1) for leaf in gradient(moving, fixed)]
    rows = run(jax.jacrev(mapping))(moving, fixed)
    return [
        wide(block).reshape(output.size, -1)
        for output, blocks in zip(outputs, rows, strict=True)
        for block in blocks
    ]


def forward(problem: Problem, columns: Columns) -> Matrices:
    """Forward mode, one column at a time."""
    zeros = [np.zeros_like(np.asarray(array)) for array in problem.moving]

    @jax.jit
    def push(moving: Arrays, fixed: Arrays, tangent: Arrays) -> list[Any]:
        mapping = lambda leaves: problem.mapping(leaves, fixed)  # noqa: E731
        return jax.jvp(mapping, (moving,), (tangent,))[1]

    def way(line: Line) -> list[np.ndarray]:
        tangent = line.moved(zeros, lambda v: v)
        outputs = push([*problem.moving], problem.fixed, tangent)
        return [wide(output).ravel() for output in outputs]

    return by_line(problem, columns, way)


@quiet()
def complex_step(problem: Problem, columns: Columns) -> Matrices:
    """Im f(x + ihv) / h: no difference, so no cancellation.

    Source: Squire & Trapp (1998), SIAM Review 40(1).

    Raises:
        whatever the function has against complex numbers.
    """
    moving = [
        np.asarray(array).astype(np.promote_types(array.dtype, np.complex64))
        for array in problem.moving
    ]
    step = max(float(jnp.finfo(array.dtype).eps) for array in moving) ** 2

    def way(line: Line) -> list[np.ndarray]:
        points = line.moved(moving, lambda v: 1j * step * v)
        outputs = problem.mapping(points, problem.fixed)
        if not all(map(jnp.iscomplexobj, outputs)):
            raise TypeError("its output is real where its input is complex")
        return [wide(np.imag(output)).ravel() / step for output in outputs]

    with warnings.catch_warnings(), jax.numpy_dtype_promotion("standard"):
        warnings.simplefilter("ignore")
        return by_line(problem, columns, way)


def central(line: Line, step: float | None = None) -> Matrices:
    """(f(x + h) - f(x - h)) / 2h, with the h that rounding left."""
    h = step or line.eps ** (1 / 3)
    values, offsets = line.sample([h, -h])
    return [(f[0] - f[1]) / (offsets[0] - offsets[1]) for f in values]


def richardson(line: Line, step: float | None = None) -> Matrices:
    """(4 D(h / 2) - D(h)) / 3 with D the central difference, and how far to trust it.

    The h^2 terms of the two cancel and an error of h^4 is left (Richardson, 1911); the
    uncertainty is the distance of the two and the rounding of the values, and of
    numbers of the leaves' size on the way to them.
    """
    h = step or line.eps ** (1 / 5)
    values, offsets = line.sample([h, -h, h / 2, -h / 2])
    width = offsets[0] - offsets[1], offsets[2] - offsets[3]
    found = []
    for f in values:
        coarse, fine = (f[0] - f[1]) / width[0], (f[2] - f[3]) / width[1]
        largest = np.maximum(np.max(np.abs(f), axis=0), line.size)
        rounding = 32 * line.eps * largest / np.abs(width[1])
        found.append(
            np.stack([(4 * fine - coarse) / 3, np.abs(fine - coarse) + rounding])
        )
    return found


def best_step(line: Line) -> Matrices:
    """Richardson's slope by the step that is to be trusted most, how far, and how the
    slopes before and behind the point differ on that step.

    That they do tells a long step, on which the rest may agree, from a short one.
    """
    tried = []
    for step in (1e-3, 1e-5, 1e-7, 1e-9, 1e-11, 1e-13, 1e-15):
        values, offsets = line.sample([0.0, step, -step])
        sides = [(f[1:] - f[:1]) / offsets[1:, None] for f in values]
        tried.append(
            [
                np.stack([*slope_and_trust, abs(above - below)])
                for slope_and_trust, (above, below) in zip(
                    richardson(line, step), sides, strict=True
                )
            ]
        )
    found = []
    for output in zip(*tried, strict=True):
        slope, trust, gap = steps = np.stack(output, axis=1)
        unsure = np.nan_to_num((trust + gap) / abs(slope), nan=np.inf)
        best = np.argmin(unsure, axis=0)
        found.append(steps[:, best, np.arange(best.size)])
    return found


def one_sided(line: Line) -> Matrices:
    """(whether kinked, slope from below, slope from above).

    Where f is smooth the two slopes differ by h f'', which falls with h. At a kink they
    differ by a constant, or at a root's branch point by a power of h between 0 and -1;
    what grows like 1 / h is rounding, or, if it is large, a jump of f. What is nearer
    than sqrt(eps) to x counts as at x.
    """
    steps = [line.eps**0.25, line.eps**0.375, line.eps**0.5]
    values, offsets = line.sample([0.0, *steps, *(-step for step in steps)])
    found = []
    for f in values:
        slopes = (f[1:] - f[:1]) / offsets[1:, None]
        above, below = slopes[:3], slopes[3:]
        gap = np.abs(above - below)
        size = np.maximum(np.abs(above[2]), np.abs(below[2]))
        noise = 64 * line.eps * np.abs(f[0]) / np.abs(offsets[3])
        steady = (gap[1] > 0.5 * gap[0]) & (gap[2] > 0.5 * gap[1])
        steady &= gap[2] < 20 * gap[1]
        kinked = steady & (gap[2] > np.maximum(1e-3 * size, noise))
        jump = np.abs(f[1:4] - f[4:])
        jumped = (jump[1] > 0.5 * jump[0]) & (jump[2] > 0.5 * jump[1])
        jumped &= jump[2] > 1e-6 * np.max(np.abs(f), axis=0)
        found.append(np.stack([kinked | jumped, below[2], above[2]]))
    return found


def wide(array: Any) -> np.ndarray:
    return np.asarray(array).astype(np.float64)


def _size(array: Any) -> float:
    array = wide(array)
    return float(np.max(np.abs(array), initial=0.0, where=np.isfinite(array)))
