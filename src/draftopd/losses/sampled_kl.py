"""Single-token estimates of the Draft-OPD loss, as in the paper's public code (arXiv 2605.29343)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from draftopd.losses.base import Stream
from draftopd.losses.distilled import TargetLoss
from draftopd.losses.divergence import k3, two_outcome_kl
from draftopd.replay.blocks import Blocks


class SampledKL(TargetLoss):
    """Compares target and drafter on one token per slot instead of the whole vocabulary.

    Accepted stream: the forward KL between the outcomes "the emitted token" and "another one". Rejected stream: the k3
    estimate of the reverse KL on the drafter's own token.

    Args:
        floor: log-probabilities are at least this.
        most: a slot's loss is at most this.
        gamma, accepted_gamma, options: see :class:`~draftopd.losses.distilled.TargetLoss`.

    Raises:
        ValueError: if the floor is not below 0 or ``most`` not above it.
    """

    same_on_both = False
    logit_copies = 6

    def __init__(
        self,
        *,
        floor: float = -10.0,
        most: float = 10.0,
        gamma: float = 0.8,
        accepted_gamma: float | None = 1.0,
        **options: Any,
    ) -> None:
        super().__init__(gamma=gamma, accepted_gamma=accepted_gamma, **options)
        if not floor < 0 < most:
            raise ValueError(f"floor must be below and most above 0, found {floor} and {most}.")
        self.floor, self.most = floor, most

    def weights(self, blocks: Blocks, stream: Stream) -> Tensor:
        weights = super().weights(blocks, stream)
        if stream == "rejected":
            return weights
        # The correction slot needs a recorded token that the drafter can propose.
        known = blocks.recorded & blocks.head.covers(blocks.labels)
        return weights * (known | (blocks.slots < blocks.accepted[:, None]))

    def values(self, blocks: Blocks, used: Tensor, stream: Stream) -> Tensor:
        estimate = two_outcome_kl if stream == "accepted" else k3
        tokens = blocks.proposals
        if stream == "accepted":
            # An accepted proposal was emitted; at the correction slot the recorded token was (at temperature 0).
            tokens = torch.where(blocks.slots < blocks.accepted[:, None], blocks.proposals, blocks.labels)

        def slot(draft_logits: Tensor, target_log_probs: Tensor, row: Tensor) -> Tensor:
            log_p, log_q = (
                log_probs.gather(-1, row[:, None])[:, 0].clamp_min(self.floor)
                for log_probs in (target_log_probs, draft_logits.log_softmax(-1))
            )
            return estimate(log_p, log_q).clamp_max(self.most)

        return self.view.compare(slot, blocks, used, blocks.head.row_of(tokens), renormalize=False)
