"""Cross entropy on the recorded tokens: the SFT stage (DFlash, arXiv 2602.06036)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from draftopd.losses import liger
from draftopd.losses.base import Loss, LossOutput
from draftopd.losses.blocks import Blocks
from draftopd.losses.chunked import per_slot
from draftopd.losses.weighting import cross_entropy_gamma, exponential_decay, weighted_mean


class CrossEntropy(Loss):
    """``-log q(recorded token)``, slot ``k`` weighted ``exp(-(k-1) / gamma)``.

    Args:
        gamma: decay constant; None takes DFlash's for the block size (7, 5, 4 for 16, 10, 8).
        accept_until_fail: drop the slots after the first proposal that differs from the recorded token.
    """

    teacher = "none"

    def __init__(self, gamma: float | None = None, accept_until_fail: bool = False) -> None:
        if gamma is not None and gamma <= 0:
            raise ValueError(f"gamma must be above 0, found {gamma}.")
        self.gamma = gamma
        self.accept_until_fail = accept_until_fail

    def __call__(self, blocks: Blocks) -> LossOutput:
        slots = blocks.proposals.shape[1]
        decay = exponential_decay(slots, self.gamma or cross_entropy_gamma(slots + 1)).to(blocks.student.device)
        weights = decay * blocks.recorded
        if self.accept_until_fail:
            weights = weights * blocks.until_fail()
        used = weights > 0
        student, labels = blocks.student[used], blocks.labels[used]
        if liger.fits(student):
            values = liger.cross_entropy(student, blocks.head, labels)
        else:
            values = per_slot(_cross_entropy, student, blocks.head, labels)
        loss = weighted_mean(values, weights[used])
        return LossOutput(loss, {"cross_entropy": loss.detach()})


def _cross_entropy(student_logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(student_logits, labels, reduction="none")
