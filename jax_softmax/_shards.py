"""Classes spread over devices: which are here, and what the devices tell each other.

Inside jax.shard_map every device holds an equal share of the classes, in the order of
the mesh axes that axis_name names. A sum over devices is `lax.psum`, whose transpose
hands every device the whole cotangent, so rules of differentiation that end in one are
right under jax.grad outside and inside of shard_map.
"""

from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import Array, lax

from jax_softmax import _options as options

AxisName = str | tuple[str, ...]
T = TypeVar("T")


class Shards(NamedTuple):
    """How classes lie on devices; static. Without axis_name, all of them are here."""

    axis_name: AxisName | None
    here: int  # columns on each device
    devices: int
    classes: int  # on all devices together; what follows the last one is padding

    @classmethod
    def whole(cls, classes: int) -> "Shards":
        """All of them are here."""
        return cls(None, classes, 1, classes)

    @classmethod
    def over(
        cls, axis_name: AxisName | None, here: int, classes: int | None
    ) -> "Shards":
        """As many as the devices of an axis hold together, or fewer, `here` on each."""
        devices = 1
        if axis_name is not None:
            names = axis_name if isinstance(axis_name, tuple) else (axis_name,)
            manual = jax.sharding.get_abstract_mesh().manual_axes
            known = len(names) > 0 and all(name in manual for name in names)
            if not known or len(set(names)) < len(names):
                raise ValueError(
                    f"axis_name must name mesh axes of the jax.shard_map around, "
                    f"got {axis_name!r}"
                )
            devices = lax.axis_size(axis_name)
        columns = here * devices
        classes = columns if classes is None else options.integer("classes", classes)
        if not 1 <= classes <= columns:
            raise ValueError(
                f"classes must be in [1, {columns}], as many as there are columns on "
                f"{devices} device(s), got {classes}"
            )
        return cls(axis_name, here, devices, classes)

    @property
    def alone(self) -> bool:
        """Whether this device has no others to ask."""
        return self.axis_name is None

    @property
    def first(self) -> Array | int:
        """The id of the first class here."""
        if self.alone:
            return 0
        return lax.axis_index(self.axis_name) * self.here

    def sum(self, x: T) -> T:
        """The sum over devices of an array, or of each one of a tree."""
        return x if self.alone else lax.psum(x, self.axis_name)

    def each(self, rows: T) -> T:
        """What every device knows of its rows, all the same size, on a leading axis."""
        leaves, tree = jax.tree.flatten(rows)
        found = _gathered(jnp.stack(leaves), self)
        return tree.unflatten([found[:, i] for i in range(len(leaves))])

    def side_by_side(self, rows: Array) -> Array:
        """The columns of all devices in their order."""
        floating = jnp.issubdtype(rows.dtype, jnp.inexact)
        found = (_gathered if floating else _all_gather)(rows, self)
        return jnp.moveaxis(found, 0, 1).reshape(len(rows), -1)

    def has(self, labels: Array) -> Array:
        """Which labels name a class at all."""
        return (labels >= 0) & (labels < self.classes)

    def column(self, labels: Array) -> Array:
        """The column of z that a label names, -1 if it names none here."""
        labels = jnp.where(self.has(labels), labels, -1)
        if self.alone:
            return labels
        here = (labels >= self.first) & (labels < self.first + self.here)
        return jnp.where(here, labels - self.first, -1)

    def ruled(self, z: Array, start: Array | int = 0) -> Array:
        """z, columns `start` and on of what is here, with -inf for padding."""
        if self.here * self.devices == self.classes:
            return z
        ids = self.first + start + jnp.arange(z.shape[-1])
        return jnp.where(ids < self.classes, z, -jnp.inf)


def _all_gather(x: Array, shards: Shards) -> Array:
    """x of each device, in their order, and the same on all of them."""
    return lax.all_gather(x, shards.axis_name, to="invarying")


_gathered = jax.custom_jvp(_all_gather, nondiff_argnums=(1,))


@_gathered.defjvp
def _gathered_jvp(shards, primals, tangents):
    """As a sum, for the sake of its transpose."""
    (x,), (dx,) = primals, tangents
    place = jnp.arange(shards.devices) == lax.axis_index(shards.axis_name)
    place = place.reshape(-1, *[1] * dx.ndim)
    return _gathered(x, shards), shards.sum(jnp.where(place, dx, 0))


def alike(arrays: T, *others: Array | None) -> T:
    """The arrays of a tree, marked as varying over every mesh axis over which any of
    them, or of the others, varies.

    A loop that adds to them needs that. The transpose of the mark is a sum: the
    gradient of what was the same on several devices is summed over them. So x's is
    summed once, and w's, which already differs from device to device, is not.
    """
    every = [*jax.tree.leaves(arrays), *jax.tree.leaves(others)]
    axes = frozenset().union(*map(_axes, every))

    def varying(array: Array) -> Array:
        missing = tuple(sorted(axes - _axes(array)))
        return lax.pcast(array, missing, to="varying") if missing else array

    return jax.tree.map(varying, arrays)


def _axes(array: Array) -> frozenset[str]:
    """The mesh axes that an array varies over; none with check_vma=False."""
    kind: Any = jax.typeof(array)
    return kind.vma if hasattr(kind, "vma") else kind.manual_axis_type.varying
