"""Functions that JAX traces once for each shape, however often they are needed."""

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar, cast

import jax

Function = TypeVar("Function", bound=Callable[..., Any])


def traced_once(**static: Any) -> Callable[[Function], Function]:
    """Compiled where it is called by hand; in a function that is traced, a part of it.

    JAX traces a rule of differentiation a second time, and finds what it has traced
    before only if the mesh is the same. One is always set, since before JAX 0.12 none
    at all and an empty one are not the same.

    Args:
        static: static_argnums or static_argnames, as jax.jit takes them.
    """

    def decorated(function: Function) -> Function:
        compiled = jax.jit(function, inline=True, **static)

        @wraps(function)
        def called(*args: Any, **kwargs: Any) -> Any:
            mesh = jax.sharding.get_abstract_mesh()
            with jax.sharding.use_abstract_mesh(mesh):
                return compiled(*args, **kwargs)

        return cast(Function, called)

    return decorated
