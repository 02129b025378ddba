"""What compare_gradients found: errors in ULP, a table, a dict, a test that fails."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

EVIDENCE = ("central", "richardson", "complex step")
"""Methods that witness for the judge; shown, but raise_if does not ask them."""
METHODS = ("reverse", "forward", *EVIDENCE)


class Block(NamedTuple):
    """One matrix of the derivative: name, leaf, full shape and the leaf's type."""

    name: str
    leaf: int
    shape: tuple[int, ...]
    dtype: Any

    def place(self, row: Any, column: Any, rows: int) -> tuple[int, ...]:
        """Where an entry of the matrix, which has so many rows, is in full shape."""
        flat = int(row) * (math.prod(self.shape) // rows) + int(column)
        return tuple(int(i) for i in np.unravel_index(flat, self.shape))


class GradientRow(NamedTuple):
    """How one method does on one leaf.

    `max_ulp` is at `at`, where the method gave `got` and the judge `exact`. `checked`
    of the `size` entries were compared, and `largest` is the leaf's largest |exact|.
    Relative errors are entry by entry.
    """

    leaf: str
    method: str
    dtype: str
    checked: int
    size: int
    max_ulp: float
    median_ulp: float
    max_abs: float
    median_abs: float
    max_rel: float
    median_rel: float
    at: tuple[int, ...]
    got: float
    exact: float
    largest: float


class GradientReport(NamedTuple):
    """Every method on every leaf, and what there is to say about the comparison.

    `doubts` are reasons not to trust the judge: a kink, a custom rule that its own
    function contradicts, a float64 run that is not in float64. `notes` are the rest:
    how the judge was run, what was probed, which methods do not apply and why.

    `print(report)` shows an aligned table.
    """

    rows: tuple[GradientRow, ...]
    doubts: tuple[str, ...]
    notes: tuple[str, ...]

    def __str__(self) -> str:
        head = ("leaf", "method", "entries", "max ULP", "median", "max abs", "max rel")
        lines = [(*head, "at", "got", "exact"), *(_cells(row) for row in self.rows)]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        table = [
            "  ".join(
                # Words to the left, numbers to the right.
                cell.ljust(width) if place < 2 else cell.rjust(width)
                for place, (cell, width) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in lines
        ]
        table.insert(1, "-" * max(map(len, table)))
        doubts = [f"DOUBT: {doubt}" for doubt in self.doubts]
        return "\n".join([*table, *doubts, *(f"note: {note}" for note in self.notes)])

    def row(self, leaf: str, method: str) -> GradientRow:
        """The row of one leaf and method.

        Raises:
            KeyError: there is no such row; the message lists those that there are.
        """
        for row in self.rows:
            if (row.leaf, row.method) == (leaf, method):
                return row
        known = ", ".join(f"({row.leaf!r}, {row.method!r})" for row in self.rows)
        raise KeyError(f"no row ({leaf!r}, {method!r}); the report has {known}")

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, strings and numbers, which strict JSON takes.

        An infinite or undefined number becomes the string that float() reads back.
        """
        rows = [
            {name: _plain(value) for name, value in row._asdict().items()}
            for row in self.rows
        ]
        return {"rows": rows, "doubts": list(self.doubts), "notes": list(self.notes)}

    def raise_if(
        self,
        *,
        ulp: float | int,
        methods: str | Sequence[str] | None = None,
        ignore_doubts: bool = False,
    ) -> None:
        """Fail a test unless every entry is within `ulp` of the judge.

        Args:
            ulp: the largest error allowed, in ULP of the exact entry, as in max_ulp.
            methods: the methods to ask; None asks all but differences and the complex
                step, which are there as witnesses.
            ignore_doubts: pass even if the judge is in doubt.

        Raises:
            AssertionError: an entry is too far off, or the judge is in doubt.
            ValueError: no method is named, or one that is not in the report; or ulp is
                below 0.
        """
        if not ulp >= 0:
            raise ValueError(f"ulp: got {ulp}, wanted at least 0")
        if isinstance(methods, str):
            methods = [methods]
        known = {row.method for row in self.rows}
        asked = known - set(EVIDENCE) if methods is None else set(methods)
        if not asked or asked - known:
            raise ValueError(
                f"methods: got {sorted(asked)}, wanted some of {sorted(known)}"
            )
        wrong = [
            row for row in self.rows if row.method in asked and not row.max_ulp <= ulp
        ]
        doubts = () if ignore_doubts else self.doubts
        if not wrong and not doubts:
            return
        lines = [_complaint(row, ulp) for row in wrong]
        lines += [f"in doubt: {doubt}" for doubt in doubts]
        raise AssertionError("\n".join([*lines, "", str(self)]))


def errors_in_ulp(
    got: ArrayLike, exact: ArrayLike, dtype: Any, floor: float | int = 0.0
) -> np.ndarray:
    """|got - exact| / spacing(exact), the distance of neighbours of `exact` in `dtype`.

    Equal entries, infinities and NaNs included, are 0 ULP apart, and a finite and a
    non-finite one infinitely many; but infinity is right where `exact` does not fit.
    XLA flushes subnormal results to 0, so below the smallest normal number the spacing
    is that number (float16 keeps its subnormals).

    Args:
        got: what a method gave.
        exact: the reference, in float64.
        dtype: the type whose spacing is the unit.
        floor: entries smaller than `floor` times the largest are measured in the
            spacing at that size. 0 hides nothing; 1 is in ULP of the largest entry.

    >>> print(errors_in_ulp(np.array([1 + 2**-23]), np.array([1.0]), np.float32))
    [1.]
    """
    got, exact = np.asarray(got, np.float64), np.asarray(exact, np.float64)
    kind = jnp.finfo(dtype)
    size = np.abs(np.where(np.isfinite(exact), exact, 0.0))
    size = np.maximum(size, floor * np.max(size, initial=0.0))
    tiny = float(kind.smallest_normal)
    exponent = np.frexp(np.maximum(size, tiny))[1] - 1
    spacing = np.ldexp(1.0, exponent - kind.nmant)
    if jnp.dtype(dtype) != jnp.float16:
        spacing = np.where(size < tiny, tiny, spacing)
    with np.errstate(invalid="ignore", over="ignore"):
        ulps = np.abs(got - exact) / spacing
        rounded = exact.astype(dtype).astype(np.float64)
    same = (got == exact) | (np.isnan(got) & np.isnan(exact))
    same |= np.isinf(got) & (got == rounded)
    return np.where(same, 0.0, np.where(np.isfinite(ulps), ulps, np.inf))


def measure(
    block: Block,
    method: str,
    got: np.ndarray,
    exact: np.ndarray,
    columns: np.ndarray,
    floor: float | int,
) -> GradientRow:
    """The row for `got`, the named columns of the judge's matrix `exact`."""
    wanted = exact[:, columns]
    largest = float(np.max(np.abs(exact), initial=0.0, where=np.isfinite(exact)))
    # The floor is a share of the leaf's largest entry, probed or not.
    beside = np.append(wanted, largest)
    ulps = errors_in_ulp(np.append(got, largest), beside, block.dtype, floor)[:-1]
    with np.errstate(invalid="ignore", divide="ignore"):
        error = np.abs(got - wanted).ravel()
        error = np.where(ulps == 0, 0.0, np.where(np.isnan(error), np.inf, error))
        relative = error / np.abs(wanted).ravel()
        relative = np.where(np.isnan(relative), error, relative)
    worst = int(np.argmax(ulps))
    row, column = np.unravel_index(worst, wanted.shape)
    return GradientRow(
        leaf=block.name,
        method=method,
        dtype=str(jnp.dtype(block.dtype)),
        checked=wanted.size,
        size=exact.size,
        max_ulp=float(ulps[worst]),
        median_ulp=float(np.median(ulps)),
        max_abs=float(np.max(error)),
        median_abs=float(np.median(error)),
        max_rel=float(np.max(relative)),
        median_rel=float(np.median(relative)),
        at=block.place(row, columns[column], len(exact)),
        got=float(got.ravel()[worst]),
        exact=float(wanted.ravel()[worst]),
        largest=largest,
    )


def _cells(row: GradientRow) -> tuple[str, ...]:
    all_checked = row.checked == row.size
    entries = f"{row.checked}" if all_checked else f"{row.checked}/{row.size}"
    errors = (row.max_ulp, row.median_ulp, row.max_abs, row.max_rel)
    return (
        row.leaf,
        row.method,
        entries,
        *(f"{error:.3g}" for error in errors),
        str(list(row.at)),
        f"{row.got:.7g}",
        f"{row.exact:.7g}",
    )


def _complaint(row: GradientRow, ulp: float | int) -> str:
    where, digits = f"{row.leaf}{list(row.at)}", 17 if row.dtype == "float64" else 9
    text = (
        f"{row.method} of {where} is {row.max_ulp:.4g} ULP off, wanted <= {ulp:g}: "
        f"got {row.got:.{digits}g}, exact {row.exact:.{digits}g}"
    )
    if 0 < row.max_abs < math.inf and abs(row.exact) < 1e-3 * row.largest:
        text += (
            f" (small beside the leaf's largest, {row.largest:.3g}: if it is a sum "
            "that cancels, floor=1 measures in ULP of the largest)"
        )
    return text


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return list(value)
    infinite_or_nan = isinstance(value, float) and not math.isfinite(value)
    return str(value) if infinite_or_nan else value
