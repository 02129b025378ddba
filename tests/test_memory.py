"""What the losses keep in memory, as the compiler counts it."""

import math
import re
from functools import partial

import jax
import jax.numpy as jnp
import pytest

from jax_softmax import cross_entropy, logsumexp
from jax_softmax._linear import linear_cross_entropy, mean_linear_cross_entropy
from jax_softmax._linear_summary import linear_softmax_summary

pytestmark = pytest.mark.usefixtures("strict_types", "as_on_one_device")

SHAPES = [
    (2048, 512, 32768),
    (1024, 768, 50257),
    (4096, 256, 131072),
    (256, 1024, 262144),
]


def arguments(tokens, features, classes):
    return (
        jax.ShapeDtypeStruct((tokens, features), jnp.float32),
        jax.ShapeDtypeStruct((features, classes), jnp.float32),
        jax.ShapeDtypeStruct((tokens,), jnp.int32),
    )


def mean_and_gradients(x, w, labels):
    return jax.value_and_grad(mean_linear_cross_entropy, (0, 1))(x, w, labels)


def rows_and_gradients(x, w, labels):
    def total(x, w):
        return linear_cross_entropy(x, w, labels).sum()

    return jax.value_and_grad(total, (0, 1))(x, w)


def temp_megabytes(function, shape):
    compiled = jax.jit(function).lower(*arguments(*shape)).compile()
    return compiled.memory_analysis().temp_size_in_bytes / 1e6


@pytest.mark.parametrize("shape", SHAPES)
def test_mean_and_both_gradients_take_64_megabytes_at_most(shape):
    assert temp_megabytes(mean_and_gradients, shape) <= 64


@pytest.mark.parametrize(
    ("classes", "tied"), [(50257, False), (32769, True), (262145, False)]
)
def test_a_last_tile_that_is_smaller_copies_no_gradient_of_w(classes, tied):
    """Also where it is a single class."""
    x, w, labels = arguments(1024, 512, classes)
    w = jax.ShapeDtypeStruct(w.shape[::-1], w.dtype) if tied else w
    loss = partial(mean_linear_cross_entropy, tied=tied)
    program = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(x, w, labels).compile()
    assert program.memory_analysis().temp_size_in_bytes <= 64e6


@pytest.mark.parametrize("shape", SHAPES)
def test_the_value_alone_takes_48_megabytes_at_most(shape):
    assert temp_megabytes(mean_linear_cross_entropy, shape) <= 48


def test_rows_take_64_megabytes_at_most():
    assert temp_megabytes(rows_and_gradients, SHAPES[0]) <= 64


def sizes(function, shape):
    """Elements of every tensor in the program for a CPU."""
    text = jax.jit(function).lower(*arguments(*shape)).as_text()
    for dims in set(re.findall(r"tensor<((?:\d+x)+)", text)):
        yield math.prod(map(int, dims.split("x")[:-1]))


@pytest.mark.parametrize(
    "function",
    [
        mean_and_gradients,
        rows_and_gradients,
        lambda x, w, labels: linear_softmax_summary(x, w, labels, top_k=5),
    ],
)
def test_no_intermediate_is_as_large_as_the_logits(function):
    tokens, features, classes = 4096, 256, 131072
    largest = max(sizes(function, (tokens, features, classes)))
    assert largest <= max(features * classes, tokens * classes // 16)


@pytest.mark.parametrize("function", [lambda z, y: logsumexp(z), cross_entropy])
@pytest.mark.parametrize(
    ("dtype", "rows", "classes", "megabytes"),
    [
        ("float32", 65536, 10, 0.8),
        ("bfloat16", 65536, 10, 2.7),  # ten widened logits a row
        *(
            (dtype, *case)
            for dtype in ("float32", "bfloat16")
            for case in (
                (8192, 1000, 9),
                (8192, 4096, 20),
                (1024, 50257, 5.6),
                (64, 262144, 5.6),
                (64, 2**20, 5.6),
                (8192, 50257, 36),
                (8192, 2**20, 36),
            )
        ),
    ],
)
def test_logits_are_reduced_in_memory_that_no_number_of_classes_adds_to(
    function, dtype, rows, classes, megabytes
):
    """A few numbers a row, 1024 at most for an eighth of many rows, and an eighth of
    one tile where a row is many."""
    z = jax.ShapeDtypeStruct((rows, classes), dtype)
    y = jax.ShapeDtypeStruct((rows,), jnp.int32)
    memory = jax.jit(function).lower(z, y).compile().memory_analysis()
    assert memory.temp_size_in_bytes <= 1e6 * megabytes


@pytest.mark.parametrize("classes", [256, 300, 512, 777, 1500, 1536, 4096])
def test_what_slices_add_up_to_is_made_once(classes):
    """In memory: within the loop that reads it, XLA for CPU makes one number at a time,
    and takes four times as long."""
    z = jax.ShapeDtypeStruct((8192, classes), jnp.float32)
    memory = jax.jit(logsumexp).lower(z).compile().memory_analysis()
    assert memory.temp_size_in_bytes >= z.size // 8 * 4
