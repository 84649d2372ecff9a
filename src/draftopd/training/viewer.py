"""Decoded texts marked with their blocks, and the histogram of rejections, in TensorBoard."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import TensorBoardLogger

from draftopd.decoding.draft_text import as_markdown, blocks_of
from draftopd.decoding.generate import Decoded
from draftopd.training.datamodule import ReplayDataModule
from draftopd.training.module import DraftModule


class DraftViewer(L.Callback):
    """After each validation, write its first decoded texts, marked by block, and the rejections to TensorBoard.

    Args:
        prompts: number of texts shown.
    """

    def __init__(self, prompts: int = 2) -> None:
        self.prompts = prompts
        self._decoded: list[Decoded] = []

    def on_validation_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:  # fmt: skip
        if batch_idx == 0:
            self._decoded = outputs["decoded"][: self.prompts]

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, DraftModule)
        counts = pl_module.held_out.rejections.compute().cpu()  # every rank must call it
        loggers = [logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
        if trainer.sanity_checking or not trainer.is_global_zero or not loggers:
            return
        data = trainer.datamodule  # type: ignore[attr-defined]
        assert isinstance(data, ReplayDataModule) and data.encoder is not None
        tokenizer = data.encoder.tokenizer
        texts = [as_markdown(blocks_of(d, tokenizer)) for d in self._decoded]
        positions = torch.arange(1, len(counts) + 1)
        for logger in loggers:
            board = logger.experiment
            if counts.sum():
                edges = torch.arange(0.5, len(counts) + 1.5)
                drawn = positions.repeat_interleave(counts).float()
                board.add_histogram("val/rejection_position", drawn, trainer.global_step, bins=edges.numpy())
            for index, text in enumerate(texts):
                board.add_text(f"drafts/prompt_{index}", text, trainer.global_step)
