"""Held-out tau: the metrics of validation and the texts of the test."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from draftopd.decoding.generate import Decoded
from draftopd.distributed import ranks
from draftopd.metrics.acceptance_length import AcceptanceLength, acceptance_length
from draftopd.metrics.positions import AcceptanceByPosition, RejectionPosition


class HeldOut(nn.Module):
    """Metrics of the decoded held-out prompts.

    Args:
        slots: proposals per block.
    """

    def __init__(self, slots: int) -> None:
        super().__init__()
        self.tau = AcceptanceLength()
        self.by_position = AcceptanceByPosition(slots)
        self.rejections = RejectionPosition(slots)
        #: Tokens emitted per block of every test prompt, by the prompt's index.
        self.tested: dict[int, list[int]] = {}

    def reset(self) -> None:
        """Begin a validation."""
        for metric in (self.tau, self.by_position, self.rejections):
            metric.reset()

    def update(self, decoded: Sequence[Decoded]) -> None:
        """Add decoded validation prompts."""
        self.tau.update([d.emitted for d in decoded])
        blocks = [pair for d in decoded for pair in zip(d.accepted, d.emitted, strict=True)]
        accepted, emitted = torch.tensor(blocks, device=self.tau.emitted.device).view(-1, 2).T
        self.by_position.update(accepted, emitted)
        self.rejections.update(accepted, emitted)

    def compute(self) -> dict[str, Tensor]:
        """``val/tau``, ``val/tau_macro``, ``val/acceptance_position_K`` over all ranks; every rank must call it."""
        tau = {name: value.float() for name, value in self.tau.compute().items()}
        figures = {"val/tau": tau["micro"], "val/tau_macro": tau["macro"]}
        for slot, rate in enumerate(self.by_position.compute(), start=1):
            if not math.isnan(rate):
                figures[f"val/acceptance_position_{slot}"] = rate
        return figures

    def compute_test(self) -> dict[str, float]:
        """``test/tau`` and ``test/tau_macro``; gathers ``tested`` from all ranks, so every rank must call it."""
        parts = ranks.gathered(self.tested)
        self.tested = {index: emitted for part in parts for index, emitted in part.items()}
        micro, macro = acceptance_length(list(self.tested.values()))
        return {"test/tau": micro, "test/tau_macro": macro}
