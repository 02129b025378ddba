"""Arguments of the linear functions, checked; and tiles cut to fit the machine."""

import enum
import math
from collections.abc import Callable, Hashable
from numbers import Integral
from typing import Any

import jax
from jax import Array
from jax.typing import ArrayLike

from jax_softmax import _checks as checks
from jax_softmax import _linear_tiles as tiles
from jax_softmax import _options as options
from jax_softmax._linear_map import as_one
from jax_softmax._linear_tiles import Head, Layer
from jax_softmax._platform import by_platform
from jax_softmax._shards import AxisName, Shards, alike

Chunk = tuple[int, int]  # (tokens, classes)
# What is kept of one chunk of tokens may take this on a CPU, and elsewhere.
KEPT_BYTES = {True: 52 * 10**6, False: 2**29}
TILE_ELEMENTS = 2**20  # on a CPU: a few such tiles stay in its cache
WIDEST = {True: 1024, False: 2560}  # on a CPU, and elsewhere
MOST_IN_PLACE = 512  # tokens: with more, what a tile works on leaves the cache
MOST_TOKENS = 1024  # of a chunk on a CPU whose logits are made again
KEEPING_COSTS = 128  # features: a product over so many takes as long
LEAST_TOKENS = 64  # of a chunk: with fewer, reading w again for each costs more


class Keep(enum.Enum):
    """What the first pass may keep of each logit for the second."""

    NOTHING = enum.auto()
    SOME = enum.auto()  # in memory of its own
    IN_PLACE = enum.auto()  # and where the gradient of w will be


def layer_of(
    x: ArrayLike,
    w: ArrayLike,
    labels: ArrayLike,
    b: ArrayLike | None,
    where: ArrayLike | None,
    tied: bool,
    axis_name: AxisName | None,
    classes: int | None,
) -> tuple[Layer, tuple[int, ...], Shards]:
    """Checked arrays, one row for each token; the shape of the batch; the devices."""
    x, w = checks.floating("x", x), checks.floating("w", w)
    tied = options.flag("tied", tied)
    if w.ndim != 2 or 0 in w.shape:
        raise ValueError(f"w must be a matrix that is not empty, got shape {w.shape}")
    here, features = w.shape if tied else w.shape[::-1]
    if x.ndim == 0 or x.shape[-1] != features:
        raise ValueError(
            f"x must have {features} features as w does (w of shape {w.shape}, "
            f"tied={tied}), got shape {x.shape}"
        )
    batch = x.shape[:-1]
    labels = checks.class_ids("labels", labels, batch).reshape(-1)
    if b is not None:
        b = checks.floating("b", b)
        checks.same_shape("b", b, (here,))
    shards, keep = Shards.over(axis_name, here, classes), None
    if where is not None:
        keep = checks.row_mask("where", where, batch).reshape(-1)
    rows = x.reshape(-1, features), w, b
    rows = alike(rows, labels, keep)
    columns, known = shards.column(labels), shards.has(labels)
    return Layer(*rows, columns, known, keep), batch, shards


def head_of(
    tied: bool,
    softcap: float | None,
    label_smoothing: float,
    precision: Any,
    chunk: Chunk | None,
    shards: Shards,
    skip_below: float = 0.0,
) -> Head:
    label_smoothing = options.fraction("label_smoothing", label_smoothing)
    softcap = options.cap("softcap", softcap)
    skip_below = options.number("skip_below", skip_below)
    pair = isinstance(chunk, tuple) and len(chunk) == 2
    if chunk is not None and not (pair and all(map(_positive, chunk))):
        raise ValueError(
            f"chunk must be a tuple (tokens, classes), both positive integers, "
            f"got {chunk}"
        )
    if isinstance(precision, list):  # as jax.lax.dot_general takes them
        precision = tuple(precision)
    if not isinstance(precision, Hashable):
        raise TypeError(
            f"precision must be as in jax.lax.dot_general, "
            f"got {type(precision).__name__}"
        )
    if not 0 <= skip_below < 1:
        raise ValueError(f"skip_below must be in [0, 1), got {skip_below}")
    if skip_below and label_smoothing:
        raise ValueError(
            "skip_below must be 0 with label_smoothing: every class has a gradient then"
        )
    static = (tied, softcap, label_smoothing, precision, skip_below, shards)
    return Head(*static, jax.device_count())


def _positive(size: Any) -> bool:
    whole = isinstance(size, Integral) and not isinstance(size, bool)
    return whole and int(size) > 0


def on_tiles(
    function: Callable[..., Any],
    head: Head,
    chunk: Chunk | None,
    keep: Keep,
    layer: Layer,
    *args: Any,
) -> Any:
    """function(head, layer, *args), on tiles for the machine it is compiled for."""

    def on(cpu: bool) -> Callable[..., Any]:
        here = _cut(head, layer, chunk, keep, cpu)
        return lambda *arrays: function(here, *fill(arrays))

    leaves, tree = jax.tree.flatten((layer, *args))
    is_array = [isinstance(leaf, Array) for leaf in leaves]

    def fill(arrays: tuple[Array, ...]) -> Any:
        rest = iter(arrays)
        pairs = zip(is_array, leaves, strict=True)
        return tree.unflatten([next(rest) if yes else leaf for yes, leaf in pairs])

    def on_platform(*arrays: Array) -> Any:
        return by_platform(*arrays, cpu=on(True), default=on(False))

    return as_one(on_platform, *(leaf for leaf in leaves if isinstance(leaf, Array)))


def _cut(
    head: Head, layer: Layer, chunk: Chunk | None, keep: Keep, on_cpu: bool
) -> Head:
    """How the loops go: the pieces of work, and what stays between the two passes."""
    (rows, features), classes = layer.x.shape, tiles.classes_of(head, layer.w)
    fitting = KEPT_BYTES[on_cpu] // (classes * tiles.kept_type(head, layer).itemsize)
    if chunk is not None:
        tokens, width = min(chunk[0], rows), min(chunk[1], classes)
        keeps = keep is not Keep.NOTHING and tokens <= fitting
        return head._replace(chunk_tokens=tokens, tile_classes=width, keeps=keeps)
    first = min(rows, features, MOST_IN_PLACE)
    in_place = keep is Keep.IN_PLACE and on_cpu and head.devices == 1
    if not (in_place and first > 1 and _pays(first, features, rows)):
        first = 0
    rest = rows - first
    keeps = keep is not Keep.NOTHING and fitting >= min(rest, LEAST_TOKENS)
    tokens = _chunk_of(head, rest, fitting) if keeps else None
    if tokens and on_cpu and not _pays(tokens, features, rest):
        tokens = None
    if tokens is None:
        keeps = False
        tokens = _chunk_of(head, rest, MOST_TOKENS) if on_cpu else None
    tokens = rest if tokens is None else tokens
    width = min(WIDEST[on_cpu], classes)
    if on_cpu:
        room = max(256, TILE_ELEMENTS // max(tokens, first, features))
        width = min(width, 1 << (room.bit_length() - 1))
    while classes % width == 1:  # XLA fuses one column alone, and copies all for it
        width -= 16
    return head._replace(
        chunk_tokens=tokens, tile_classes=width, keeps=keeps, first=first
    )


def _pays(tokens: int, features: int, rows: int) -> bool:
    """On a CPU: whether a number kept of each logit is cheaper than a fourth matmul.

    To store and read one costs as much as to multiply over KEEPING_COSTS features; and
    w and its gradient are read for every chunk of tokens, more often where it is small.
    """
    again = min(rows, MOST_TOKENS)
    return 1 / tokens + 1 / features <= 1 / KEEPING_COSTS + 1 / again


def _chunk_of(head: Head, tokens: int, most: int) -> int | None:
    """How many tokens a chunk has: `most` or fewer, all chunks even where they can be.

    Even chunks are dealt out, each device that holds tokens getting its part of each;
    uneven ones would be gathered from the devices, so on several devices there is no
    answer instead: None. For evenness there may be twice as many chunks as needed, or
    on several devices as many as leave LEAST_TOKENS to each.
    """
    least, alone = -(-tokens // max(most, 1)), head.devices == 1
    holders = math.gcd(tokens, head.devices)  # of equal shares
    chunks = 2 * least if alone else max(2 * least, tokens // LEAST_TOKENS)
    even = (n for n in range(max(least, 1), chunks + 1) if tokens % (n * holders) == 0)
    count = next(even, least if alone or not tokens else None)
    return None if count is None else -(-tokens // max(count, 1))
