"""tau, the acceptance length: tokens emitted per verification."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics import Metric


def acceptance_length(emitted: Sequence[Sequence[int]]) -> tuple[float, float]:
    """Micro and macro tau of prompts, each given as its blocks' emitted token counts.

    Micro: all emitted tokens divided by all verifications. Macro: mean over prompts of the prompt's own mean. Prompts
    without a block do not count.

    Example:
        >>> acceptance_length([[4, 2], [1]])
        (2.3333333333333335, 2.0)
    """
    rows = [row for row in emitted if row]
    if not rows:
        return float("nan"), float("nan")
    micro = sum(map(sum, rows)) / sum(map(len, rows))
    return micro, sum(sum(row) / len(row) for row in rows) / len(rows)


class AcceptanceLength(Metric):
    """Streaming :func:`acceptance_length`; computes ``{"micro", "macro"}``.

    Example:
        >>> metric = AcceptanceLength()
        >>> metric.update([[4, 2], [1]])
        >>> metric.compute()["macro"]
        tensor(2., dtype=torch.float64)
    """

    full_state_update = False
    emitted: Tensor
    blocks: Tensor
    means: Tensor
    prompts: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("emitted", "blocks", "means", "prompts"):
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, emitted: Sequence[Sequence[int]]) -> None:
        """Add prompts, each as its blocks' emitted token counts."""
        for row in emitted:
            if row:
                self.emitted += sum(row)
                self.blocks += len(row)
                self.means += sum(row) / len(row)
                self.prompts += 1

    def compute(self) -> dict[str, Tensor]:
        return {"micro": self.emitted / self.blocks, "macro": self.means / self.prompts}
