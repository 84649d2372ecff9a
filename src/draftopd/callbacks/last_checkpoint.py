"""Keeps the checkpoint that the same command continues from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException


class LastCheckpoint(Checkpoint):
    """Writes ``last.ckpt`` between steps: a run continued from it repeats no step and leaves none out.

    The last step of an epoch is kept together with the validation that follows it, at the end of the epoch. On
    SIGTERM the step in flight is finished and kept too.

    Args:
        path: the file.
        every_n_steps: optimizer steps between two writings; the ends of epochs come on top.
    """

    def __init__(self, path: Path, every_n_steps: int) -> None:
        self.path, self.every_n_steps = Path(path), every_n_steps
        self._kept = -1

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._kept = trainer.global_step

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *step: Any) -> None:
        loop = trainer.fit_loop.epoch_loop
        # Lightning takes an epoch whose last step is kept for a finished one, and would leave its validation out.
        due = trainer.global_step % self.every_n_steps == 0 and trainer.global_step != self._kept
        if due and not loop.batch_progress.is_last_batch:
            self._keep(trainer)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._keep(trainer)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        # Lightning raises it between two steps, or in validation, before which nothing is to be kept.
        if isinstance(exception, SIGTERMException) and trainer.training and trainer.global_step != self._kept:
            self._keep(trainer)

    def _keep(self, trainer: L.Trainer) -> None:
        self._kept = trainer.global_step
        trainer.save_checkpoint(self.path, weights_only=False)  # said, or Lightning logs that it was not
