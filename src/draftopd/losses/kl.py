"""Forward and reverse KL on every slot (GKD, arXiv 2306.13649)."""

from __future__ import annotations

from torch import Tensor

from draftopd.losses.base import SlotLoss
from draftopd.losses.divergence import forward_kl, reverse_kl


class ForwardKL(SlotLoss):
    """``KL(p || q)`` on every slot."""

    def slot(self, student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
        return forward_kl(student_logits, teacher_logits)


class ReverseKL(SlotLoss):
    """``KL(q || p)`` on every slot."""

    def slot(self, student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
        return reverse_kl(student_logits, teacher_logits)
