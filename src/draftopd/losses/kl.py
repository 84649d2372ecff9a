"""Forward KL, reverse KL and what lies between, on every slot (GKD, arXiv 2306.13649)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from draftopd.losses.base import SlotLoss
from draftopd.losses.divergence import forward_kl, jensen_shannon, reverse_kl


class ForwardKL(SlotLoss):
    """``KL(p || q)`` on every slot."""

    def slot(self, draft_logits: Tensor, target_logits: Tensor) -> Tensor:
        return forward_kl(draft_logits, target_logits)


class ReverseKL(SlotLoss):
    """``KL(q || p)`` on every slot."""

    def slot(self, draft_logits: Tensor, target_logits: Tensor) -> Tensor:
        return reverse_kl(draft_logits, target_logits)


class JSD(SlotLoss):
    """The generalised Jensen-Shannon divergence on every slot.

    Args:
        beta: in (0, 1): the target's share of the mixture that both are compared with.
        options: see :class:`~draftopd.losses.base.DistilledLoss`.

    Raises:
        ValueError: if beta lies outside (0, 1).
    """

    def __init__(self, beta: float = 0.5, **options: Any) -> None:
        super().__init__(**options)
        if not 0 < beta < 1:
            raise ValueError(f"beta must lie between 0 and 1, found {beta}: at the ends use forward_kl or reverse_kl.")
        self.beta = beta

    def slot(self, draft_logits: Tensor, target_logits: Tensor) -> Tensor:
        return jensen_shannon(draft_logits, target_logits, self.beta)
