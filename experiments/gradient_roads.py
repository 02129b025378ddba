"""The roads to a gradient: a function written by each of them, and all compared."""

from collections.abc import Callable
from importlib import import_module
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments import torch_peer
from experiments.measure import Contender, compiled
from jax_softmax import GradientReport, GradientRow, compare_gradients

TEXTBOOK, STABLE, OURS = "textbook", "stable form", "jax_softmax"
CLOSED, DIFFERENCES, OPTAX, TORCH = "closed form", "differences", "optax", "torch"
ROADS = (TEXTBOOK, STABLE, OURS, CLOSED, DIFFERENCES, OPTAX, TORCH)

Function = Callable[..., Any]


class Case(NamedTuple):
    """One function by every road. All take `args` and are differentiated in the first.

    `told` is empty for a scalar function, else it holds the cotangent. The torch road
    is called with torch in front. Entries smaller than `floor` times the largest are
    measured in ULP at that size: 1 for sums that cancel.
    """

    title: str
    args: tuple[Any, ...]
    told: tuple[Any, ...]
    textbook: Function
    stable: Function
    ours: Function
    optax: Function
    torch: Function
    closed_form: Function
    judge: Function
    floor: float = 0.0

    def roads(self) -> dict[str, Function]:
        """The gradients that JAX computes: functions of (*args, *told)."""
        back = pullback if self.told else jax.grad
        return {
            TEXTBOOK: back(self.textbook),
            STABLE: back(self.stable),
            OURS: back(self.ours),
            CLOSED: self.closed_form,
            OPTAX: back(self.optax),
        }


def pullback(function: Function) -> Function:
    """The gradient of <cotangent, function(*args)> in the first of args."""

    def pulled(moving: Any, *rest: Any) -> Any:
        *fixed, cotangent = rest
        out, back = jax.vjp(lambda moving: function(moving, *fixed), moving)
        return back(cotangent.astype(out.dtype))[0]

    return pulled


def contenders(case: Case) -> dict[str, Contender]:
    """The gradient by each road, compiled; by torch if it is installed."""
    args = (*case.args, *case.told)
    ready = {road: compiled(way, *args) for road, way in case.roads().items()}
    return ready | ({TORCH: _torch_road(case)} if torch_peer.INSTALLED else {})


def _torch_road(case: Case) -> Contender:
    """The gradient by torch, eager, on tensors of its own."""
    torch: Any = import_module("torch")
    kind = str(jax.tree.leaves(case.args)[0].dtype)

    def tensor(leaf: Any) -> Any:
        array = np.asarray(leaf)
        if jnp.issubdtype(array.dtype, jnp.floating):
            return torch_peer.tensor(array.astype(np.float64), kind)
        return torch_peer.tensor(array, "bool" if array.dtype == bool else "int64")

    (moving, *fixed), told = jax.tree.map(tensor, (case.args, case.told))
    leaves, treedef = jax.tree.flatten(moving)
    for leaf in leaves:
        leaf.requires_grad_()

    def run() -> Any:
        out = case.torch(torch, jax.tree.unflatten(treedef, leaves), *fixed)
        weights = [cotangent.to(out.dtype) for cotangent in told] or None
        return jax.tree.unflatten(treedef, torch.autograd.grad([out], leaves, weights))

    return torch_peer.contender(run)


def from_torch(tree: Any, like: Any) -> Any:
    """Tensors as JAX arrays of the types of `like`."""
    return jax.tree.map(
        lambda tensor, leaf: jnp.asarray(tensor.double().cpu().numpy(), leaf.dtype),
        tree,
        like,
    )


def compared(case: Case, ready: dict[str, Contender], *, probes: int) -> GradientReport:
    """Every road to a gradient in one report: what is timed is what is judged."""

    def form(road: str) -> Function:
        if road == TORCH:
            return lambda *_: from_torch(ready[road].run(), case.args[0])
        return lambda *_: ready[road].run()

    return compare_gradients(
        case.ours,
        {road: form(road) for road in ready if road != OURS},
        *case.args,
        cotangent=case.told[0] if case.told else None,
        judge=case.judge,
        probes=probes,
        floor=case.floor,
    )


def rows_by_road(report: GradientReport) -> dict[str, list[GradientRow]]:
    """The rows of each road, one for each leaf; without torch there is no such road."""
    methods = {
        road: {OURS: "reverse", DIFFERENCES: "central"}.get(road, road)
        for road in ROADS
    }
    found = {
        road: [row for row in report.rows if row.method == method]
        for road, method in methods.items()
    }
    return {road: rows for road, rows in found.items() if rows}


def by_leaf(case: Case) -> Case:
    """The same case with each z[i] a leaf of its own: a report has a row for each."""

    def stacked(road: Function) -> Function:
        return lambda leaves, *rest: road(jnp.stack(leaves), *rest)

    closed = stacked(case.closed_form)
    return Case(
        case.title,
        (tuple(case.args[0]), *case.args[1:]),
        case.told,
        *map(stacked, case[3:7]),
        torch=lambda torch, leaves, *rest: case.torch(
            torch, torch.stack(leaves), *rest
        ),
        closed_form=lambda *args: tuple(closed(*args)),
        judge=stacked(case.judge),
        floor=case.floor,
    )
