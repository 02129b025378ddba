"""Arguments of the linear functions, checked; and tiles cut to fit the machine."""

from collections.abc import Callable
from typing import Any

import jax
from jax import Array, lax
from jax.typing import ArrayLike

from jax_softmax import _checks as checks
from jax_softmax import _linear_tiles as tiles
from jax_softmax._linear_map import as_one
from jax_softmax._linear_tiles import Head, Layer

Chunk = tuple[int, int]  # (tokens, classes)
# What the logits of one chunk of tokens may take on a CPU, and elsewhere.
KEPT_BYTES = {True: 40 * 10**6, False: 2**29}


def layer_of(
    x: ArrayLike,
    w: ArrayLike,
    labels: ArrayLike,
    b: ArrayLike | None,
    where: ArrayLike | None,
    tied: bool,
) -> tuple[Layer, tuple[int, ...]]:
    """Checked arrays, one row for each token, and the shape of the batch."""
    x, w = checks.floating("x", x), checks.floating("w", w)
    if w.ndim != 2 or 0 in w.shape:
        raise ValueError(f"w must be a matrix that is not empty, got shape {w.shape}")
    classes, features = w.shape if tied else w.shape[::-1]
    if x.ndim == 0 or x.shape[-1] != features:
        raise ValueError(
            f"x must have {features} features as w does (w of shape {w.shape}, "
            f"tied={tied}), got shape {x.shape}"
        )
    batch = x.shape[:-1]
    labels = checks.class_ids("labels", labels, batch).reshape(-1)
    if b is not None:
        b = checks.floating("b", b)
        checks.same_shape("b", b, (classes,))
    known, keep = (labels >= 0) & (labels < classes), None
    if where is not None:
        keep = checks.row_mask("where", where, batch).reshape(-1)
    return Layer(x.reshape(-1, features), w, b, labels, known, keep), batch


def head_of(
    tied: bool,
    softcap: float | None,
    label_smoothing: float,
    precision: Any,
    chunk: Chunk | None,
) -> Head:
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing must be in [0, 1], got {label_smoothing}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be positive, got {softcap}")
    if chunk is not None and (len(chunk) != 2 or min(chunk) < 1):
        raise ValueError(f"chunk must be (tokens, classes), both positive, got {chunk}")
    return Head(tied, softcap, label_smoothing, precision, 0, 0, False)


def on_tiles(
    function: Callable[..., Any],
    head: Head,
    chunk: Chunk | None,
    keeps_logits: bool,
    layer: Layer,
    *args: Any,
) -> Any:
    """function(head, layer, *args), on tiles for the machine it is compiled for."""

    def on(cpu: bool) -> Callable[..., Any]:
        here = _cut(head, layer, chunk, keeps_logits, cpu)
        return lambda *arrays: function(here, *fill(arrays))

    leaves, tree = jax.tree.flatten((layer, *args))
    is_array = [isinstance(leaf, Array) for leaf in leaves]

    def fill(arrays: tuple[Array, ...]) -> Any:
        rest = iter(arrays)
        pairs = zip(is_array, leaves, strict=True)
        return tree.unflatten([next(rest) if yes else leaf for yes, leaf in pairs])

    def on_platform(*arrays: Array) -> Any:
        return lax.platform_dependent(*arrays, cpu=on(True), default=on(False))

    return as_one(on_platform, *(leaf for leaf in leaves if isinstance(leaf, Array)))


def _cut(
    head: Head, layer: Layer, chunk: Chunk | None, keeps_logits: bool, on_cpu: bool
) -> Head:
    rows, classes = layer.x.shape[0], tiles.classes_of(head, layer.w)
    row_bytes = classes * tiles.wide_type(layer).itemsize
    fitting = KEPT_BYTES[on_cpu] // row_bytes
    if chunk is not None:
        tokens, width = chunk
    else:
        tokens = 1 << (fitting.bit_length() - 1) if fitting else 0
        if not keeps_logits or tokens < min(rows, 128):
            tokens = 2048 if on_cpu else rows
        widest = max(512, 2**20 // max(min(tokens, rows), layer.x.shape[1]))
        width = 1 << (widest.bit_length() - 1) if on_cpu else 8192
    tokens = min(tokens, rows)
    return head._replace(
        tokens=tokens,
        classes=min(width, classes),
        keep_logits=keeps_logits and tokens <= fitting,
    )
