"""Training checkpoints: written whole, the one before kept, and none read that is damaged."""

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

#: Training goes on from ``LAST``; ``PREVIOUS`` is what that was before.
LAST, PREVIOUS = "last.ckpt", "previous.ckpt"

#: Of what a checkpoint holds; kept in it under ``_KEY``.
FORMAT = 1
_KEY = "draftopd_format"


class CheckpointFiles(TorchCheckpointIO):
    """Writes checkpoints whole or not at all, and keeps the one before the last.

    They are torch's files, read by ``torch.load``: zip archives, whose CRC-32 of every tensor :func:`read` checks.
    Lightning's own writer syncs nothing, and moves the file from the system's temporary directory, which between
    file systems is a copy.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any = None
    ) -> None:
        """Write a checkpoint in place of the one that is there.

        Raises:
            FileError: if it cannot be written; what was there before stays.
        """
        place = Path(path)
        with writing(place):
            place.parent.mkdir(parents=True, exist_ok=True)
        with replaced(place) as partial:
            with partial.open("wb") as file:
                try:
                    torch.save({**checkpoint, _KEY: FORMAT}, file)
                except RuntimeError as error:
                    # torch hides what the system said.
                    if isinstance(error.__context__, OSError):
                        raise error.__context__ from error
                    raise
            if place.name == LAST and place.exists():
                _keep(place, place.with_name(PREVIOUS))


def _keep(path: Path, other: Path) -> None:
    """Give a file's content a second name, which stays when the first is replaced."""
    with replaced(other) as partial:
        try:
            os.link(path, partial)
        except OSError:  # not every file system has links
            shutil.copyfile(path, partial)


def read(path: Path) -> dict[str, Any]:
    """A checkpoint of a training run, its tensors still on disk, every byte of them checked.

    Raises:
        FileError: if it is absent, damaged, no checkpoint of a training run, or of another format.
    """
    try:
        # torch.load looks at no checksum: a flipped bit would go unnoticed.
        with zipfile.ZipFile(path) as archive:
            wrong = archive.testzip()
        if wrong is not None:
            raise FileError(
                f"The checkpoint {path} is damaged: the checksum of {shown(wrong, 100)} differs: use another."
            )
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        if not isinstance(checkpoint, dict) or not {"drafter", "state_dict"} <= checkpoint.keys():
            raise TypeError("it holds no drafter")
        described, weights = checkpoint["drafter"], checkpoint["state_dict"]
        if (
            not isinstance(described, dict)
            or not isinstance(weights, dict)
            or not all(map(_is_weight, weights.items()))
        ):
            raise TypeError("it holds no drafter")
    except FileError:
        raise
    except Exception as error:  # torch.load has no kind of error of its own
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        if isinstance(error, pickle.UnpicklingError):
            # torch's own advice is to load it all the same, which would run what it holds.
            reason = "it holds something else than tensors and plain values, which is never loaded"
        raise FileError(
            f"{path} is no checkpoint of a training run, or damaged: {shown(reason)}. Name a run's "
            "checkpoints/last.ckpt or best.ckpt, or a drafter's directory."
        ) from error
    found = checkpoint.get(_KEY, FORMAT)
    if found != FORMAT:
        raise FileError(
            f"The checkpoint {path} has format {shown(found, 40)}, this version reads {FORMAT}: use the version that "
            "wrote it, or name another."
        )
    return checkpoint


def _is_weight(item: tuple[Any, Any]) -> bool:
    return isinstance(item[0], str) and isinstance(item[1], torch.Tensor)


def newest_whole(directory: Path) -> Path | None:
    """The checkpoint to go on from; None where there is none. A damaged one is named in the log and passed over.

    Raises:
        FileError: if there are checkpoints, but none that is whole.
    """
    found = [path for path in (directory / LAST, directory / PREVIOUS) if path.exists()]
    for path in found:
        try:
            read(path)
        except FileError as error:
            log.warning("%s", error)
        else:
            if path.name == PREVIOUS:
                log.warning("Training goes on from the checkpoint before the last: the steps between are taken again.")
            return path
    if found:
        raise FileError(
            f"No checkpoint in {directory} can be used: {' and '.join(path.name for path in found)}, see above. Delete "
            "the directory to begin anew with the same command, or train a drafter kept elsewhere on "
            "(drafter.checkpoint=DIR with another hydra.run.dir)."
        )
    return None


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
