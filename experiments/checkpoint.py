"""Checkpoints of a run by Orbax: whole or not at all, checked when they are read.

A checkpoint holds the leaves of fit's Progress, and beside them their names and the
facts that decide whether it fits: settings, data set, shuffle, versions. Its folder is
named by the steps done; Orbax writes it under another name and renames it, finished.

The leaves are packed into one array of bytes: half the time to write, and one read or
write that can fail, where Orbax leaves the failures of all but the first unattended.
"""

import errno
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments import report
from experiments.command import BadInput, Failed
from jax_softmax import Progress

FORMAT = 1
KEPT = 2
MOST_STEPS = 10**9 - 1  # by their digits, names are in order; int32 counts as far
CONTENT = "content"
OVERHEAD = 2**17  # bytes of a checkpoint beside its arrays, several times over
FOLDER = "checkpoints"
TORN = ".torn"
MUST_AGREE = {
    "settings": "was made with other settings",
    "fingerprint": "was made with another data set",
    "shuffle": "was made with another order of the rows",
}


class Found(NamedTuple):
    """A checkpoint that can be gone on from, and what stood in front of it."""

    progress: Progress
    name: str
    passed_over: Sequence[str]


class Checkpoints:
    """The checkpoints of one run, of which the newest are kept.

    Args:
        run: the folder of the run.
        facts: what must be the same to go on, in words that JSON knows.
        steps: steps of an epoch.
    """

    def __init__(self, run: Path, facts: Mapping[str, Any], steps: int):
        self.folder = (run / FOLDER).resolve()
        self.facts = {"kind": "jax_softmax", "format": FORMAT} | dict(facts)
        self.steps = steps
        self._pending: Path | None = None

    @cached_property
    def _orbax(self) -> Any:
        """Orbax's writer. Whoever only predicts need not wait for its import."""
        import orbax.checkpoint as ocp
        from absl import logging

        logging.set_verbosity(logging.FATAL)
        return ocp.AsyncCheckpointer(ocp.PyTreeCheckpointHandler())

    def steps_done(self, progress: Progress) -> int:
        """Those of all epochs."""
        return (progress.epoch - 1) * self.steps + len(progress.losses)

    def save(self, progress: Progress) -> None:
        """Start to write; what was started before is finished first.

        Raises:
            Failed: the disk is full, or the folder cannot be written any more.
        """
        self.finish()
        leaves = _leaves(progress)
        content = _packed(leaves)
        facts = self.facts | {
            "epoch": progress.epoch,
            "step": len(progress.losses),
            "leaves": {n: [f"{x.dtype}", *x.shape] for n, x in leaves.items()},
            "sha256": sha256(content.data).hexdigest(),
            "versions": report.versions(),
        }
        self._pending = self.folder / f"{self.steps_done(progress):09d}"
        try:
            self._look_for_room(len(content))
            self._orbax.save(self._pending, {CONTENT: content}, custom_metadata=facts)
        except Exception as error:
            raise self._failure(error) from None

    def finish(self) -> None:
        """Wait until the last checkpoint is whole, and drop those too old."""
        if self._pending is None:
            return
        try:
            self._orbax.wait_until_finished()
        except Exception as error:
            raise self._failure(error) from None
        self._pending = None
        for old in self._whole()[KEPT:]:
            shutil.rmtree(old, ignore_errors=True)

    def close(self) -> None:
        """Finish, and stop Orbax's threads."""
        self.finish()
        self._orbax.close()

    def newest(self, like: Progress) -> Found | None:
        """The newest usable checkpoint; None where there has been none yet.

        Raises:
            BadInput: there are checkpoints, and none of them can be used.
        """
        passed_over: list[str] = []
        for path in self._whole():
            try:
                progress = self._read(path, like)
            except Unusable as reason:
                passed_over.append(f"Checkpoint {path.name} {reason}.")
            else:
                return Found(progress, path.name, passed_over)
        if passed_over:
            raise BadInput(
                f"No checkpoint in {self.folder} can be used: {' '.join(passed_over)} "
                "Nothing was changed; train again with another --out."
            )
        return None

    def set_aside(self, newer_than: str) -> None:
        """Rename unusable checkpoints out of the way, and remove unfinished ones."""
        for path in self._whole():
            if path.name > newer_than:
                path.rename(_free(path.with_name(path.name + TORN)))
        for unfinished in self.folder.glob("*.orbax-checkpoint-tmp*"):
            shutil.rmtree(unfinished, ignore_errors=True)

    def _whole(self) -> list[Path]:
        """Folders with the name of a finished checkpoint, newest first."""
        return sorted(
            (path for path in self.folder.glob("*") if path.name.isdigit()),
            reverse=True,
        )

    def _read(self, path: Path, like: Progress) -> Progress:
        try:
            return self._checked(path, like)
        except Unusable:
            raise
        except Exception as error:  # what is torn can raise anything
            raise Unusable(f"is torn ({_first_line(error)})") from None

    def _checked(self, path: Path, like: Progress) -> Progress:
        facts = self._orbax.metadata(path).custom_metadata
        facts = facts if isinstance(facts, dict) else {}
        if facts.get("kind") != self.facts["kind"]:
            raise Unusable("is torn, or was made by another program")
        if facts.get("format", 0) > FORMAT:
            raise Unusable("was made by a newer version of this program: update it")
        for fact, sentence in MUST_AGREE.items():
            if facts.get(fact) != self.facts[fact]:
                raise Unusable(sentence)
        content = self._orbax.restore(path)[CONTENT]
        if sha256(content).hexdigest() != facts["sha256"]:
            raise Unusable("is torn (its content does not match its sha256)")
        leaves = _unpacked(content, facts["leaves"])
        progress = _progress(leaves, like, facts["epoch"])
        if (done := self.steps_done(progress)) != int(path.name):
            raise Unusable(f"is torn (it is that of {done} steps)")
        return progress

    def _look_for_room(self, size: int) -> None:
        """Before Orbax begins: its threads speak up in their own way."""
        self.folder.mkdir(exist_ok=True)
        if self._free_bytes() < 2 * size + OVERHEAD:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _failure(self, error: Exception) -> Failed:
        self._pending = None
        whole, run = self._whole(), self.folder.parent
        kept = (
            f"checkpoint {whole[0].name} is whole: go on with --resume {run}"
            if whole
            else "there is none before it"
        )
        # Orbax may tell of a full disk as of one file that it could not write.
        full = self.folder.is_dir() and self._free_bytes() < OVERHEAD
        reason = os.strerror(errno.ENOSPC) if full else _first_line(error)
        remedy = "make room there" if no_room(reason) else "see that it can be"
        return Failed(
            f"A checkpoint cannot be written in {self.folder} ({reason}): "
            f"{remedy}; {kept}."
        )

    def _free_bytes(self) -> int:
        return shutil.disk_usage(self.folder).free


def no_room(reason: str | None) -> bool:
    """Whether that is how the system says that a disk is full."""
    return reason in (os.strerror(errno.ENOSPC), os.strerror(errno.EDQUOT))


class Unusable(Exception):
    """Why a checkpoint cannot be gone on from; the rest of a sentence about it."""


def _leaves(progress: Progress) -> dict[str, np.ndarray]:
    named, _ = jax.tree_util.tree_flatten_with_path(progress._replace(epoch=None))
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): np.asarray(leaf)
        for path, leaf in named
    }


def _progress(leaves: Mapping[str, np.ndarray], like: Progress, epoch: int) -> Progress:
    wanted = _leaves(like)
    for name, leaf in wanted.items():
        found = leaves.get(name)
        if (
            found is None
            or found.dtype != leaf.dtype
            or (found.shape != leaf.shape and name != "losses")
        ):
            raise Unusable(f"is of another model or optimizer ({name} differs)")
    tree = jax.tree.structure(like._replace(epoch=None))
    return jax.tree.unflatten(tree, [leaves[name] for name in wanted])._replace(
        epoch=epoch
    )


def _packed(leaves: Mapping[str, np.ndarray]) -> np.ndarray:
    return np.frombuffer(b"".join(leaf.tobytes() for leaf in leaves.values()), np.uint8)


def _unpacked(
    content: np.ndarray, described: Mapping[str, Sequence[Any]]
) -> dict[str, np.ndarray]:
    leaves, begin = {}, 0
    for name, (dtype, *shape) in described.items():
        end = begin + math.prod(shape) * np.dtype(dtype).itemsize
        leaves[name] = content[begin:end].copy().view(dtype).reshape(shape)
        begin = end
    return leaves


def _first_line(error: Exception) -> str:
    lines = str(getattr(error, "strerror", None) or error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__).rstrip(".")[:200]


def _free(path: Path) -> Path:
    return path if not path.exists() else _free(path.with_name(path.name + "x"))
