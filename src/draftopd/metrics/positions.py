"""Acceptance rates by position in the block, and the position of the first rejection."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric


def accepted_length_counts(accepted: Tensor, slots: int) -> Tensor:
    """How many blocks accepted ``0..slots`` proposals: ``[N] -> [slots + 1]``.

    Example:
        >>> accepted_length_counts(torch.tensor([0, 2, 2]), slots=2)
        tensor([1, 0, 2])
    """
    return torch.bincount(accepted.flatten().long().cpu(), minlength=slots + 1)


class _AcceptedLengths(Metric):
    """Counts of accepted lengths, the state of both metrics below."""

    full_state_update = False
    counts: Tensor
    cut: Tensor

    def __init__(self, slots: int) -> None:
        super().__init__()
        self.slots = slots
        for name in ("counts", "cut"):
            self.add_state(name, torch.zeros(slots + 1, dtype=torch.long), dist_reduce_fx="sum")

    def update(self, accepted: Tensor, emitted: Tensor | None = None) -> None:
        """Add blocks by their accepted lengths ``[...]``, 0..slots, and the tokens ``[...]`` that each emitted.

        A block that emitted no more than it accepted was cut short by the end of the text: the emitted slots were
        accepted, the others are unknown. None: no block was cut short.
        """
        cut = torch.zeros_like(accepted, dtype=torch.bool) if emitted is None else emitted <= accepted
        self.counts += accepted_length_counts(accepted[~cut], self.slots).to(self.counts.device)
        if emitted is not None:
            self.cut += accepted_length_counts(emitted[cut], self.slots).to(self.cut.device)


class AcceptanceByPosition(_AcceptedLengths):
    """Acceptance rate of each block position, ``[slots]``.

    Entry ``k`` is the fraction of blocks that accept proposal ``k + 1`` among those that test it; NaN where none does.

    Example:
        >>> metric = AcceptanceByPosition(slots=2)
        >>> metric.update(torch.tensor([0, 1, 2, 2]))
        >>> metric.compute()
        tensor([0.7500, 0.6667])
    """

    def compute(self) -> Tensor:
        whole, cut = (counts.flip(0).cumsum(0).flip(0).float() for counts in (self.counts, self.cut))
        return (whole[1:] + cut[1:]) / (whole[:-1] + cut[1:])


class RejectionPosition(_AcceptedLengths):
    """Histogram of the rejection position ``1..slots``; the last entry counts fully accepted blocks.

    Blocks that the end of the text cut short are not counted.

    Example:
        >>> metric = RejectionPosition(slots=2)
        >>> metric.update(torch.tensor([0, 1, 2, 2]))
        >>> metric.compute()
        tensor([1, 1, 2])
    """

    def compute(self) -> Tensor:
        return self.counts
