"""Runs of the commands in processes of their own."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

Script = Callable[..., "subprocess.CompletedProcess[str]"]


#: A run of seconds on a small random target.
SMALL = (
    "data.prompts_per_refresh=8", "data.batches_per_epoch=null", "data.validation_count=4", "data.batch_size=4",
    "data.validation_batch_size=4",
    "max_new_tokens=12", "trainer.max_epochs=2", "trainer.enable_progress_bar=false",
    "checkpoint.every_n_steps=1",
)  # fmt: skip


#: A fresh drafter of one layer.
DRAFTER = ("drafter.num_layers=1", "drafter.block_size=4")


def events(run: Path) -> EventAccumulator:
    """What a run wrote for TensorBoard."""
    found = EventAccumulator(str(run / "tensorboard"))
    found.Reload()
    return found


def scalars(run: Path, tag: str) -> list[float]:
    """The values of one tag, in the order of their steps."""
    return [event.value for event in events(run).Scalars(tag)]
