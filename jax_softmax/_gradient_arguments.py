"""The arguments of compare_gradients: what moves, what is told, what comes back."""

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import compress
from operator import index
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_softmax import _gradient_methods as methods
from jax_softmax._gradient_report import METHODS, Block


def forms_of(closed_form: Any) -> dict[str, Callable[..., Any]]:
    """The closed forms by name; none has that of another row."""
    if closed_form is None:
        return {}
    forms = {"closed form": closed_form} if callable(closed_form) else closed_form
    if not isinstance(forms, Mapping) or not all(map(callable, forms.values())):
        raise TypeError(
            f"closed_form: got {type(closed_form).__name__}, wanted a function, "
            "several by name in a dict, or None"
        )
    for name in forms:
        if not isinstance(name, str) or name in METHODS:
            raise ValueError(
                f"closed_form: got the name {name!r}, wanted a string that is none of "
                f"{', '.join(METHODS)}"
            )
    return dict(forms)


def as_array(leaf: Any) -> Any:
    """Numbers and NumPy arrays as JAX sees them; anything else is not data."""
    try:
        return jnp.asarray(leaf)
    except TypeError as error:
        raise TypeError(
            f"args: got {leaf!r}, wanted arrays and numbers; bind anything else to the "
            "function with functools.partial"
        ) from error


def is_real(leaf: Any) -> bool:
    return leaf.size > 0 and jnp.issubdtype(leaf.dtype, jnp.floating)


def reals(tree: Any) -> list[Any]:
    return [leaf for leaf in jax.tree.leaves(tree) if is_real(leaf)]


def differentiated(
    function: Callable[..., Any], args: tuple[Any, ...], argnums: int | Sequence[int]
) -> tuple[Any, list[str], list[int]]:
    """What argnums names: as one tree, and its leaves' names and places in args."""
    try:
        alone = not isinstance(argnums, Iterable)
        chosen = [index(n) for n in ([argnums] if alone else argnums)]
    except TypeError:
        raise TypeError(
            f"argnums: got {argnums!r}, wanted integers, places in args"
        ) from None
    if not all(-len(args) <= n < len(args) for n in chosen):
        raise ValueError(f"argnums: got {argnums}, wanted places in {len(args)} args")
    chosen = [n % len(args) for n in chosen]
    if len({*chosen}) < len(chosen):
        raise ValueError(f"argnums: got {argnums}, wanted each place once")
    names, places = [], []
    paths = jax.tree_util.tree_flatten_with_path(args)[0]
    for n in chosen:
        for place, (path, leaf) in enumerate(paths):
            if path[0].idx != n:
                continue
            name = _parameter(function, n) + jax.tree_util.keystr(path[1:])
            if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
                raise TypeError(f"{name}: got {leaf.dtype}, wanted a real type")
            if is_real(leaf):
                names.append(name)
                places.append(place)
    if not places:
        raise TypeError(
            f"argnums={argnums}: got no floating-point array that is not empty, wanted "
            "at least one"
        )
    template = tuple(args[n] for n in chosen)
    return template[0] if alone else template, names, places


def _parameter(function: Callable[..., Any], n: int) -> str:
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):
        return f"args[{n}]"
    kinds = inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD
    named = [p for p in parameters if p.kind in kinds]
    return named[n].name if n < len(named) else f"args[{n}]"


def given_or_normal(
    what: str, given: Any, like: Any, random: np.random.Generator
) -> Any:
    """`given`, checked against `like`, or normal numbers; None at integer leaves."""
    wanted, treedef = jax.tree.flatten(like)
    if given is None:
        parts = [random.standard_normal(leaf.shape) for leaf in wanted]
    else:
        parts = _matched(what, given, treedef)
    for part, leaf in zip(parts, wanted, strict=True):
        if is_real(leaf) and jnp.shape(part) != leaf.shape:
            raise ValueError(f"{what}: got {jnp.shape(part)}, wanted {leaf.shape}")
    return jax.tree.unflatten(
        treedef,
        [
            jnp.asarray(part, leaf.dtype) if is_real(leaf) else None
            for part, leaf in zip(parts, wanted, strict=True)
        ],
    )


def _matched(what: str, tree: Any, treedef: Any) -> list[Any]:
    try:
        return treedef.flatten_up_to(tree)
    except ValueError as error:
        got = jax.tree.structure(tree)
        raise ValueError(f"{what}: got {got}, wanted {treedef}") from error


def mapping(
    function: Callable[..., Any], args: tuple[Any, ...], places: list[int]
) -> methods.Mapping:
    """The function of its differentiated leaves, contracted if there are weights."""
    treedef = jax.tree.structure(args)
    real = list(map(is_real, jax.tree.leaves(jax.eval_shape(function, *args))))

    def mapping(moving: methods.Arrays, fixed: methods.Arrays) -> list[Any]:
        rest, weights = fixed
        leaves = list(rest)
        for place, leaf in zip(places, moving, strict=True):
            leaves[place] = leaf
        found = jax.tree.leaves(function(*jax.tree.unflatten(treedef, leaves)))
        parts = [jnp.asarray(leaf) for leaf in compress(found, real)]
        if weights is None:
            return parts
        parts = [w * leaf for w, leaf in zip(weights, parts, strict=True)]
        # Of 16 bits, sums are kept in 32.
        kinds = [np.promote_types(part.dtype, np.float32) for part in parts]
        pairs = zip(parts, kinds, strict=True)
        return [sum(jnp.sum(part, dtype=kind) for part, kind in pairs)]

    return mapping


def gradient(mapping: methods.Mapping) -> methods.Mapping:
    def gradient(moving: methods.Arrays, fixed: methods.Arrays) -> list[Any]:
        moving = list(moving)
        holomorphic = any(jnp.iscomplexobj(leaf) for leaf in moving)
        first = lambda leaves: mapping(leaves, fixed)[0]  # noqa: E731
        return jax.grad(first, holomorphic=holomorphic)(moving)

    return gradient


def blocks_of(
    names: list[str], moving: list[Any], heads: Sequence[tuple[str, Any]] | None
) -> list[Block]:
    """The matrices in order: outputs first if the whole Jacobian is wanted."""
    inner = [
        Block(name, i, leaf.shape, leaf.dtype)
        for i, (name, leaf) in enumerate(zip(names, moving, strict=True))
    ]
    if heads is None:
        return inner
    return [
        b._replace(name=f"d {name} / d {b.name}", shape=(*head.shape, *b.shape))
        for name, head in heads
        for b in inner
    ]


def outputs(result: Any) -> list[tuple[str, Any]]:
    """The real leaves of a function's result under names."""
    paths = jax.tree_util.tree_flatten_with_path(result)[0]
    named = [("out" + jax.tree_util.keystr(path), leaf) for path, leaf in paths]
    return [(name, leaf) for name, leaf in named if is_real(leaf)]


def judges(judge: Callable[..., Any], args: tuple[Any, ...], result: Any) -> None:
    """The judge is a function that returns what the judged function does."""
    if not callable(judge):
        raise TypeError(f"judge: got {type(judge).__name__}, wanted a function")
    got, wanted = (
        [leaf.shape for leaf in reals(tree)]
        for tree in (jax.eval_shape(judge, *args), result)
    )
    if got != wanted:
        raise ValueError(f"judge: got a result of shapes {got}, wanted {wanted}")


def asked(
    name: str, form: Callable[..., Any], args: tuple[Any, ...], told: dict[str, Any]
) -> Any:
    """form(*args, *told); one that does not take just those gets a sentence."""
    try:
        inspect.signature(form).bind(*args, *told.values())
    except ValueError:  # it has no signature
        pass
    except TypeError as error:
        shaped_like = {"cotangent": "the result", "tangent": "the argument"}
        more = [
            f"a {what} shaped like {shaped_like[what]}, "
            + ", ".join(str(leaf.shape) for leaf in jax.tree.leaves(given))
            for what, given in told.items()
        ]
        called = "It is called with the arguments alone"
        if more:
            called = (
                f"After the arguments it is called with {' and '.join(more)}: write "
                "one that takes that, or compare the function's sum at order 1"
            )
        raise TypeError(f"{name}: {error}. {called}") from None
    return form(*args, *told.values())


def returned(
    form: str,
    output: Any,
    outer: Any,
    template: Any,
    blocks: Sequence[Block],
    exact: methods.Matrices,
) -> methods.Matrices:
    """A closed form's arrays as matrices, if they are what the arguments ask for."""
    parts = [output]
    if outer is not None:
        heads, treedef = jax.tree.flatten(outer)
        parts = _matched(form, output, treedef)
        parts = [p for p, head in zip(parts, heads, strict=True) if is_real(head)]
    leaves, treedef = jax.tree.flatten(template)
    arrays = [
        array
        for part in parts
        for array, leaf in zip(_matched(form, part, treedef), leaves, strict=True)
        if is_real(leaf)
    ]
    for array, block in zip(arrays, blocks, strict=True):
        got = (
            f"{array.dtype}{list(array.shape)}"
            if hasattr(array, "dtype")
            else type(array).__name__
        )
        wanted = f"{block.dtype}{list(block.shape)}"
        if got != wanted:
            raise ValueError(f"{form} of {block.name}: got {got}, wanted {wanted}")
    return [
        np.asarray(array).astype(np.float64).reshape(right.shape)
        for array, right in zip(arrays, exact, strict=True)
    ]
