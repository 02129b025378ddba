"""What one of several processes does with its rows and its classes, step by step."""

import time
from collections.abc import Iterator
from dataclasses import asdict
from itertools import islice
from typing import Any, NamedTuple

import grain
import jax
import numpy as np
import optax
from jax import Array, lax
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from experiments import report, run_folder
from experiments.files import save_json
from experiments.mesh import AXES, BY_CLASS
from experiments.scaling_settings import Scaling, mesh_shape
from jax_softmax import SoftmaxRegression, cross_entropy

CHECKPOINTS = "checkpoints"


class Batch(NamedTuple):
    """One data shard's part; rows of weight 0 fill up the last one of an epoch."""

    ids: np.ndarray
    weights: np.ndarray


def epoch_ids(rows: int, seed: int, epoch: int, shard: int, shards: int) -> np.ndarray:
    """The rows that one data shard sees in an epoch, in order.

    Grain shuffles all of them, and shard i takes every shards-th from the i-th on: so
    batch by batch the shards see the same rows together, however many they are.
    """
    source = (
        grain.MapDataset.range(rows)
        .seed(seed)
        .shuffle(seed=(seed + 7919 * epoch) % 2**32)
    )
    return np.fromiter(source[shard::shards], int)


def batches(
    rows: int, seed: int, epoch: int, size: int, shard: int, shards: int
) -> Iterator[Batch]:
    """A shard's part of every batch of an epoch; all parts have one size."""
    ids, part = epoch_ids(rows, seed, epoch, shard, shards), size // shards
    for step in range(-(-rows // size)):
        mine = ids[step * part : (step + 1) * part]
        unused = part - len(mine)
        yield Batch(
            np.pad(mine, (0, unused)),
            np.pad(np.ones(len(mine), np.float32), (0, unused)),
        )


def examples(settings: Scaling) -> tuple[np.ndarray, np.ndarray]:
    """Gaussian features, and labels from a teacher's logits with noise."""
    rng = np.random.default_rng(settings.seed)
    x = rng.normal(size=(settings.rows, settings.features)).astype(np.float32)
    teacher = rng.normal(size=(settings.features, settings.classes))
    noise = rng.gumbel(size=(settings.rows, settings.classes))
    return x, (x @ teacher + noise).argmax(-1).astype(np.int32)


def step_on(mesh: Mesh, optimizer: optax.GradientTransformation) -> Any:
    """One update: classes over "model", rows over "data"."""

    def losses(model: SoftmaxRegression, x: Array, labels: Array, weights: Array):
        logits = x @ model.w + model.b
        mine = weights * cross_entropy(logits, labels, axis_name="model")
        return lax.psum(mine.sum(), "data")

    spread = jax.shard_map(
        losses,
        mesh=mesh,
        in_specs=(BY_CLASS, P("data"), P("data"), P("data")),
        out_specs=P(),
    )

    @jax.jit
    def step(model, state, x, labels, weights):
        def mean(model):
            return spread(model, x, labels, weights) / weights.sum()

        loss, gradient = jax.value_and_grad(mean)(model)
        updates, state = optimizer.update(gradient, state, model)
        return optax.apply_updates(model, updates), state, loss

    return step


def work(settings: Scaling, process: int, port: int) -> None:
    """What one of the processes does."""
    join(settings, process, port)
    from orbax.checkpoint import CheckpointManager, CheckpointManagerOptions, args

    kind = (jax.sharding.AxisType.Auto,) * 2
    mesh = jax.make_mesh(mesh_shape(settings), AXES, axis_types=kind)
    optimizer = optax.sgd(0.1, momentum=0.9)
    model = placed(first_model(settings), mesh)
    state, done = optimizer.init(model), 0
    checkpoints = CheckpointManager(
        (settings.out / CHECKPOINTS).resolve(),
        options=CheckpointManagerOptions(max_to_keep=2),
    )
    newest = checkpoints.latest_step()
    if settings.resume is not None and newest is not None:
        done = newest
        model, state = checkpoints.restore(
            done, args=args.StandardRestore((model, state))
        )
    step, seconds = step_on(mesh, optimizer), []
    for number, rows in enumerate(arrays(settings, mesh, process, done), done + 1):
        begun = time.perf_counter()
        model, state, loss = step(model, state, *rows)
        value = float(loss)
        seconds.append(time.perf_counter() - begun)
        if number % settings.checkpoint_every == 0:
            checkpoints.save(number, args=args.StandardSave((model, state)))
            checkpoints.wait_until_finished()
        if process == 0 and number % settings.steps == 0:
            epoch = number // settings.steps
            report.say(f"epoch {epoch:2d}  loss of the last batch {value:.6f}")
    checkpoints.close()
    if settings.processes > 1:
        model = multihost_utils.process_allgather(model, tiled=True)
    if process == 0:
        run_folder.save(settings.out, jax.tree.map(np.asarray, model))
        summary = {
            "settings": asdict(settings),
            "mesh": dict(mesh.shape),
            "went_on_after_step": done,
            "step_seconds": seconds[1:],
            "environment": report.environment(),
        }
        save_json(settings.out / run_folder.SUMMARY, summary)


def join(settings: Scaling, process: int, port: int) -> None:
    """This process's devices, and those of the others."""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", settings.devices)
    if settings.processes > 1:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(f"localhost:{port}", settings.processes, process)


def first_model(settings: Scaling) -> SoftmaxRegression:
    key = jax.random.key(settings.seed)
    return SoftmaxRegression.init(key, settings.features, settings.classes)


def placed(model: SoftmaxRegression, mesh: Mesh) -> SoftmaxRegression:
    """A model that every process has, as one whose classes lie on the mesh."""

    def put(array: Array, spec: P) -> Array:
        host, sharding = np.asarray(array), NamedSharding(mesh, spec)
        return jax.make_array_from_callback(host.shape, sharding, host.__getitem__)

    return jax.tree.map(put, model, BY_CLASS)


def arrays(
    settings: Scaling, mesh: Mesh, process: int, done: int
) -> Iterator[tuple[Array, Array, Array]]:
    """x, labels and weights of every batch after `done`, each process with its rows."""
    x, labels = examples(settings)
    by_row = NamedSharding(mesh, P("data"))
    data = mesh.shape["data"]
    owners = [{device.process_index for device in row} for row in mesh.devices]
    mine = [shard for shard, owner in enumerate(owners) if process in owner]
    for epoch in range(done // settings.steps, settings.epochs):
        within = done % settings.steps if epoch == done // settings.steps else 0
        shards = (
            batches(settings.rows, settings.seed, epoch, settings.batch_size, i, data)
            for i in mine
        )
        for parts in islice(zip(*shards, strict=True), within, None):
            ids, weights = map(np.concatenate, zip(*parts, strict=True))
            yield tuple(
                jax.make_array_from_process_local_data(by_row, local)
                for local in (x[ids], labels[ids], weights)
            )
