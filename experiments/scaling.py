"""Softmax regression by several processes: one mesh, one input, one checkpoint.

    python -m experiments.scaling --processes 4               train on a mesh
    python -m experiments.scaling --processes 2 --resume DIR  go on with fewer, or more
    python -m experiments.scaling overhead                    1 process against 2
    python -m experiments.scaling pod                         256 chips, by the compiler

Every process is a host of its own under jax.distributed, with gloo between them. Data
shards read their rows of each batch through Grain; model shards hold their classes of
w. The numbers do not depend on how many processes there are, up to rounding.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from threading import Thread
from typing import Any, NamedTuple

import grain
import jax
import numpy as np
import optax
from jax import Array, lax
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from experiments import report, run_folder, scaling_overhead, scaling_pod
from experiments.command import (
    BadInput,
    Failed,
    at_least,
    main,
    parse_again,
    takes_seed,
)
from experiments.mesh import AXES, BY_CLASS, sizes
from jax_softmax import SoftmaxRegression, cross_entropy

WORKER = "JAX_SOFTMAX_WORKER"  # "process port", for the processes that this one starts
CHECKPOINTS = "checkpoints"
DECISIVE = ("rows", "features", "classes", "batch_size", "epochs", "seed")


@dataclass(frozen=True)
class Scaling:
    """Train softmax regression with several processes on one mesh.

    (Two measurements have flags of their own: python -m experiments.scaling overhead,
    and python -m experiments.scaling pod.)
    """

    processes: int = 4
    """How many processes, each with its own devices."""
    devices: int = 1
    """Devices of each process."""
    mesh: str | None = None
    """Such as data=2,model=2; by default two model shards where that divides."""
    rows: int = 1000
    """Examples, made from the seed."""
    features: int = 64
    """Numbers that describe an example."""
    classes: int = 32
    """Classes, divided among the model shards."""
    batch_size: int = 64
    """Rows per update, divided among the data shards."""
    epochs: int = 3
    """Passes over the rows."""
    seed: int = 0
    """Of the examples, the first weights and the order of the rows."""
    checkpoint_every: int = 8
    """Steps between checkpoints."""
    out: Path = Path("runs/scaling")
    """The folder for this run's files."""
    resume: Path | None = None
    """The folder of a run to go on with, on any number of processes."""

    @property
    def steps(self) -> int:
        """In an epoch."""
        return -(-self.rows // self.batch_size)


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


def check(settings: Scaling) -> None:
    """What one process can be asked to do, and all of them.

    Raises:
        BadInput: a number is out of its range, or they do not fit each other.
    """
    at_least(1, settings, "processes", "devices", "rows", "features", "classes")
    at_least(1, settings, "batch_size", "checkpoint_every")
    at_least(0, settings, "epochs")
    takes_seed(settings)
    mesh_shape(settings)


def mesh_shape(settings: Scaling) -> tuple[int, int]:
    """(data, model).

    Raises:
        BadInput: the mesh is not written as it should be, or does not fit.
    """
    devices = settings.processes * settings.devices
    model = 2 if devices % 2 == 0 and settings.classes % 2 == 0 else 1
    data = devices // model
    if settings.mesh is not None:
        data, model = sizes(settings.mesh)
        if data * model != devices:
            raise BadInput(
                f"--mesh {settings.mesh} has {data * model} devices, but --processes "
                f"times --devices are {devices}."
            )
    if settings.batch_size % data or settings.classes % model:
        raise BadInput(
            f"--batch-size {settings.batch_size} must divide among {data} data shards, "
            f"--classes {settings.classes} among {model} model shards."
        )
    return data, model


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
        (settings.out / run_folder.SUMMARY).write_text(report.to_json(summary))


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


def launch(settings: Scaling) -> None:
    """Start the processes, and stop all of them when one fails."""
    if settings.resume is not None:
        settings = _gone_on_with(settings)
    check(settings)
    with run_folder.locked(settings.out):
        if settings.resume is None:
            run_folder.create(settings.out, {"kind": "scaling"} | asdict(settings))
        port = _free_port()
        command = [sys.executable, "-m", "experiments.scaling", *sys.argv[1:]]
        workers = [
            subprocess.Popen(
                command,
                env=os.environ | {WORKER: f"{process} {port}"},
                stdin=subprocess.PIPE,
            )
            for process in range(settings.processes)
        ]
        report.say(
            "Processes:",
            *(f"{i} (pid {w.pid})" for i, w in enumerate(workers)),
            sep=" ",
        )
        try:
            _watch(workers, settings)
        finally:
            for worker in workers:
                worker.kill()
                worker.communicate()
    report.say(f"Parameters: {settings.out / run_folder.PARAMS}")


def _watch(workers: Sequence[subprocess.Popen[bytes]], settings: Scaling) -> None:
    """Wait for the end of all, or the failure of one."""
    codes: list[int | None] = [None]
    while None in codes and not any(codes):
        time.sleep(0.2)
        codes = [worker.poll() for worker in workers]
    # Whoever was killed comes first: the others fail because of it.
    failed = sorted((code, i) for i, code in enumerate(codes) if code)
    if failed:
        code, process = failed[0]
        how = (
            f"was killed ({signal.Signals(-code).name})"
            if code < 0
            else f"failed with exit code {code}"
        )
        raise Failed(
            f"Process {process} of {settings.processes} {how}, and the others were "
            f"stopped. Go on, with as many processes as there are, with "
            f"--resume {settings.out}."
        )


def _gone_on_with(settings: Scaling) -> Scaling:
    """The settings of the run, on the processes that there are now.

    Raises:
        BadInput: there is no such run, or a flag contradicts it.
    """
    folder = settings.resume or settings.out
    try:
        begun = json.loads((folder / run_folder.CONFIG).read_text())
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise BadInput(
            f"There is no run to go on with in {folder} ({reason}): name one that "
            "--out made."
        ) from None
    if not isinstance(begun, dict) or not begun.keys() >= set(DECISIVE):
        raise BadInput(
            f"The run in {folder} is of another experiment: name one that "
            "experiments.scaling made."
        )
    settings = Scaling(**{name: begun[name] for name in DECISIVE})
    asked = parse_again(folder, settings, DECISIVE, sys.argv[1:], program="scaling")
    return replace(asked, out=folder, resume=folder)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def run(settings: Scaling) -> None:
    """The launcher, or one of the processes that it has started."""
    if WORKER not in os.environ:
        launch(settings)
        return
    process, port = map(int, os.environ[WORKER].split())

    def end_with_the_launcher() -> None:
        os.read(0, 1)  # nothing ever comes; the pipe closes when the launcher is gone
        os._exit(1)

    Thread(target=end_with_the_launcher, daemon=True).start()
    if settings.resume is not None:
        settings = _gone_on_with(settings)
    try:
        work(settings, process, port)
    except jax.errors.JaxRuntimeError as error:
        raise Failed(
            f"Process {process} cannot go on ({str(error).splitlines()[0][:200]})."
        ) from None


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["pod", *arguments]:
            main(scaling_pod.run, scaling_pod.Pod, arguments, program="scaling pod")
        case ["overhead", *arguments]:
            of = scaling_overhead
            main(of.run, of.Overhead, arguments, program="scaling overhead")
        case arguments:
            main(run, Scaling, arguments, program="scaling")
