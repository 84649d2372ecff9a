"""Runs of the commands, in this process or in processes of their own, and what they leave."""

from __future__ import annotations

import io
import logging
import os
import runpy
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from unittest import mock

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tests.support.paths import ROOT

from draftopd.cli import app

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


def in_process(name: str, *overrides: str) -> subprocess.CompletedProcess[str]:
    """Runs ``train.py`` or ``eval.py`` as the fixture ``script`` does, but here: without seconds of imports.

    All but the end of the process is the command's own. What has to do with processes (signals, exit, several ranks,
    what is imported when) needs ``script``.
    """
    out, err, status = io.StringIO(), io.StringIO(), None
    command = [str(ROOT / name), *overrides]
    with (
        mock.patch.dict(os.environ, {"COLUMNS": "200"}),
        mock.patch.object(sys, "argv", command),
        mock.patch.object(app, "_leave", sys.exit),
        torch.random.fork_rng([]),
        _own_logging(),
        redirect_stdout(out),
        redirect_stderr(err),
    ):
        try:
            runpy.run_path(command[0], run_name="__main__")
        except SystemExit as ended:
            status = ended.code
    if isinstance(status, str):
        print(status, file=err)
        status = 1
    return subprocess.CompletedProcess(command, status or 0, out.getvalue(), err.getvalue())


@contextmanager
def _own_logging() -> Iterator[None]:
    """Hydra gives each job handlers of its own, for its directory."""
    root = logging.getLogger()
    before, level = list(root.handlers), root.level
    try:
        yield
    finally:
        for handler in root.handlers:
            if handler not in before:
                handler.close()
        root.handlers[:] = before
        root.setLevel(level)


def events(run: Path) -> EventAccumulator:
    """What a run wrote for TensorBoard."""
    found = EventAccumulator(str(run / "tensorboard"))
    found.Reload()
    return found


def scalars(run: Path, tag: str) -> list[float]:
    """The values of one tag, in the order of their steps."""
    return [event.value for event in events(run).Scalars(tag)]
