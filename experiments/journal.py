"""What a run leaves behind as it goes: metrics, parameters, checkpoints, events."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from experiments import report, run_folder
from experiments.checkpoint import Checkpoints
from experiments.command import Stop
from jax_softmax import Epoch, Progress


class Journal:
    """Keeps a run in its folder, so that none of it is lost whenever it ends.

    An epoch's line is in metrics.jsonl before its checkpoint is begun, and lines after
    the newest checkpoint are dropped on resuming: every epoch is there exactly once.

    Args:
        folder: the folder of the run.
        checkpoints: where Progress is saved.
        every: steps between checkpoints within an epoch; 0 for none there.
        tensorboard: also write TensorBoard's event files.
        stop: raises Stop when the run was told to stop.
    """

    def __init__(
        self,
        folder: Path,
        checkpoints: Checkpoints,
        *,
        every: int,
        tensorboard: bool,
        stop: Callable[[], None],
    ):
        self.folder, self.checkpoints = folder, checkpoints
        self.every, self.stop = every, stop
        self.metrics: list[dict[str, Any]] = []
        self.epochs = 0  # that are done
        self._saved: Progress | None = None
        self.events = _event_writer(folder) if tensorboard else None

    def resume(self, start: Progress) -> Progress:
        """The newest usable checkpoint, or the start where there is none yet."""
        found = self.checkpoints.newest(like=start)
        for sentence in found.passed_over if found else ():
            report.say(sentence)
        progress = found.progress if found else start
        steps = self.checkpoints.steps
        whole, into = divmod(self.checkpoints.steps_done(progress), steps)
        self.epochs = whole
        if found:
            run_folder.check_metrics(self.folder, whole)
        else:
            run_folder.check_not_begun(self.folder)
        self.checkpoints.set_aside(newer_than=found.name if found else "")
        self.metrics = run_folder.keep_metrics(self.folder, whole)
        if found:
            run_folder.save(self.folder, progress.model)
            report.say(
                f"Going on from checkpoint {found.name}: epochs done: {whole}, and "
                f"{into} of {steps} steps"
            )
        else:
            report.say("Starting at the beginning: there is no checkpoint yet")
        return progress

    def within_epoch(self, progress: Progress) -> None:
        """Checkpoint when it is time, or when the run is to stop."""
        if self.every and len(progress.losses) % self.every == 0:
            self._checkpoint(progress)
        self._stop_if_told(progress)

    def end_of_epoch(self, epoch: Epoch, seconds: float) -> dict[str, Any]:
        """A line of metrics, the parameters and a checkpoint."""
        line = {
            "epoch": epoch.number,
            "train_loss": epoch.train_loss,
            "validation_loss": epoch.validation_loss,
            "validation_accuracy": epoch.validation_accuracy,
            "seconds": round(seconds, 4),
        }
        run_folder.save(self.folder, epoch.model)
        run_folder.add_metrics(self.folder, line)
        self.metrics.append(line)
        self.epochs = epoch.number
        if self.events:
            for name in run_folder.FIGURES:
                self.events.add_scalar(name, line[name], epoch.number)
            self.events.flush()
        self._checkpoint(epoch.progress)
        self._stop_if_told(epoch.progress)
        return line

    def close(self) -> None:
        """Wait until all is written."""
        self.checkpoints.close()
        if self.events:
            self.events.close()

    def _checkpoint(self, progress: Progress) -> None:
        if progress is not self._saved:
            self.checkpoints.save(progress)
            self._saved = progress

    def _stop_if_told(self, progress: Progress) -> None:
        try:
            self.stop()
        except Stop:
            self._checkpoint(progress)
            raise


def _event_writer(folder: Path) -> Any:
    from tensorboardX import SummaryWriter

    return SummaryWriter(str(folder / "tensorboard"))
