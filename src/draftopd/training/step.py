"""The account of one optimizer step: its figures, whether it is finite, and what is kept of it if not."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from draftopd.distributed import ranks
from draftopd.losses.base import LossOutput
from draftopd.replay.batch import ReplayBatch
from draftopd.replay.blocks import Blocks
from draftopd.training.nonfinite import Skips, drop_gradients, keep_batch, largest_gradient, nonfinite_gradients

log = logging.getLogger(__name__)


class StepAccount:
    """Adds up the micro-batches of a step on the device, and closes it over all ranks with one transfer.

    Args:
        drafter: whose gradients are looked at where a step is skipped.
        skips: counts the steps that are skipped because they are not finite.
        directory: receives the batches of skipped steps.
        keep: how many of these batches are kept per rank, the newest.
    """

    def __init__(self, drafter: nn.Module, skips: Skips, directory: Path, keep: int) -> None:
        self.drafter, self.skips, self.directory, self.keep = drafter, skips, directory, keep
        self._names: list[str] = []
        self._sums: Tensor | None = None
        self.batches: list[ReplayBatch] = []
        self._losses: list[Tensor] = []

    def add(self, batch: ReplayBatch, blocks: Blocks, output: LossOutput, proposed: bool) -> None:
        """Add a micro-batch.

        Args:
            proposed: whether the blocks' proposals are the drafter's, so that streams and acceptance mean something.
        """
        aged = batch.made_at[batch.made_at >= 0]
        figures: dict[str, Tensor | int] = {"loss": output.loss.detach()}
        if proposed:
            figures |= {f"loss_{name}": value for name, value in output.parts.items()}
            # What would be accepted behind an accepted stop token is never drafted.
            accepted = blocks.accepted_stream(include_correction=False) & blocks.valid
            figures |= {"accepted slots": accepted.sum(), "blocks": len(accepted)}
        figures |= {"steps of anchors": aged.sum(), "aged anchors": len(aged)}
        figures |= {"tokens": batch.lengths.sum(), "positions": batch.ids.numel()}
        device = output.loss.device
        packed = torch.stack([torch.as_tensor(x, dtype=torch.float64, device=device) for x in figures.values()])
        self._names = list(figures)
        self._sums = packed if self._sums is None else self._sums + packed
        self.batches.append(batch)
        self._losses.append(output.loss.detach())

    def close(self, optimizer: Optimizer, about: dict[str, Any], rescales: bool, stop_asked: bool) -> Figures:
        """Sum the step over micro-batches and ranks; where its loss or a gradient is not finite, drop the gradients.

        Every rank must call it at the same step, with the gradients as they are after the sum over ranks.

        Args:
            about: what is written beside the batch of a skipped step; ``step``, ``rank`` and ``ranks`` among it.
            rescales: whether a loss scale can still be lowered, so that gradients that overflow are ordinary.
            stop_asked: whether this rank was asked to stop.

        Raises:
            NumericsError: after too many skipped steps in a row.
        """
        assert self._sums is not None
        wrong = 1 - largest_gradient(optimizer).isfinite().to(self._sums)
        asked = self._sums.new_tensor([stop_asked])
        *sums, wrong_ranks, asked_ranks = ranks.total(torch.cat([self._sums, wrong[None], asked])).tolist()
        figures = Figures(
            dict(zip(self._names, sums, strict=True)), ranks.count() * len(self.batches), bool(asked_ranks)
        )
        if math.isfinite(figures.sums["loss"]) and not wrong_ranks:
            self.skips.taken()
        elif math.isfinite(figures.sums["loss"]) and rescales:
            # Ordinary under float16: the scaler lowers the scale and the next step fits.
            self.skips.rescaled()
            drop_gradients(optimizer)
        else:
            self._skip(optimizer, figures.sums["loss"], about)
        self._names, self._sums, self.batches, self._losses = [], None, [], []
        return figures

    def _skip(self, optimizer: Optimizer, loss: float, about: dict[str, Any]) -> None:
        self.skips.skipped()
        wrong = nonfinite_gradients(self.drafter)
        about = about | {"skipped_in_a_row": self.skips.in_a_row, "nonfinite_gradients": wrong}
        path = keep_batch(self.directory, self.keep, self.batches, torch.stack(self._losses).tolist(), about)
        drop_gradients(optimizer)
        what = "A gradient is not finite" if math.isfinite(loss) else f"The loss is {loss}"
        if about["rank"] == 0:
            log.warning("%s: step %d is skipped%s.", what, about["step"], f", its batch is {path}" if path else "")
        self.skips.check(about["step"], what)


class Figures:
    """The sums of a step over all its micro-batches and ranks.

    Args:
        sums: by name.
        terms: how many micro-batches of how many ranks they are of.
        stop_asked: whether any rank was asked to stop.
    """

    def __init__(self, sums: dict[str, float], terms: int, stop_asked: bool) -> None:
        self.sums, self.terms, self.stop_asked = sums, terms, stop_asked

    @property
    def tokens(self) -> int:
        """Recorded tokens that the step has seen."""
        return int(self.sums["tokens"])

    def logged(self, step: int) -> dict[str, float]:
        """What is logged of the step.

        Args:
            step: optimizer steps taken, from which the age of anchors counts.
        """
        sums = self.sums
        logged = {name: total / self.terms for name, total in sums.items() if name.startswith("loss")}
        logged["padding"] = 1 - sums["tokens"] / sums["positions"]
        if "blocks" in sums:
            logged["accepted_length"] = sums["accepted slots"] / max(1.0, sums["blocks"])
        if sums["aged anchors"]:
            logged["anchor_age"] = step - sums["steps of anchors"] / sums["aged anchors"]
        return logged
