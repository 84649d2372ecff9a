"""What the drafter does, for the eye: decoded text with its blocks, and the rejection histogram."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from transformers import PreTrainedTokenizerBase

from draftopd.decoding.generate import Decoded
from draftopd.module import DraftModule


def mark_blocks(decoded: Decoded, tokenizer: PreTrainedTokenizerBase) -> str:
    """Markdown of one decode: accepted proposals bold, the target's token as code, rejected ones italic."""

    def show(tokens: list[int]) -> str:
        text = str(tokenizer.decode(tokens))
        for plain, marked in (("\\", "\\\\"), ("*", "\\*"), ("_", "\\_"), ("~", "\\~"), ("<", "&lt;"), ("\n", "⏎")):
            text = text.replace(plain, marked)
        return text.strip() or "␣" * len(text)

    lines = ["| block | accepted | correction or bonus | rejected | n |", "|---|---|---|---|---|"]
    start = 1
    for i, (n, emitted) in enumerate(zip(decoded.accepted, decoded.emitted, strict=True)):
        kept = decoded.response[start : start + emitted]
        accepted, token = kept[:n], kept[n:]
        rejected = decoded.proposals[i][n:]
        cells = [
            f"**{show(accepted)}**" if accepted else "",
            f"`{show(token)}`" if token else "",
            f"*{show(rejected)}*" if rejected and token else "",
        ]
        lines.append(f"| {i + 1} | {' | '.join(c.replace('|', '&#124;') for c in cells)} | {n} |")
        start += emitted
    return "\n".join(lines)


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
        counts = pl_module.rejections.compute().cpu()
        loggers = [logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
        if not loggers or not trainer.is_global_zero or trainer.sanity_checking:
            return
        step = trainer.global_step
        texts = (
            [mark_blocks(d, self.tokenizer) for d in pl_module.decoder().decode_batch(self.shown)] if self.shown else []
        )
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
