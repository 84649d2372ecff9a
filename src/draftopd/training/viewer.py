"""What the drafter does, for the eye: decoded text with its blocks, and the rejection histogram."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from transformers import PreTrainedTokenizerBase

from draftopd.decoding.draft_text import as_markdown, blocks_of
from draftopd.training.module import DraftModule


class DraftViewer(L.Callback):
    """After each validation, write a few marked decodes and the rejection histogram to TensorBoard.

    Args:
        tokenizer: the target's.
        prompts: how many decodes to show.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompts: int = 2) -> None:
        self.tokenizer, self.prompts = tokenizer, prompts
        self.shown: list[list[int]] = []

    def on_validation_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if batch_idx == 0:
            self.shown = batch[: self.prompts]

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, DraftModule)
        loggers = [logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
        shows = bool(loggers) and trainer.is_global_zero and not trainer.sanity_checking
        decoded = pl_module.decoder().decode_batch(self.shown) if shows and self.shown else []
        pl_module.end_of_decoding()
        counts = pl_module.rejections.compute().cpu()
        if not shows:
            return
        step = trainer.global_step
        texts = [as_markdown(blocks_of(d, self.tokenizer)) for d in decoded]
        positions = torch.arange(1, len(counts) + 1)
        for logger in loggers:
            board = logger.experiment
            if counts.sum():
                edges = torch.arange(0.5, len(counts) + 1.5)
                board.add_histogram(
                    "val/rejection_position", positions.repeat_interleave(counts).float(), step, bins=edges.numpy()
                )
            for index, text in enumerate(texts):
                board.add_text(f"drafts/prompt_{index}", text, step)
