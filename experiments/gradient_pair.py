"""compare_gradients from the command line, on the reader's own function and file."""

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from operator import attrgetter
from pathlib import Path
from typing import Any, Literal
from zipfile import BadZipFile

import jax
import jax.numpy as jnp
import numpy as np

from experiments import report
from experiments.command import BadInput, Failed
from experiments.files import save_json
from jax_softmax import GradientReport, compare_gradients

Function = Callable[..., Any]


@dataclass(frozen=True)
class Pair:
    """Your own function, compared instead; --out, if given, keeps comparison.json.

    The closed form is called with the function's arguments, then with the cotangent if
    the function is not scalar, then with the tangent if --order is 2. It returns what
    jax.grad (or the vjp, or the Hessian's product) would: for each argument that
    --argnums names, an array of its shape and type.

    The file holds the arguments in the order of np.savez(FILE, x, w), or by the names
    of the function's parameters as in np.savez(FILE, x=x, w=w), or some this way and
    the rest that way. A number is an array without axes.

    Exit code: 0, whatever the table shows; with --ulp, 1 if autodiff or the closed form
    is further off or the judge is in doubt; 2 if there is nothing to compare.
    """

    function: str | None = None
    """module:name of a JAX function; modules of the current folder are found."""
    closed_form: str | None = None
    """module:name of its gradient on paper; without it, autodiff is compared alone."""
    args: Path | None = None
    """The file of np.savez with the arguments."""
    argnums: tuple[int, ...] | None = None
    """The places of the arguments to differentiate; by default the first."""
    dtype: Literal["float32", "bfloat16", "float16", "float64"] | None = None
    """The type to compare in; by default floats stay as saved (NumPy's are float64)."""
    order: Literal[1, 2] | None = None
    """1 or nothing: the gradient. 2: the Hessian times a random tangent."""
    judge: str | None = None
    """module:name of the same function without cancellation, to judge in float64."""
    floor: float | None = None
    """Below this share of the largest entry, ULP are those at it: 0, or 1 for sums."""
    ulp: float | None = None
    """Make it a check: the largest error to pass."""

    @property
    def given(self) -> bool:
        """Whether any of its flags is, for which all of them are None by default."""
        return self != Pair()


def run(pair: Pair, out: Path | None) -> None:
    """Compare, print, save if asked, fail if asked."""
    if pair.function is None:
        raise BadInput("--function is missing: give module:name of what to compare.")
    if pair.args is None:
        raise BadInput("--args is missing: give a file of np.savez with the arguments.")
    if pair.floor is not None and not 0 <= pair.floor <= 1:
        raise BadInput(f"--floor must be in [0, 1], got {pair.floor:g}.")
    if pair.ulp is not None and not pair.ulp >= 0:
        raise BadInput(f"--ulp must be a number of at least 0, got {pair.ulp:g}.")
    function = named("--function", pair.function)
    closed_form, judge = (
        named(flag, name) if name else None
        for flag, name in (("--closed-form", pair.closed_form), ("--judge", pair.judge))
    )
    arrays = read(pair.args, pair.dtype)
    with jax.enable_x64(any(array.dtype == np.float64 for array in arrays.values())):
        compared = _compare(pair, function, closed_form, judge, arrays)
    report.say(str(compared))
    if out is not None:
        _save(out / "comparison.json", pair, compared)
    if pair.ulp is not None:
        try:
            compared.raise_if(ulp=pair.ulp)
        except AssertionError as error:
            # The table, which comes after a blank line, is printed already.
            raise Failed(str(error).split("\n\n")[0]) from None
        report.say(f"Autodiff and closed form are within {pair.ulp:g} ULP.")


def named(flag: str, text: str) -> Function:
    """What module:name stands for.

    Raises:
        BadInput: no such module or attribute, or it cannot be called.
    """
    module, _, name = text.partition(":")
    if not module or not name:
        raise BadInput(f"{flag} {text} is not of the form module:name.")
    try:
        found = attrgetter(name)(import_module(module))
    except ModuleNotFoundError as error:
        raise BadInput(
            f"{flag} {text}: there is no module {error.name}; run this in the folder "
            "that holds it, or add that to PYTHONPATH."
        ) from None
    except AttributeError as error:
        raise BadInput(f"{flag} {text}: {error}.") from None
    except SystemExit:
        raise BadInput(
            f"{flag} {text}: importing {module} ends the program: keep what it runs "
            'under if __name__ == "__main__".'
        ) from None
    except Exception as error:
        raise BadInput(
            f"{flag} {text}: importing {module} fails ({_reason(error)})."
        ) from None
    if not callable(found):
        raise BadInput(
            f"{flag} {text} is a {type(found).__name__}: name something to call."
        )
    return found


def read(path: Path, dtype: str | None) -> dict[str, np.ndarray]:
    """The arrays of an npz file by their names.

    Raises:
        BadInput: no such file, a damaged one, or something that is not a number.
    """
    try:
        # Opened here, as NumPy leaves a damaged file open.
        with path.open("rb") as stream:
            begins = stream.peek(6)
            if begins.startswith(b"\x93NUMPY"):
                raise BadInput(f"{path} is a single array: save it with np.savez.")
            if not begins.startswith(b"PK"):
                raise BadInput(f"{path} is not an .npz file made with numpy.savez.")
            loaded = np.load(stream, allow_pickle=False)
            arrays = {name: loaded[name] for name in loaded.files}
    except FileNotFoundError:
        raise BadInput(f"There is no file {path}: make one with np.savez.") from None
    except ValueError:
        raise BadInput(
            f"{path} holds what is no array of numbers: save those with numpy.savez."
        ) from None
    except (BadZipFile, EOFError, OSError) as error:
        reason = getattr(error, "strerror", None) or _reason(error)
        raise BadInput(
            f"{path} cannot be read ({reason}): make it again with np.savez."
        ) from None
    if not arrays:
        raise BadInput(f"{path} holds no array: save the arguments with np.savez.")
    return {
        name: _usable(f"{path}: {name}", array, dtype) for name, array in arrays.items()
    }


def _usable(name: str, array: np.ndarray, dtype: str | None) -> np.ndarray:
    """An array in the type to compare in, and in the machine's byte order, as JAX asks.

    Raises:
        BadInput: it holds no numbers, or those of a type that JAX does not have.
    """
    kind = array.dtype
    if kind.kind not in "biufc":
        raise BadInput(
            f"{name} is of type {kind}, which is no number of NumPy's: save it as "
            "float32, and use --dtype for narrower types."
        )
    if dtype is not None and kind.kind == "f":
        return array.astype(jnp.dtype(dtype))
    widest = np.dtype(np.complex128 if kind.kind == "c" else np.float64)
    if kind.itemsize > widest.itemsize:
        raise BadInput(
            f"{name} is of type {kind}, wider than any of JAX's: save it as {widest}."
        )
    return array.astype(kind.newbyteorder("="), copy=False)


def arguments(
    function: Function, arrays: dict[str, np.ndarray]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arrays as `function` takes them: positional, and keyword-only.

    Raises:
        TypeError: they do not fit its parameters.
    """
    places = {int(n[4:]): n for n in arrays if re.fullmatch(r"arr_\d+", n)}
    positional = [arrays[name] for _, name in sorted(places.items())]
    by_name = {n: a for n, a in arrays.items() if n not in places.values()}
    if not by_name:
        return tuple(positional), {}
    bound = inspect.signature(function).bind(*positional, **by_name)
    return bound.args, bound.kwargs


def _compare(
    pair: Pair,
    function: Function,
    closed_form: Function | None,
    judge: Function | None,
    arrays: dict[str, np.ndarray],
) -> GradientReport:
    try:
        args, options = arguments(function, arrays)
        jax.eval_shape(partial(function, **options), *args)
    except (Exception, SystemExit) as error:
        shapes = ", ".join(f"{n} {a.dtype}{list(a.shape)}" for n, a in arrays.items())
        raise BadInput(
            f"{pair.function} cannot be called with {shapes} of {pair.args} "
            f"({_reason(error)}): save what it takes, as np.savez(FILE, x=x, w=w)."
        ) from None
    argnums = (0,) if pair.argnums is None else pair.argnums
    try:
        return compare_gradients(
            partial(function, **options) if options else function,
            closed_form and partial(closed_form, **options),
            *args,
            argnums=argnums[0] if len(argnums) == 1 else argnums,
            order=pair.order or 1,
            judge=judge and partial(judge, **options),
            floor=pair.floor or 0.0,
        )
    except (Exception, SystemExit) as error:
        raise BadInput(
            f"{pair.function} and {pair.closed_form or 'its gradients'} cannot be "
            f"compared ({_reason(error)}): see --closed-form in --help."
        ) from None


def _save(path: Path, pair: Pair, compared: GradientReport) -> None:
    content = {
        "environment": report.environment(),
        "function": pair.function,
        "closed_form": pair.closed_form,
        **compared.to_dict(),
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_json(path, content)
    except OSError as error:
        raise BadInput(
            f"{path} cannot be written ({error.strerror}): choose another --out."
        ) from None
    report.say(f"File: {path}")


def _reason(error: BaseException) -> str:
    """The first line of what an exception says, after its kind."""
    first = (str(error).strip() or "no reason given").splitlines()[0]
    return f"{type(error).__name__}: {first}".rstrip(".:")
