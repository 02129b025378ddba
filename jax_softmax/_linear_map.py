"""A linear map with a transpose written by hand, which every transformation respects.

jax.custom_vjp gives up forward mode; the transpose that JAX derives for a scan over
tiles of w would add up full-size gradients tile by tile. This is `custom_jvp`'s missing
half: the tangent rule calls `linear_map`, and reverse mode calls the given transpose.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
from jax.interpreters import ad, batching, mlir


def linear_map(
    apply: Callable[[Any, Any], Any],
    transpose: Callable[[Any, Any], Any],
    residuals: Any,
    tangents: Any,
) -> Any:
    """apply(residuals, tangents), linear in the tangents.

    transpose(residuals, cotangents of the result) gives cotangents of the tangents.
    Both are differentiated as they are where the residuals are perturbed.

    >>> def scale(by, t):
    ...     return by * t
    >>> threefold = lambda t: linear_map(scale, scale, 3.0, t)
    >>> print(*jax.linear_transpose(threefold, 1.0)(2.0))
    6.0
    """
    known, known_tree = jax.tree.flatten(residuals)
    moved, moved_tree = jax.tree.flatten(tangents)

    def flat_apply(known, moved):
        return apply(known_tree.unflatten(known), moved_tree.unflatten(moved))

    def flat_transpose(known, cotangents):
        out = transpose(known_tree.unflatten(known), out_tree.unflatten(cotangents))
        return jax.tree.leaves(out)

    traced, shape = jax.make_jaxpr(flat_apply, return_shape=True)(known, moved)
    out_tree = jax.tree.structure(shape)
    out = _primitive().bind(
        *known, *moved, apply=traced, transpose=flat_transpose, known=len(known)
    )
    return out_tree.unflatten(out)


def as_one(function: Callable[..., Any], *args: Any) -> Any:
    """function(*args), which reverse mode evaluates as a whole or not at all.

    JAX splits a scan into what is known and what is not even where all of it is known,
    and then makes each iteration's slice of w ahead of the loop: a copy of w, or two.
    """
    return linear_map(lambda args, _: function(*args), _no_transpose, args, ())


def _no_transpose(_residuals: Any, _cotangents: Any) -> Any:
    return ()


@cache
def _primitive() -> Any:
    """Made when first used: jax.extend takes longer to import than all of ours."""
    from jax.extend.core import Primitive

    primitive = Primitive("linear_map")
    primitive.multiple_results = True
    primitive.def_impl(_impl)
    primitive.def_abstract_eval(_abstract_eval)
    ad.primitive_jvps[primitive] = _jvp
    ad.primitive_transposes[primitive] = _transpose
    batching.primitive_batchers[primitive] = _batch
    mlir.register_lowering(primitive, mlir.lower_fun(_impl, multiple_results=True))
    return primitive


def _impl(*args, apply, transpose, known):
    from jax.extend.core import jaxpr_as_fun

    return jaxpr_as_fun(apply)(*args)


def _abstract_eval(*args, apply, transpose, known):
    return apply.out_avals


def _jvp(primals, tangents, *, apply, transpose, known):
    residuals, moved = tuple(primals[:known]), primals[known:]
    params = {"apply": apply, "transpose": transpose, "known": known}
    out = _primitive().bind(*primals, **params)
    total = None
    if not all(isinstance(t, ad.Zero) for t in tangents[known:]):
        again = map(ad.instantiate_zeros, tangents[known:])
        total = _primitive().bind(*residuals, *again, **params)
    if not all(isinstance(t, ad.Zero) for t in tangents[:known]):
        turned = tuple(map(ad.instantiate_zeros, tangents[:known]))
        _, curved = jax.jvp(lambda *r: _impl(*r, *moved, **params), residuals, turned)
        total = curved if total is None else map(jnp.add, total, curved)
    return out, list(total or ())


def _transpose(cotangents, *args, apply, transpose, known):
    cotangents = map(ad.instantiate_zeros, cotangents)
    found = transpose(args[:known], list(cotangents))
    wanted = map(ad.is_undefined_primal, args[known:])
    return [None] * known + [
        f if w else None for f, w in zip(found, wanted, strict=True)
    ]


def _batch(args, dims, *, apply, transpose, known):
    residual_dims, moved_dims = list(dims[:known]), list(dims[known:])
    params = {"apply": apply, "transpose": transpose, "known": known}
    batched = jax.vmap(lambda *args: _impl(*args, **params), in_axes=tuple(dims))

    def batched_transpose(residuals, cotangents):
        found = jax.vmap(transpose, in_axes=(residual_dims, 0))(
            list(residuals), cotangents
        )
        return [
            f.sum(0) if dim is None else jnp.moveaxis(f, 0, dim)
            for f, dim in zip(found, moved_dims, strict=True)
        ]

    traced = jax.make_jaxpr(batched)(*args)
    out = _primitive().bind(
        *args, apply=traced, transpose=batched_transpose, known=known
    )
    return out, [0] * len(out)
