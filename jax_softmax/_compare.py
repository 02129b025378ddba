"""compare_gradients: autodiff, paper and differences beside 60 decimal digits."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from numbers import Integral, Real
from typing import Any

import jax
import numpy as np

from jax_softmax import _gradient_arguments as arguments
from jax_softmax import _gradient_judge as judging
from jax_softmax import _gradient_methods as methods
from jax_softmax import _gradient_remarks as remarks
from jax_softmax._gradient_methods import Problem
from jax_softmax._gradient_report import (
    EVIDENCE,
    Block,
    GradientReport,
    errors_in_ulp,
    measure,
)


def compare_gradients(
    function: Callable[..., Any],
    closed_form: Callable[..., Any] | Mapping[str, Callable[..., Any]] | None,
    *args: Any,
    argnums: int | Sequence[int] = 0,
    order: int = 1,
    cotangent: Any = None,
    tangent: Any = None,
    judge: Callable[..., Any] | None = None,
    full_jacobian: bool = False,
    probes: int = 32,
    step: float | None = None,
    floor: float | int = 0.0,
    seed: int = 0,
) -> GradientReport:
    """How far each way to a derivative of `function` is from the exact one.

    The ways are reverse mode, forward mode, the closed form, central and Richardson
    differences and a complex step; each gets a row per array. What the closed form is
    called with and returns:

        scalar function             closed_form(*args)             as jax.grad
        any other                   closed_form(*args, cotangent)  as its vjp
        order=2                     closed_form(*args, [cotangent,] tangent)  the hvp
        full_jacobian, order 1      closed_form(*args)             as jax.jacrev
        full_jacobian, order 2      closed_form(*args)             as jax.hessian

    The judge is reverse mode of `judge` (by default `function`) on the same numbers:
    its program is traced in float64, inside `jax.enable_x64(True)` (the caller's jax
    config is as it was), and run in 60 decimal digits, so that nothing which cancels in
    float64 is lost and no cast between floats rounds. Where decimals have no such
    operation (this library's exponentials work on bits) or would take more than about
    half a second, and for a judge that was given, float64 runs it; the report says so.

    A judge can be wrong as well, so it is held to the function itself. In decimals that
    is its slope along a random line, in which all entries count alike; where there are
    none, and to find the place, float64 differences at the probed entries. What they
    contradict is a doubt: raise_if fails on it. Order 2 takes the gradient on trust:
    compare that first.

    Args:
        function: of pytrees, to an array or a pytree; it is jitted. Give a judge when
            it has a rule of its own.
        closed_form: the derivative on paper; several under names in a dict; or None.
        *args: arrays, numbers or pytrees; integer leaves are never differentiated.
        argnums: what to differentiate, as for jax.grad.
        order: 1 for the gradient, 2 for the Hessian times `tangent`.
        cotangent: shaped like the function's result; by default seeded normal numbers.
        tangent: shaped like what argnums names; by default seeded normal numbers.
        judge: a plain function of the same arguments, written without cancellation.
        full_jacobian: compare the matrix and not its product with a cotangent.
        probes: how many entries of each array forward mode and differences look at,
            drawn with `seed`, the worst of the other ways among them. Their cost is
            that many evaluations, whatever the array's size. (A product with a tangent
            needs no probes: one line shows all entries.)
        step: of the differences, as a share of max(|x|, 1); by default eps^(1/3) for
            central and eps^(1/5) for Richardson, with the eps of the array's type.
        floor: entries below `floor` times an array's largest are measured in ULP at
            that size; 1 suits sums that cancel, 0 hides nothing.
        seed: of the probes, the cotangent and the tangent.

    Returns:
        A report to print, to turn into a dict, or to ask `report.raise_if(ulp=8)`.

    Raises:
        ValueError: a closed form's structure, shape or type is not its argument's.
        TypeError: there is nothing real to differentiate.

    >>> x = jnp.array([0.5, 1.5])
    >>> report = compare_gradients(lambda x: jnp.sum(x**2), lambda x: 2 * x, x)
    >>> report.raise_if(ulp=1)
    >>> report.row("x", "closed form").max_ulp
    0.0
    """
    if order not in (1, 2):
        raise ValueError(f"order: got {order}, wanted 1 or 2")
    for name, value, least in (("probes", probes, 1), ("seed", seed, 0)):
        if not isinstance(value, Integral) or value < least:
            raise ValueError(
                f"{name}: got {value!r}, wanted an integer from {least} on"
            )
    if step is not None and not (isinstance(step, Real) and 0 < step < np.inf):
        raise ValueError(f"step: got {step!r}, wanted a finite number above 0")
    if not (isinstance(floor, Real) and 0 <= floor < np.inf):
        raise ValueError(f"floor: got {floor!r}, wanted a finite number of at least 0")
    forms = arguments.forms_of(closed_form)
    random = np.random.default_rng(seed)
    args = jax.tree.map(arguments.as_array, args)
    template, names, places = arguments.differentiated(function, args, argnums)
    leaves = jax.tree.leaves(args)
    moving = [leaves[place] for place in places]
    rest = [None if i in places else leaf for i, leaf in enumerate(leaves)]

    # What the derivative is contracted with, and so what the closed form is told.
    result = jax.eval_shape(function, *args)
    scalar = isinstance(result, jax.ShapeDtypeStruct) and result.shape == ()
    if not arguments.reals(result):
        raise TypeError("function: got no floating-point result, wanted at least one")
    if judge is not None:
        arguments.judges(judge, args, result)
    if full_jacobian and order == 2 and not scalar:
        raise ValueError(
            f"full_jacobian, order=2: got {result}, wanted a scalar result"
        )
    told = {}
    for name, given, like, used in (
        ("cotangent", cotangent, result, not scalar and not full_jacobian),
        ("tangent", tangent, template, order == 2 and not full_jacobian),
    ):
        if used:
            told[name] = arguments.given_or_normal(name, given, like, random)
        elif given is not None:
            raise ValueError(f"{name}: got one, wanted none, since nothing asks for it")
    weights, direction = (
        arguments.reals(told[name]) if name in told else None
        for name in ("cotangent", "tangent")
    )

    def problem(what: Callable[..., Any]) -> Problem:
        mapping = arguments.mapping(what, args, places)
        mapping = arguments.gradient(mapping) if order == 2 else mapping
        return Problem(jax.jit(mapping), moving, [rest, weights], direction)

    own, judged = problem(function), problem(judge or function)
    outer = heads = None
    if full_jacobian and order == 1:
        outer, heads = result, arguments.outputs(result)
    elif full_jacobian:
        outer, heads = template, [*zip(names, moving, strict=True)]
    blocks = arguments.blocks_of(names, moving, heads)
    found = judging.judgement(judged, seed, given=judge is not None)
    exact = found.exact

    # First the ways that see every entry, then those that look where these are worst.
    notes: list[str] = []
    everywhere = {"reverse": methods.reverse(own)}
    for name, form in forms.items():
        output = arguments.asked(name, form, args, told)
        everywhere[name] = arguments.returned(
            name, output, outer, template, blocks, exact
        )
        for block, got, right in zip(blocks, everywhere[name], exact, strict=True):
            notes += remarks.diagnosis(name, block, got, right)
    columns = [np.arange(1)] * len(moving)
    if direction is None:
        columns = _probes(moving, blocks, everywhere, exact, probes, random)
    probed = _probed(own, columns, step, notes)
    right = [m[:, columns[b.leaf]] for m, b in zip(exact, blocks, strict=True)]
    seen = judging.witness(judged, columns, seed, right, sound=found.sound)
    if "complex step" in probed and not remarks.agrees(probed["complex step"], seen):
        del probed["complex step"]
        notes.append(
            "complex step does not apply: the function is not analytic in complex "
            "arguments, or loses its digits there"
        )

    ways = everywhere | probed
    rows = []
    for i, block in enumerate(blocks):
        every = np.arange(exact[i].shape[1])
        for name in ("reverse", "forward", *forms, *EVIDENCE):
            if name in ways:
                at = every if name in everywhere else columns[block.leaf]
                rows.append(measure(block, name, ways[name][i], exact[i], at, floor))
    notes[:0] = remarks.about_the_judge(
        judged, own, judge is not None, found.short_of_decimals
    )
    if not any(map(np.any, exact)):
        notes.append("all entries of the judge's derivative are 0: nothing is compared")
    doubts = remarks.draws_others(judged)
    doubts += remarks.doubts(judged, blocks, columns, found, seen, notes)
    return GradientReport(tuple(rows), tuple(doubts), tuple(notes))


def _probed(
    own: Problem, columns: methods.Columns, step: float | None, notes: list[str]
) -> dict[str, methods.Matrices]:
    """Forward mode, differences and complex step, as far as the function lets them."""
    with methods.quiet():
        central = methods.by_line(own, columns, partial(methods.central, step=step))
        both = methods.by_line(own, columns, partial(methods.richardson, step=step))
    probed = {"central": central, "richardson": [slopes for slopes, _ in both]}
    for name, way in (
        ("forward", methods.forward),
        ("complex step", methods.complex_step),
    ):
        try:
            probed[name] = way(own, columns)
        except (TypeError, ValueError, NotImplementedError) as refusal:
            notes.append(f"{name} does not apply: {judging.first_line(refusal)}")
    return probed


def _probes(
    moving: Sequence[Any],
    blocks: Sequence[Block],
    found: Mapping[str, methods.Matrices],
    exact: methods.Matrices,
    probes: int,
    random: np.random.Generator,
) -> list[np.ndarray]:
    """For each leaf the columns to look at: where `found` is worst, and random ones."""
    columns = []
    for leaf, array in enumerate(moving):
        worst = [
            np.argmax(errors_in_ulp(got[i], exact[i], block.dtype).max(axis=0))
            for got in found.values()
            for i, block in enumerate(blocks)
            if block.leaf == leaf
        ]
        left = np.isfinite(np.asarray(array).astype(np.float64)).ravel()
        first = np.array([at for at in np.unique(worst) if left[at]][:probes], int)
        left[first] = False
        others = np.flatnonzero(left)
        more = min(probes - first.size, others.size)
        drawn = random.choice(others, more, replace=False) if more else others[:0]
        chosen = np.sort(np.concatenate([first, drawn])).astype(int)
        # Where every coordinate is infinite there is nothing to step along.
        columns.append(chosen if chosen.size else np.arange(1))
    return columns
