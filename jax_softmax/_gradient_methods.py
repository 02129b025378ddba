"""Ways to a derivative: reverse, forward, differences, complex step; and kinks.

A mapping takes (moving, fixed), two lists of arrays, to a list of arrays. Its
derivatives are matrices, one for each output and moving leaf (in that order), with the
output's entries down and the leaf's across: [outputs, columns]. A Sampler walks along
one line per column, which is all that differences need.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Arrays = Sequence[Any]
Mapping = Callable[[Arrays, Arrays], list[Any]]
Matrices = list[np.ndarray]


class Samples(NamedTuple):
    """values[output]: [points, outputs, columns] at offsets: [points, columns]."""

    values: list[np.ndarray]
    offsets: np.ndarray


Sampler = Callable[[Sequence[float]], Samples]
"""Multiples of a natural length, 0 for the point itself, to values there."""


def reverse_matrices(
    mapping: Mapping, moving: Arrays, fixed: Arrays, run: Callable[..., Any] = jax.jit
) -> Matrices:
    """Reverse mode: jax.grad of a scalar, jax.jacrev of anything else."""
    outputs = jax.eval_shape(mapping, moving, fixed)
    if len(outputs) == 1 and outputs[0].shape == ():
        gradient = run(jax.grad(lambda *arrays: mapping(*arrays)[0]))
        return [_wide(leaf).reshape(1, -1) for leaf in gradient(moving, fixed)]
    rows = run(jax.jacrev(mapping))(moving, fixed)
    return [
        _wide(block).reshape(output.size, -1)
        for output, blocks in zip(outputs, rows, strict=True)
        for block in blocks
    ]


def forward_along(
    mapping: Mapping, moving: Arrays, fixed: Arrays, tangent: Arrays
) -> Matrices:
    """Forward mode along one tangent: a column for each output."""
    pushed = _pushforward(mapping)(moving, fixed, tangent)
    return [_wide(output).reshape(-1, 1) for output in pushed]


def forward_columns(
    mapping: Mapping, moving: Arrays, fixed: Arrays, leaf: int, columns: np.ndarray
) -> Matrices:
    """Forward mode, one column of a leaf's matrix at a time."""
    pushforward = _pushforward(mapping)
    zeros = [np.zeros_like(np.asarray(array)) for array in moving]
    found = []
    for column in columns:
        tangent = list(zeros)
        tangent[leaf] = _replaced(zeros[leaf], column, 1)
        found.append([_wide(o).ravel() for o in pushforward(moving, fixed, tangent)])
    return [np.stack(output, axis=-1) for output in zip(*found, strict=True)]


def coordinate_sampler(
    mapping: Mapping, moving: Arrays, fixed: Arrays, leaf: int, columns: np.ndarray
) -> Sampler:
    """Lines along coordinates, in the leaf's own type; length: max(|coordinate|, 1)."""
    array = np.asarray(moving[leaf])
    start = array.reshape(-1)[columns]
    here = _real(start)
    length = np.maximum(np.abs(here), 1.0)

    def sample(multiples: Sequence[float]) -> Samples:
        points = [(here + t * length).astype(start.dtype) for t in multiples]
        found = [
            [_values(mapping, moving, fixed, leaf, array, *point) for point in places]
            for places in (zip(columns, row, strict=True) for row in points)
        ]
        values = [
            np.stack([np.stack([c[output] for c in row], -1) for row in found])
            for output in range(len(found[0][0]))
        ]
        return Samples(values, np.stack([_real(row) - here for row in points]))

    return sample


def line_sampler(
    mapping: Mapping, moving: Arrays, fixed: Arrays, direction: Arrays
) -> Sampler:
    """One line along a direction v; length: max(median |entry|, 1) / sqrt(||v||).

    A function that adds all entries up feels a step of ||v||, one that keeps them apart
    a step of 1; the root is between the two.
    """
    entries = np.concatenate([np.abs(_real(np.asarray(a))).ravel() for a in moving])
    finite = entries[np.isfinite(entries)]
    norm = np.sqrt(sum(float(np.sum(_wide(v) ** 2)) for v in direction))
    length = max(1.0, float(np.median(finite)) if finite.size else 1.0)
    length /= np.sqrt(norm) or 1.0

    def sample(multiples: Sequence[float]) -> Samples:
        offsets = np.asarray(multiples) * length
        found = [
            [
                _wide(output).reshape(-1, 1)
                for output in mapping(
                    [
                        np.asarray(a) + np.asarray(t).astype(a.dtype) * np.asarray(v)
                        for a, v in zip(moving, direction, strict=True)
                    ],
                    fixed,
                )
            ]
            for t in offsets
        ]
        values = [np.stack(output) for output in zip(*found, strict=True)]
        return Samples(values, offsets[:, None])

    return sample


def central(sampler: Sampler, step: float) -> Matrices:
    """(f(x + h) - f(x - h)) / 2h, with the h that rounding left."""
    values, offsets = sampler([step, -step])
    with np.errstate(invalid="ignore"):
        return [(f[0] - f[1]) / (offsets[0] - offsets[1]) for f in values]


def richardson(
    sampler: Sampler, step: float, eps: float, size: float = 0.0
) -> list[tuple[np.ndarray, np.ndarray]]:
    """(4 D(h / 2) - D(h)) / 3 with D the central difference, and how far to trust it.

    The h^2 terms of the two cancel and an error of h^4 is left (Richardson, 1911); the
    uncertainty is the distance of the two and the rounding of the values, and of
    numbers of that size on the way to them.
    """
    values, offsets = sampler([step, -step, step / 2, -step / 2])
    width = offsets[0] - offsets[1], offsets[2] - offsets[3]
    found = []
    with np.errstate(invalid="ignore"):
        for f in values:
            coarse, fine = (f[0] - f[1]) / width[0], (f[2] - f[3]) / width[1]
            largest = np.maximum(np.max(np.abs(f), axis=0), size)
            rounding = 32 * eps * largest / np.abs(width[1])
            found.append(((4 * fine - coarse) / 3, np.abs(fine - coarse) + rounding))
    return found


def best_step(
    sampler: Sampler, eps: float, size: float
) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """For each output Richardson's slope, by the step that is to be trusted most; how
    far; and how the slopes before and behind the point differ on that step.

    That they do tells a long step, on which the rest may agree, from a short one.
    """
    tried = []
    for step in (1e-3, 1e-5, 1e-7, 1e-9, 1e-11, 1e-13, 1e-15):
        values, offsets = sampler([0.0, step, -step])
        sides = [(f[1:] - f[:1]) / offsets[1:, None] for f in values]
        slopes = richardson(sampler, step, eps, size)
        tried.append(
            [
                (slope, trust, abs(above - below))
                for (slope, trust), (above, below) in zip(slopes, sides, strict=True)
            ]
        )
    found = []
    for output in zip(*tried, strict=True):
        slope, trust, gap = map(np.stack, zip(*output, strict=True))
        unsure = np.nan_to_num((trust + gap) / abs(slope), nan=np.inf)
        best = np.argmin(unsure, axis=0)[None]
        picked = [np.take_along_axis(x, best, axis=0)[0] for x in (slope, trust, gap)]
        found.append(tuple(picked))
    return found


def one_sided(
    sampler: Sampler, eps: float
) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """For each output (kinked, slope from below, slope from above).

    Where f is smooth the two slopes differ by h f'', which falls with h. At a kink they
    differ by a constant, or at a root's branch point by a power of h between 0 and -1;
    what grows like 1 / h is rounding, or, if it is large, a jump of f. What is nearer
    than sqrt(eps) to x counts as at x.
    """
    steps = [eps**0.25, eps**0.375, eps**0.5]
    values, offsets = sampler([0.0, *steps, *(-step for step in steps)])
    found = []
    with np.errstate(invalid="ignore"):
        for f in values:
            slopes = (f[1:] - f[:1]) / offsets[1:, None]
            above, below = slopes[:3], slopes[3:]
            gap = np.abs(above - below)
            size = np.maximum(np.abs(above[2]), np.abs(below[2]))
            noise = 64 * eps * np.abs(f[0]) / np.abs(offsets[3])
            steady = (gap[1] > 0.5 * gap[0]) & (gap[2] > 0.5 * gap[1])
            steady &= gap[2] < 20 * gap[1]
            kinked = steady & (gap[2] > np.maximum(1e-3 * size, noise))
            jump = np.abs(f[1:4] - f[4:])
            jumped = (jump[1] > 0.5 * jump[0]) & (jump[2] > 0.5 * jump[1])
            jumped &= jump[2] > 1e-6 * np.max(np.abs(f), axis=0)
            found.append((kinked | jumped, below[2], above[2]))
    return found


def complex_coordinates(
    mapping: Mapping, moving: Arrays, fixed: Arrays, leaf: int, columns: np.ndarray
) -> Matrices:
    """Im f(x + ih) / h, a coordinate at a time: no difference, so no cancellation.

    Source: Squire & Trapp (1998), SIAM Review 40(1).
    """
    moving = [_complex(array) for array in moving]
    array = moving[leaf]
    step = float(jnp.finfo(array.dtype).eps) ** 2
    start = array.reshape(-1)[columns]
    found = [
        _values(mapping, moving, fixed, leaf, array, column, value + 1j * step)
        for column, value in zip(columns, start, strict=True)
    ]
    return [
        np.stack([_imaginary(o) for o in output], axis=-1) / step
        for output in zip(*found, strict=True)
    ]


def complex_along(
    mapping: Mapping, moving: Arrays, fixed: Arrays, direction: Arrays
) -> Matrices:
    """Im f(x + ihv) / h for each output, along one direction v."""
    leaves = [_complex(array) for array in moving]
    step = float(jnp.finfo(leaves[0].dtype).eps) ** 2
    outputs = mapping(
        [
            (a + 1j * step * np.asarray(v)).astype(a.dtype)
            for a, v in zip(leaves, direction, strict=True)
        ],
        fixed,
    )
    return [_imaginary(np.asarray(o)).reshape(-1, 1) / step for o in outputs]


def narrowing(jaxpr: Any) -> str | None:
    """The first primitive that takes float64 and gives a narrower float, if any."""
    for equation in jaxpr.eqns:
        params = jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda p: hasattr(p, "eqns")
        )
        inner = [getattr(param, "jaxpr", param) for param in params]
        inner = [body for body in inner if hasattr(body, "eqns")]
        for body in inner:
            if found := narrowing(body):
                return found
        taken, given = (
            {v.aval.dtype for v in variables if hasattr(v.aval, "dtype")}
            for variables in (equation.invars, equation.outvars)
        )
        for dtype in given if not inner and np.dtype(np.float64) in taken else ():
            if jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize < 8:
                return f"{equation.primitive} to {dtype}"
    return None


def _pushforward(mapping: Mapping) -> Callable[..., list[Any]]:
    def push(moving: Arrays, fixed: Arrays, tangent: Arrays) -> list[Any]:
        primals, tangents = (list(moving),), (list(tangent),)
        return jax.jvp(lambda leaves: mapping(leaves, fixed), primals, tangents)[1]

    return jax.jit(push)


def _values(
    mapping: Mapping,
    moving: Arrays,
    fixed: Arrays,
    leaf: int,
    array: Any,
    column: int | np.integer,
    value: Any,
) -> Matrices:
    moved = list(moving)
    moved[leaf] = _replaced(array, column, value)
    outputs = [np.asarray(output) for output in mapping(moved, fixed)]
    return [_real(o).ravel() if o.dtype.kind != "c" else o.ravel() for o in outputs]


def _replaced(array: np.ndarray, column: int | np.integer, value: Any) -> np.ndarray:
    # In NumPy: a copy costs less than a compiled update for every shape and type.
    moved = array.copy()
    moved.reshape(-1)[column] = value
    return moved


def _complex(array: Any) -> np.ndarray:
    array = np.asarray(array)
    return array.astype(np.complex64 if array.dtype.itemsize < 8 else np.complex128)


def _imaginary(output: np.ndarray) -> np.ndarray:
    if output.dtype.kind != "c":
        raise TypeError("its output is real where its input is complex")
    return np.imag(output).astype(np.float64)


def _real(array: np.ndarray) -> np.ndarray:
    return array.astype(np.float64)


def _wide(array: Any) -> np.ndarray:
    return _real(np.asarray(array))
