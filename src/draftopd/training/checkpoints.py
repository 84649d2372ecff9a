"""Training checkpoints: written whole, checked when they are read, and the previous one is kept."""

from __future__ import annotations

import logging
import os
import pickle
import shutil
import zipfile
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException

from draftopd.errors import FileError
from draftopd.io.files import replaced, writing
from draftopd.io.json_text import shown

log = logging.getLogger(__name__)

#: Training continues from ``LAST``; ``PREVIOUS`` is the checkpoint before it.
LAST, PREVIOUS = "last.ckpt", "previous.ckpt"

#: Version of a checkpoint's content, stored in it under ``_KEY``.
FORMAT = 1
_KEY = "draftopd_format"


class CheckpointFiles(TorchCheckpointIO):
    """Writes checkpoints whole or not at all, and keeps the previous one.

    They are torch's zip archives, and :func:`read` checks the CRC-32 of every tensor. Lightning's own writer does not
    sync, and it moves the file from the system's temporary directory, which copies it between file systems.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any = None
    ) -> None:
        """Write a checkpoint, which replaces the one at this path.

        Raises:
            FileError: if it cannot be written; the earlier one then stays.
        """
        path = Path(path)
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        with replaced(path) as partial:
            with partial.open("wb") as file:
                try:
                    torch.save({**checkpoint, _KEY: FORMAT}, file)
                except RuntimeError as error:
                    # torch hides the system's error.
                    if isinstance(error.__context__, OSError):
                        raise error.__context__ from error
                    raise
            if path.name == LAST and path.exists():
                _keep(path, path.with_name(PREVIOUS))


def _keep(path: Path, other: Path) -> None:
    """Give a file's content a second name, which stays when the first is replaced."""
    with replaced(other) as partial:
        try:
            os.link(path, partial)
        except OSError:  # some file systems have no links
            shutil.copyfile(path, partial)


def read(path: Path) -> dict[str, Any]:
    """A checkpoint of a training run, its tensors still on disk, every byte of them checked.

    Raises:
        FileError: if it is absent, damaged, not a checkpoint of a training run, or of another format.
    """
    try:
        # torch.load checks no checksum: a flipped bit would go unnoticed.
        with zipfile.ZipFile(path) as archive:
            wrong = archive.testzip()
        if wrong is not None:
            raise FileError(
                f"The checkpoint {path} is damaged: the checksum of {shown(wrong, 100)} differs: use another."
            )
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        if not _holds_drafter(checkpoint):
            raise TypeError("it holds no drafter")
    except FileError:
        raise
    except Exception as error:  # torch.load has no kind of error of its own
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        if isinstance(error, pickle.UnpicklingError):
            # torch advises to load it anyway, which would run the code in it.
            reason = "it holds something other than tensors and plain values, which is never loaded"
        raise FileError(
            f"{path} is not a checkpoint of a training run, or is damaged: {shown(reason)}. Name a run's "
            "checkpoints/last.ckpt or best.ckpt, or a drafter's directory."
        ) from error
    found = checkpoint.get(_KEY, FORMAT)
    if found != FORMAT:
        raise FileError(
            f"The checkpoint {path} has format {shown(found, 40)}, this version reads {FORMAT}: use the version that "
            "wrote it, or name another."
        )
    return checkpoint


def _holds_drafter(checkpoint: Any) -> bool:
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("drafter"), dict):
        return False
    weights = checkpoint.get("state_dict")
    return isinstance(weights, dict) and all(isinstance(k, str) and torch.is_tensor(v) for k, v in weights.items())


def newest_whole(directory: Path) -> Path | None:
    """The checkpoint to continue from, or None where there is none. A damaged one is logged and skipped.

    Raises:
        FileError: if there are checkpoints and all are damaged.
    """
    found = [path for path in (directory / LAST, directory / PREVIOUS) if path.exists()]
    for path in found:
        try:
            read(path)
        except FileError as error:
            log.warning("%s", error)
        else:
            if path.name == PREVIOUS:
                log.warning("Training continues from the previous checkpoint and repeats the steps after it.")
            return path
    if found:
        raise FileError(
            f"No checkpoint in {directory} can be used: {' and '.join(path.name for path in found)}, see above. Delete "
            "the directory to start again with the same command, or continue from a drafter elsewhere "
            "(drafter.checkpoint=DIR with another hydra.run.dir)."
        )
    return None


class LastCheckpoint(Checkpoint):
    """Writes ``last.ckpt`` between steps: a run continued from it repeats no step and leaves none out.

    The last step of an epoch is saved with the validation after it, at the end of the epoch. On SIGTERM the current
    step is finished and saved too.

    Args:
        every_n_steps: optimizer steps between two checkpoints; the end of an epoch adds one.
    """

    def __init__(self, path: Path, every_n_steps: int) -> None:
        self.path, self.every_n_steps = Path(path), every_n_steps
        self._saved = -1

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._saved = trainer.global_step

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *step: Any) -> None:
        loop = trainer.fit_loop.epoch_loop
        # Lightning counts an epoch whose last step is saved as finished, and would leave its validation out.
        due = trainer.global_step % self.every_n_steps == 0 and trainer.global_step != self._saved
        if due and not loop.batch_progress.is_last_batch:
            self._save(trainer)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._save(trainer)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        # Lightning raises it between two steps, or in validation, where no step is new.
        if isinstance(exception, SIGTERMException) and trainer.training and trainer.global_step != self._saved:
            self._save(trainer)

    def _save(self, trainer: L.Trainer) -> None:
        self._saved = trainer.global_step
        trainer.save_checkpoint(self.path, weights_only=False)  # stated, or Lightning logs that it was not
