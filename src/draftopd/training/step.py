"""One optimizer step: its figures, whether it is finite, and its batch if it is not."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from draftopd.distributed import ranks
from draftopd.errors import ConfigError
from draftopd.losses.base import LossOutput
from draftopd.metrics.agreement import Agreement, slot_agreement
from draftopd.metrics.entropy_acceptance import EntropyAcceptance
from draftopd.replay.batch import ReplayBatch
from draftopd.replay.blocks import Blocks
from draftopd.training.nonfinite import Skips, drop_gradients, keep_batch, largest_gradient, nonfinite_gradients

log = logging.getLogger(__name__)


class StepAccount:
    """Adds up the micro-batches of a step on the device, and sums them over all ranks with one transfer.

    Args:
        drafter: its non-finite gradients are named when a step is skipped.
        skips: counts the steps that are skipped because they are not finite.
        keep: at most this many of the newest skipped batches are kept per rank.

    Raises:
        ConfigError: if ``keep`` is negative.
    """

    def __init__(self, drafter: nn.Module, skips: Skips, keep: int) -> None:
        if keep < 0:
            raise ConfigError(f"module.keep_nonfinite must be 0 or more, found {keep}.")
        self.drafter, self.skips, self.keep = drafter, skips, keep

    def begin(self, directory: Path) -> None:
        """Begin the first step; ``directory`` receives the batches of skipped steps."""
        self.directory = directory
        self._reset()

    def _reset(self) -> None:
        self._names: list[str] = []
        self._sums: Tensor | None = None
        self.batches: list[ReplayBatch] = []
        self._losses: list[Tensor] = []

    def add(self, batch: ReplayBatch, blocks: Blocks, output: LossOutput, proposed: bool) -> None:
        """Add a micro-batch.

        Args:
            proposed: whether the blocks hold the drafter's proposals; without them streams and acceptance are not
                logged.
        """
        aged = batch.made_at[batch.made_at >= 0]
        figures: dict[str, Tensor | int] = {"loss": output.loss.detach()}
        if proposed:
            figures |= {f"loss_{name}": value for name, value in output.parts.items()}
            # Slots after an accepted stop token are never drafted.
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
        """Sum the step over micro-batches and ranks; drop the gradients if the loss or a gradient is not finite.

        Every rank must call it at the same step, after gradients were summed over ranks.

        Args:
            about: ``step``, ``rank`` and other fields of the record beside the batch of a skipped step.
            rescales: whether the loss scale can still be lowered, so that an overflow does not count.
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
            # The scaler lowers the scale, and the next step fits into float16.
            self.skips.rescaled()
            drop_gradients(optimizer)
        else:
            self._skip(optimizer, figures.sums["loss"], about)
        self._reset()
        return figures

    def _skip(self, optimizer: Optimizer, loss: float, about: dict[str, Any]) -> None:
        self.skips.skipped()
        wrong = nonfinite_gradients(self.drafter)
        about = about | {"ranks": ranks.count(), "skipped_in_a_row": self.skips.in_a_row, "nonfinite_gradients": wrong}
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
        terms: number of micro-batches, over all ranks.
        stop_asked: whether any rank was asked to stop.
    """

    def __init__(self, sums: dict[str, float], terms: int, stop_asked: bool) -> None:
        self.sums, self.terms, self.stop_asked = sums, terms, stop_asked

    @property
    def tokens(self) -> int:
        """Recorded tokens of the step."""
        return int(self.sums["tokens"])

    def logged(self, step: int) -> dict[str, float]:
        """The figures to log; the age of anchors counts back from ``step``, the optimizer steps taken."""
        sums = self.sums
        logged = {f"train/{name}": total / self.terms for name, total in sums.items() if name.startswith("loss")}
        logged["train/padding"] = 1 - sums["tokens"] / sums["positions"]
        if "blocks" in sums:
            logged["train/accepted_length"] = sums["accepted slots"] / max(1.0, sums["blocks"])
        if sums["aged anchors"]:
            logged["train/anchor_age"] = step - sums["steps of anchors"] / sums["aged anchors"]
        return logged


class Comparison(nn.Module):
    """How target and drafter compare on the drafter's own tokens, per logged step and per epoch."""

    def __init__(self) -> None:
        super().__init__()
        self.agreement, self.by_entropy = Agreement(), EntropyAcceptance()

    def step(self, blocks: Blocks) -> dict[str, Tensor]:
        """The figures of blocks with scores in every slot; every rank must call it."""
        found = slot_agreement(blocks)
        self.agreement.update(blocks, found)
        self.by_entropy.update(found.target_entropy, blocks.accepted, blocks.valid)
        figures = {f"train/{name}": value for name, value in self.agreement.compute().items()}
        self.agreement.reset()
        return figures

    def epoch(self) -> dict[str, float]:
        """Acceptance rates by the target's entropy since the last call; empty if no step was logged."""
        if not self.by_entropy.update_called:
            return {}
        rates = self.by_entropy.compute()
        self.by_entropy.reset()
        return {f"acceptance_by_target_entropy/from_{edge:g}_nats": rate for edge, rate in rates.items()}
