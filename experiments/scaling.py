"""Softmax regression by several processes: one mesh, one input, one checkpoint.

    python -m experiments.scaling --processes 4               train on a mesh
    python -m experiments.scaling --processes 2 --resume DIR  go on with fewer, or more
    python -m experiments.scaling overhead                    1 process against 2
    python -m experiments.scaling pod                         256 chips, by the compiler

Every process is a host of its own under jax.distributed, with gloo between them. Data
shards read their rows of each batch through Grain; model shards hold their classes of
w. The numbers do not depend on how many processes there are, up to rounding.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from threading import Thread

import jax

from experiments import report, run_folder, scaling_overhead, scaling_pod
from experiments.command import Failed, Interrupted, main
from experiments.scaling_settings import Scaling, check, gone_on_with
from experiments.scaling_work import work

WORKER = "JAX_SOFTMAX_WORKER"  # "process port", for the processes that this one starts


def launch(settings: Scaling) -> None:
    """Start the processes, and stop all of them when one fails."""
    if settings.resume is not None:
        settings = gone_on_with(settings)
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
                start_new_session=True,  # or Ctrl-C would reach them as well
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
        except KeyboardInterrupt as told:
            raise Interrupted(
                "Interrupted: all processes were stopped. Go on from the newest "
                f"checkpoint with --resume {settings.out}.",
                *told.args,
            ) from None
        finally:
            for worker in reversed(workers):  # the first has the others' address book
                worker.kill()
            for worker in workers:
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
        settings = gone_on_with(settings)
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
