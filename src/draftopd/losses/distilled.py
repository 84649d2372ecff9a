"""Losses that compare the drafter with the target's distribution, one value per slot."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from draftopd.losses.base import LossOutput, Stream, StreamLoss
from draftopd.losses.divergence import Divergence, facts
from draftopd.losses.target_view import ScoredOn, TargetView
from draftopd.losses.weighting import power_decay
from draftopd.replay.blocks import Blocks


class TargetLoss(StreamLoss):
    """A :class:`~draftopd.losses.base.StreamLoss` that needs the target's distribution.

    Args:
        gamma: decay over the block's positions: slot ``k`` of the rejected stream weighs ``gamma^(k-1)``.
        accepted_gamma: the same for the accepted stream; None takes ``gamma``.
        target_temperature, target_top_k, scored_on: see :class:`~draftopd.losses.target_view.TargetView`.
        options: see :class:`~draftopd.losses.base.StreamLoss`.

    Raises:
        ValueError: if a gamma lies outside (0, 1].
    """

    def __init__(
        self,
        *,
        gamma: float = 1.0,
        accepted_gamma: float | None = None,
        target_temperature: float = 1.0,
        target_top_k: int | None = None,
        scored_on: ScoredOn = "proposals",
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.accepted_gamma, self.rejected_gamma = gamma if accepted_gamma is None else accepted_gamma, gamma
        for decay in (self.accepted_gamma, self.rejected_gamma):
            if not 0 < decay <= 1:
                raise ValueError(f"gamma and accepted_gamma must lie in (0, 1], found {decay}.")
        self.view = TargetView(temperature=target_temperature, top_k=target_top_k, scored_on=scored_on)
        self.scope = self.view.scope(self.scope)

    def decay(self, slots: int, stream: Stream) -> Tensor:
        return power_decay(slots, self.accepted_gamma if stream == "accepted" else self.rejected_gamma)

    def __call__(self, blocks: Blocks) -> LossOutput:
        loss, parts = super().__call__(blocks)
        return LossOutput(loss, parts | self.view.report(blocks))


class Distilled(TargetLoss):
    """One divergence on the accepted stream, one on the rejected.

    ``Distilled(accepted=forward_kl, rejected=reverse_kl)`` is Draft-OPD's loss (arXiv 2605.29343); with one divergence
    for both it is GKD on the drafter's own blocks (arXiv 2306.13649).

    Args:
        accepted: a function ``(draft_logits, log_p) -> [n]``, such as those of :mod:`draftopd.losses.divergence`.
        rejected: the same for the rejected stream; None takes ``accepted``, and a slot in both is computed once.
        options: see :class:`TargetLoss`.
    """

    def __init__(self, *, accepted: Divergence, rejected: Divergence | None = None, **options: Any) -> None:
        super().__init__(**options)
        self.accepted, self.rejected = accepted, accepted if rejected is None else rejected
        self.same_on_both = self.accepted is self.rejected
        self.logit_copies = max(facts(self.accepted).logit_copies, facts(self.rejected).logit_copies)

    def values(self, blocks: Blocks, used: Tensor, stream: Stream) -> Tensor:
        divergence = self.accepted if stream == "accepted" else self.rejected
        return self.view.compare(divergence, blocks, used, renormalize=facts(divergence).renormalize)
