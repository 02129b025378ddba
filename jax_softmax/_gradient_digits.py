"""A traced program run again in 60 decimal digits: a judge that loses no digits.

p - 1 is 0 in float64 from a margin of 37 on, whoever computes it. The program of a
derivative, as JAX traced it, is a list of additions, products and elementary functions,
and Python's `decimal` has those to any precision. Arrays become arrays of Decimals,
what only moves entries is run on their indices, casts between floats change nothing,
and integers are left to JAX. What has no counterpart here, or takes too long, is
Unsupported: then float64 must do.
"""

import decimal
import math
from collections.abc import Callable, Sequence
from decimal import Decimal
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_softmax._gradient_decimals import (
    ANY_TYPE,
    DIGITS,
    MOVES,
    OPERATIONS,
    SLOW,
    TO_DECIMAL,
    Unsupported,
)

CONTEXT = decimal.Context(prec=DIGITS, Emin=-999999, Emax=999999, traps=[])
_BUDGET = 1_000_000  # additions, about: half a second
_EACH = 100  # additions: what an operation costs beside them, of whole numbers too
_NAN = Decimal("nan")


class Program:
    """f as JAX traces it for these float64 arrays, to be run on their leaves, or on
    others of their shapes, in decimals.

    Raises:
        Unsupported: decimals cannot do it, or not in time.
    """

    def __init__(self, f: Callable[..., Any], *args: Any):
        self._closed, shapes = jax.make_jaxpr(f, return_shape=True)(*args)
        self.structure = jax.tree.structure(shapes)
        if _cost(self._closed.jaxpr) > _BUDGET:
            raise Unsupported("it would take too long")

    def __call__(self, leaves: Sequence[Any]) -> list[Any]:
        return _evaluated(self._closed.jaxpr, self._closed.consts, leaves)


def in_decimals(f: Callable[..., Any]) -> Callable[..., Any]:
    """f of float64 arrays, by its traced program in decimals, rounded at the end."""

    def run(*args: Any) -> Any:
        program = Program(f, *args)
        with decimal.localcontext(CONTEXT):
            outputs = program([decimals(leaf) for leaf in jax.tree.leaves(args)])
        leaves = [np.asarray(o).astype(np.float64) for o in outputs]
        return jax.tree.unflatten(program.structure, leaves)

    return run


def _cost(jaxpr: Any) -> int:
    """How many additions' time it takes; Unsupported if it cannot be done at all."""
    cost = 0
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        cost += _EACH
        bodies = [_body(inner)[0] for inner in _inner(name, params)]
        if bodies:
            times = params["length"] if name == "scan" else 1
            cost += times * max(map(_cost, bodies))
            continue
        avals = [v.aval for v in (*equation.invars, *equation.outvars)]
        taken = avals[: len(equation.invars)]
        if not any(jnp.issubdtype(a.dtype, jnp.floating) for a in taken):
            continue
        if name not in OPERATIONS and name not in MOVES:
            raise Unsupported(name)
        entries = max(math.prod(a.shape) for a in avals)
        if name == "dot_general":
            contracted = params["dimension_numbers"][0][0]
            entries = math.prod(avals[-1].shape)
            entries *= math.prod(avals[0].shape[axis] for axis in contracted)
        cost += entries * (40 if name in SLOW else 1)
    return cost


def _evaluated(jaxpr: Any, consts: Sequence[Any], args: Sequence[Any]) -> list[Any]:
    from jax.extend.core import Literal  # takes as long to import as all of ours

    known: dict[Any, Any] = {}
    known.update(zip(jaxpr.constvars, map(decimals, consts), strict=True))
    known.update(zip(jaxpr.invars, args, strict=True))

    def read(atom: Any) -> Any:
        return decimals(atom.val) if isinstance(atom, Literal) else known[atom]

    for equation in jaxpr.eqns:
        results = _applied(equation, [read(atom) for atom in equation.invars])
        known.update(zip(equation.outvars, results, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _applied(equation: Any, args: list[Any]) -> list[Any]:
    name, params = equation.primitive.name, equation.params
    if name == "scan":
        return _scanned(equation, args)
    if name == "cond":
        return _evaluated(*_body(params["branches"][int(args[0])]), args[1:])
    if inner := _inner(name, params):
        return _evaluated(*_body(inner[0]), args)
    aval = equation.outvars[0].aval
    exact = jnp.issubdtype(aval.dtype, jnp.floating)
    if name in ANY_TYPE and not exact:  # not worth a compilation each
        args = [np.asarray(a) for a in args]
    elif not any(map(_is_decimal, args)):
        found = _bound(equation.primitive, args, params)
        return [decimals(o) for o in found]
    move = name in MOVES
    out = _moved(equation, args) if move else OPERATIONS[name](*args, **params)
    if equation.primitive.multiple_results:
        return list(out)
    return [np.asarray(out, dtype=object if exact else aval.dtype).reshape(aval.shape)]


def _inner(name: str, params: Any) -> Sequence[Any]:
    """The programs inside a call, a scan or a choice."""
    if name == "while":
        raise Unsupported(name)
    found = [params[key] for key in ("jaxpr", "call_jaxpr") if key in params]
    return params["branches"] if name == "cond" else found


def _body(inner: Any) -> tuple[Any, Sequence[Any]]:
    return getattr(inner, "jaxpr", inner), getattr(inner, "consts", ())


def _scanned(equation: Any, args: list[Any]) -> list[Any]:
    params = equation.params
    body, _ = _body(params["jaxpr"])

    def carried(outer: Any, inner: Any) -> int:
        """How many are not scanned over: what is has one axis more outside."""
        pairs = zip(outer, inner, strict=True)
        return sum(o.aval.ndim == i.aval.ndim for o, i in pairs)

    whole = carried(equation.invars, body.invars)
    first = whole - carried(equation.outvars, body.outvars)
    consts, carry, over = args[:first], args[first:whole], args[whole:]
    steps, stacked = range(params["length"]), {}
    for i in reversed(steps) if params["reverse"] else steps:
        rows = [np.asarray(np.asarray(x)[i], dtype=x.dtype) for x in over]
        out = _evaluated(*_body(params["jaxpr"]), [*consts, *carry, *rows])
        carry, stacked[i] = out[: len(carry)], out[len(carry) :]
    columns = zip(*(stacked[i] for i in steps), strict=True)
    return [*carry, *(np.stack(column) for column in columns)]


def decimals(x: Any) -> Any:
    """Floats as Decimals, exactly; integers and booleans as they are."""
    if _is_decimal(x):
        return x
    if jnp.issubdtype(jnp.result_type(x), jnp.floating):
        return np.asarray(TO_DECIMAL(np.asarray(x, np.float64)), dtype=object)
    return x


def _is_decimal(x: Any) -> bool:
    return isinstance(x, np.ndarray) and x.dtype == object


def _bound(primitive: Any, args: list[Any], params: Any) -> list[Any]:
    try:
        with np.errstate(all="ignore"):
            out = primitive.bind(*args, **params)
    except Exception as refusal:
        raise Unsupported(primitive.name) from refusal
    return list(out) if primitive.multiple_results else [out]


def _moved(equation: Any, args: list[Any]) -> Any:
    """Where entries only change places: their indices are moved in their stead."""
    pool, stand_ins = [np.array([_NAN], dtype=object)], []
    for arg in args:
        if _is_decimal(arg):
            start = sum(len(part) for part in pool)
            stand_ins.append(jnp.arange(start, start + arg.size).reshape(arg.shape))
            pool.append(arg.ravel())
        else:
            stand_ins.append(arg)
    params = dict(equation.params)
    if params.get("fill_value") is not None:
        pool[0][0] = TO_DECIMAL(float(params["fill_value"]))
    if "fill_value" in params:  # an index for what is out of bounds, by default NaN's
        params["fill_value"] = 0
    (places,) = _bound(equation.primitive, stand_ins, params)
    return np.concatenate(pool)[np.asarray(places)]
