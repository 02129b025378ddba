"""What compare_gradients has to say beside its numbers: hints, notes and doubts."""

import inspect
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_softmax._gradient_decimals import DIGITS
from jax_softmax._gradient_judge import (
    Judgement,
    Witness,
    float64,
    largest,
    narrowing,
    operations,
    widened,
)
from jax_softmax._gradient_line import Slope
from jax_softmax._gradient_methods import Columns, Matrices, Problem
from jax_softmax._gradient_report import Block


@np.errstate(all="ignore")
def agrees(found: Matrices, seen: Witness) -> bool:
    """Whether two ways that know nothing of autodiff tell the same story."""
    for i, (found_here, slopes) in enumerate(zip(found, seen.slopes, strict=True)):
        room = 1e-3 * largest(slopes)
        near = np.abs(found_here - slopes) <= room + 10 * seen.trust[i]
        near |= np.abs(found_here - seen.close(i)) <= room
        if np.any(np.isfinite(slopes) & ~near):
            return False
    return True


@np.errstate(all="ignore")
def diagnosis(form: str, block: Block, got: np.ndarray, exact: np.ndarray) -> list[str]:
    """What a wrong closed form looks like from afar: a factor, a sign, a transpose."""
    large = np.isfinite(exact) & np.isfinite(got)
    large &= np.abs(exact) > 1e-2 * largest(exact)
    if not np.any(large):
        return []
    ratios = got[large] / exact[large]
    factor = float(np.median(ratios))
    if np.ptp(ratios) <= 1e-2 * abs(factor) and abs(factor - 1) > 2e-2:
        what = "minus" if abs(factor + 1) < 1e-2 else f"{factor:.4g} times"
        small = np.isfinite(exact) & ~large & (exact != 0)
        alike = abs(got[small] / exact[small] - factor) <= 1e-2 * abs(factor)
        where = "everywhere" if np.all(alike) else "in its large entries"
        return [f"{form} of {block.name} is {what} the judge's {where}"]
    if len(block.shape) == 2 and block.shape[0] == block.shape[1] and got.size > 1:
        square, other = got.reshape(block.shape), exact.reshape(block.shape)
        if _near(square.T, other) and not _near(square, other):
            return [f"{form} of {block.name} is the transpose of the judge's"]
    return []


def _near(got: np.ndarray, exact: np.ndarray) -> bool:
    """Alike to 1 % of the largest entry, and infinite or NaN in the same places."""
    finite = np.isfinite(exact)
    if not np.array_equal(got[~finite], exact[~finite], equal_nan=True):
        return False
    return bool(np.all(np.abs(got - exact)[finite] <= 1e-2 * largest(exact)))


@np.errstate(all="ignore")
def about_the_judge(
    judged: Problem, own: Problem, given: bool, short_of_decimals: str | None
) -> list[str]:
    """How the judge was run, and whether it ran the same function."""
    who = "the judge's own function" if given else "the function"
    how = f"in {DIGITS} decimal digits"
    if short_of_decimals:
        how = f"in float64 (not in decimals: {short_of_decimals})"
    if all(array.dtype == np.float64 for array in own.moving):
        notes = [f"judge: reverse mode of {who} {how}"]
        if short_of_decimals:
            notes[0] += (
                ". The arguments are float64 themselves: errors of a few ULP cannot be "
                "told from the judge's own"
            )
        return notes
    on = jnp.zeros(()).dtype == np.float64
    was = "was on already" if on else "is off outside, as before"
    notes = [
        f"judge: reverse mode of {who} {how}, as {own.moving[0].dtype} cannot judge "
        f"itself; x64 was needed: inside this call, by jax.enable_x64; it {was}"
    ]
    with float64():
        wide = widened(judged)
        right = [np.asarray(v) for v in wide.mapping(wide.moving, wide.fixed)]
    left = [np.asarray(v, np.float64) for v in own.mapping(own.moving, own.fixed)]
    for got, value in zip(left, right, strict=False):
        if got.shape == value.shape and not _near(got, value):
            worst = np.unravel_index(np.argmax(np.abs(got - value)), got.shape)
            notes.append(
                f"the value itself is {got[worst]:.6g} in {own.moving[0].dtype} and "
                f"{value[worst]:.6g} in float64: digits are lost, or it is another "
                "function there"
            )
            break
    return notes


def _equal(one: Any, other: Any) -> bool:
    try:
        return np.array_equal(np.asarray(one), np.asarray(other), equal_nan=True)
    except TypeError:  # keys have no numbers
        return bool(np.all(one == other))


def draws_others(judged: Problem) -> list[str]:
    """A doubt, if other random numbers are drawn in float64, or at every call."""

    def traced(problem: Problem) -> Any:
        def again(*args: Any) -> Any:  # or JAX keeps what it has traced before
            return inspect.unwrap(problem.mapping)(*args)

        return jax.make_jaxpr(again)(problem.moving, problem.fixed)

    def drawn(program: Any) -> list[Any]:
        found = operations(program.jaxpr)
        return [e.params for e in found if e.primitive.name == "random_bits"]

    def printed(program: Any) -> str:
        return re.sub(r"0x[0-9a-f]+", "", str(program))  # where a rule is in memory

    first, second = traced(judged), traced(judged)
    same = printed(first) == printed(second) and all(
        map(_equal, first.consts, second.consts)
    )
    remedy = "draw them outside and pass them as an argument"
    if not same:
        return [
            "the function is another one each time that it is traced, as with random "
            f"numbers of NumPy's or Python's: {remedy}"
        ]
    with float64():
        if drawn(traced(widened(judged))) == drawn(first):
            return []
    return [
        "the function draws random numbers, and others in float64, where the judge is: "
        f"{remedy}"
    ]


@np.errstate(all="ignore")
def doubts(
    judged: Problem,
    blocks: Sequence[Block],
    columns: Columns,
    judgement: Judgement,
    seen: Witness,
    notes: list[str],
) -> list[str]:
    """Reasons why no one should trust the judge here.

    Where decimals bear the judge out, float64 differences have nothing to say on that.
    Nor do they on a function that leaves float64 on the way, which decimals do not.
    """
    exact, slope = judgement.exact, judgement.slope
    narrow = narrowing(judged)
    if narrow and slope is None:
        return [
            f"the judge leaves float64 on the way ({narrow}), so it is no better than "
            "what it judges; give a judge= that does not cast"
        ]
    if narrow:
        notes.append(f"the judge leaves out a cast on the way, {narrow}")
    differences_count = not narrow and not judgement.sound
    doubts = []
    for i, block in enumerate(blocks):
        rows = len(exact[i])

        def name(place: np.ndarray, block: Block = block, rows: int = rows) -> str:
            row, column = place
            at = block.place(row, columns[block.leaf][column], rows)
            return f"{block.name}{list(at)}"

        kinks = np.argwhere(seen.kinked[i] & differences_count)
        if kinks.size:
            at = tuple(kinks[0])
            # Adding 0 turns -0 into 0.
            below, above = seen.below[i][at] + 0, seen.above[i][at] + 0
            doubts.append(
                f"not differentiable at {name(kinks[0])}: the slope is {below:.6g} "
                f"from below and {above:.6g} from above{_more(len(kinks))}"
            )
            continue
        if block.leaf in seen.crooked and differences_count:
            doubts.append(
                f"not differentiable in {block.name}: along a random line the slopes "
                "before and behind this point differ"
            )
            continue
        if undefined := int(np.isnan(exact[i]).sum()):
            doubts.append(
                f"the judge is NaN in {undefined} of {exact[i].size} entries of "
                f"{block.name}: if the function is not, give another judge="
            )
        if narrow:
            continue
        slopes, right = seen.slopes[i], exact[i][:, columns[block.leaf]]
        far = np.isfinite(slopes) & ~seen.near[i]
        # A kink beside the point spoils wide differences, but not the close ones.
        few_digits = 1e-5 * largest(right)
        beside = far & (np.abs(seen.close(i) - right) <= few_digits)
        beside &= np.abs(slopes - right) > few_digits
        if np.any(beside):
            notes.append(
                f"a kink or a sharp bend is near {name(np.argwhere(beside)[0])}: "
                "differences reach over it and say little there"
            )
        wrong = np.argwhere(far & ~beside & differences_count)
        if wrong.size:
            at = tuple(wrong[0])
            doubts.append(
                f"float64 differences contradict the judge at {name(wrong[0])}: "
                f"{slopes[at]:.6g}, not {right[at]:.6g}; a derivative rule is wrong or "
                f"a stop_gradient hides a term{_more(len(wrong))}"
            )
    if slope is not None and not slope.sound and not doubts:
        doubts.append(_on_the_line(slope))
    return doubts


def _on_the_line(slope: Slope) -> str:
    if slope.kinked.any():
        return (
            "not differentiable: along a random line, in decimals, the slopes before "
            "and behind this point differ"
        )
    at = np.argmax(slope.far)
    return (
        "the judge is contradicted by the function in decimals, whose slope along a "
        f"random line is {slope.true[at]:.17g}, not {slope.judged[at]:.17g}: a "
        "derivative rule is wrong in some entry or a stop_gradient hides a term"
    )


def _more(count: int) -> str:
    return f" (and at {count - 1} more of the probed entries)" if count > 1 else ""
