"""An interrupted fit goes on: where its checkpoint lies, when it is written, and how without ever being torn."""

import os
import shutil
import time
import zipfile
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities.exceptions import SIGTERMException

from zoo.errors import ZooError
from zoo.run import RunOptions


class WholeFiles(TorchCheckpointIO):
    """Checkpoints are written beside their place and renamed there; Lightning's may be copied from another disk."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}")  # one process writes
        try:
            with open(temporary, "wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


class Unfinished(L.Callback):
    """Keeps the checkpoint of a fit that is under way.

    Args:
        path: of the checkpoint.
        minutes: between two of them; one more is written when the run is asked to end (SIGTERM).
        say: told where a resumed fit goes on.

    Attributes:
        spent: seconds that earlier processes have fitted for, up to the checkpoint that this one goes on from.
    """

    def __init__(self, path: Path, minutes: float, say: Callable[[str], None] = lambda line: None):
        self.path, self.minutes, self.say = path, minutes, say
        self.spent, self.begin = 0.0, time.monotonic()

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.saved = time.monotonic()
        if done := trainer.fit_loop.epoch_loop.batch_progress.current.ready:
            epoch = f" of epoch {trainer.current_epoch + 1}" if trainer.max_epochs != 1 else ""
            self.say(f"Going on after batch {done} of {trainer.num_training_batches}{epoch}.")

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if (batch_idx + 1) % trainer.accumulate_grad_batches:  # gradients are not kept
            return
        due = time.monotonic() - self.saved >= 60 * self.minutes
        if trainer.strategy.broadcast(due):  # one answer for all processes
            trainer.save_checkpoint(self.path)
            self.saved = time.monotonic()

    def on_exception(self, trainer: L.Trainer, module: L.LightningModule, exception: BaseException) -> None:
        done = trainer.fit_loop.epoch_loop.batch_progress.current.processed
        between = not done % trainer.accumulate_grad_batches  # raised between two batches, so between two steps
        if isinstance(exception, SIGTERMException) and between:
            trainer.save_checkpoint(self.path)

    def state_dict(self) -> dict[str, float]:
        return {"seconds": self.spent + time.monotonic() - self.begin}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.spent = state["seconds"]

    def discard(self) -> None:
        """Remove it: the fit is done."""
        shutil.rmtree(self.path.parent, ignore_errors=True)


def checkpoint_to_resume(path: Path, resume: bool, run: RunOptions) -> Path | None:
    """The checkpoint of an unfinished fit to go on from, if it is wanted and there is one; says what happens.

    Raises:
        ZooError: it is damaged.
    """
    if not path.is_file():
        if resume:
            run.say("There is no unfinished fit of this name; it starts from the beginning.")
        return None
    if not resume:
        run.say("An unfinished fit of this name will be given up; --resume would go on with it.")
        return None
    if not zipfile.is_zipfile(path):
        raise ZooError(f"{path} is damaged; start the fit anew, without --resume.")
    return path


def drop_unusable(path: Path, say: Callable[[str], None]) -> None:
    """Remove a checkpoint that no fit can go on from, with a line: damaged, or of another version of the zoo."""
    if not path.is_file():
        return
    try:
        version = torch.load(path, map_location="cpu", weights_only=True)["zoo_version"]
        why = "" if version == metadata.version("zoo") else f"is of zoo {version}"
    except Exception:  # whatever torch makes of such a file
        why = "can't be read"
    if why:
        say(f"    The checkpoint of an interrupted fit {why}; it is begun anew.")
        path.unlink()
