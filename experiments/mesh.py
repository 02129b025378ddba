"""A mesh of data shards and model shards: its flag, its devices, and what lies where.

    --mesh data=2,model=2     each batch in 2 parts by rows, w in 2 by classes

Training is written for one device. Here its parameters are put on the mesh, and told
how its rows and classes lie there; the compiler partitions the rest.
"""

import math
import re
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any, NamedTuple

import jax
from jax import Array, lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from experiments.command import BadInput
from jax_softmax import Progress, SoftmaxRegression

AXES = "data", "model"
BY_CLASS = SoftmaxRegression._make((P(None, "model"), P("model")))  # how w and b lie
PLAYED = 256  # devices that a processor plays at most


def sizes(flag: str) -> tuple[int, int]:
    """(data, model) of a --mesh flag.

    Raises:
        BadInput: it is not written as it should be.

    >>> sizes("data=4,model=2")
    (4, 2)
    """
    axis = r"(data|model)=([1-9]\d{0,8})"
    match = re.fullmatch(rf"{axis},(?!\1){axis}", flag, re.ASCII)
    if match is None:
        raise BadInput(
            f"--mesh must be like data=2,model=2, with numbers from 1 on, got {flag}."
        )
    number = dict(zip(match.group(1, 3), map(int, match.group(2, 4)), strict=True))
    return number["data"], number["model"]


def mesh_of(shape: tuple[int, int]) -> Mesh:
    """The first devices; a processor plays as many, if JAX has not begun.

    Raises:
        BadInput: there are not so many.
    """
    count = math.prod(shape)
    if count <= PLAYED:
        with suppress(RuntimeError):  # JAX has begun
            jax.config.update("jax_num_cpu_devices", count)
    devices = jax.devices()
    if len(devices) < count:
        data, model = shape
        most = f" (a processor plays {PLAYED} at most)" if count > PLAYED else ""
        raise BadInput(
            f"--mesh data={data},model={model} needs {count} devices, and there are "
            f"{len(devices)}, of kind {devices[0].device_kind}{most}: choose a smaller "
            "mesh."
        )
    auto = (jax.sharding.AxisType.Auto,) * 2
    return jax.make_mesh(shape, AXES, axis_types=auto, devices=devices[:count])


class Spread(NamedTuple):
    """How fit's arrays lie on a mesh.

    Where the classes do not divide among the model shards, w is whole on each of them
    between blocks of steps; within one, the compiler pads.
    """

    mesh: Mesh
    classes: int

    def put(self, progress: Progress) -> Progress:
        """Progress from anywhere; all that has a column for each class lies like w."""
        even = self.classes % self.mesh.shape["model"] == 0

        def put(leaf: Any) -> Array:
            columns = even and leaf.shape[-1:] == (self.classes,)
            spec = P(*(None,) * (leaf.ndim - 1), "model") if columns else P()
            return jax.device_put(leaf, NamedSharding(self.mesh, spec))

        put_all = partial(jax.tree.map, put)
        return progress._replace(
            model=put_all(progress.model),
            opt_state=put_all(progress.opt_state),
            last_good=put_all(progress.last_good),
        )

    def rows(self, transform: Callable[[Any], Array]) -> Callable[[Any], Array]:
        """Transformed rows, on their data shards."""
        return lambda x: self._constrained(transform(x), P("data"))

    def objective(self, model: SoftmaxRegression, x: Array, labels: Array) -> Array:
        """What training minimises, each class on its model shard."""
        return jax.tree.map(self._constrained, model, BY_CLASS).objective(x, labels)

    def _constrained(self, array: Array, spec: P) -> Array:
        return lax.with_sharding_constraint(array, NamedSharding(self.mesh, spec))
