"""Losses on the acceptance rate of rejection sampling, ``alpha = sum_v min(p, q)``, beyond one value per slot."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from draftopd.distributed import ranks
from draftopd.losses.base import Loss, LossOutput, Stream
from draftopd.losses.distilled import TargetLoss
from draftopd.losses.divergence import forward_kl, overlap
from draftopd.losses.target_view import ScoredOn, TargetView
from draftopd.losses.weighting import power_decay, weighted_mean
from draftopd.replay.blocks import Blocks


class LKHybrid(TargetLoss):
    """``w KL(p || q) + (1 - w)(1 - alpha)``: KL while the drafter is poor, acceptance when it is good.

    ``w = kl_scale exp(-kl_decay mean alpha)`` has no gradient, and its mean is over the slots at the same position of
    the block (LK losses, arXiv 2602.23881). The other LK loss, ``-log alpha``, is
    :func:`~draftopd.losses.divergence.neg_log_acceptance`.

    Args:
        kl_scale: the KL's weight at an acceptance of 0, in [0, 1].
        kl_decay: how fast the weight falls as acceptance rises, 0 or more.
        options: see :class:`~draftopd.losses.distilled.TargetLoss`.

    Raises:
        ValueError: if a number lies outside its range.
    """

    logit_copies = 7

    def __init__(self, *, kl_scale: float = 1.0, kl_decay: float = 3.0, **options: Any) -> None:
        super().__init__(**options)
        if not 0 <= kl_scale <= 1 or kl_decay < 0:
            raise ValueError(f"kl_scale must lie in [0, 1] and kl_decay be 0 or more, found {kl_scale}, {kl_decay}.")
        self.kl_scale, self.kl_decay = kl_scale, kl_decay

    def values(self, blocks: Blocks, used: Tensor, stream: Stream) -> Tensor:
        kl, distance = self.view.compare(_kl_and_distance, blocks, used, renormalize=False).unbind(-1)
        position = blocks.slots.expand_as(used)[used]
        sums = distance.new_zeros(2, len(blocks.slots))
        sums.index_add_(1, position, torch.stack([1 - distance.detach(), torch.ones_like(kl)]))
        sums = ranks.total(sums)
        weight = self.kl_scale * torch.exp(-self.kl_decay * sums[0] / sums[1].clamp_min(1))[position]
        return weight * kl + (1 - weight) * distance


def _kl_and_distance(draft_logits: Tensor, log_p: Tensor) -> Tensor:
    return torch.stack([forward_kl(draft_logits, log_p), 1 - overlap(draft_logits, log_p)], -1)


class E2ETotalVariation(Loss):
    """``-sum_k gamma^(k-1) prod_{j<=k} alpha_j``: minus the expected accepted length (Bebop, arXiv 2606.12370).

    The whole block is one term, because a slot's gain depends on the slots before it.

    Args:
        gamma: below 1, late slots weigh less; 1 is the expected accepted length itself.
        accept_until_fail: sum only up to the first rejected slot.
        target_temperature, target_top_k, scored_on: see :class:`~draftopd.losses.target_view.TargetView`.

    Raises:
        ValueError: if gamma lies outside (0, 1].
    """

    logit_copies = 5

    def __init__(
        self,
        *,
        gamma: float = 1.0,
        accept_until_fail: bool = False,
        target_temperature: float = 1.0,
        target_top_k: int | None = None,
        scored_on: ScoredOn = "proposals",
    ) -> None:
        if not 0 < gamma <= 1:
            raise ValueError(f"gamma must lie in (0, 1], found {gamma}.")
        self.gamma, self.accept_until_fail = gamma, accept_until_fail
        self.view = TargetView(temperature=target_temperature, top_k=target_top_k, scored_on=scored_on)
        self.scope = self.view.scope("until_fail" if accept_until_fail else "proposals")

    def __call__(self, blocks: Blocks) -> LossOutput:
        used = blocks.valid & blocks.until_fail() if self.accept_until_fail else blocks.valid
        # Slots that do not count accept nothing, and neither do the slots after them.
        alpha = torch.zeros(used.shape, device=used.device)
        alpha = alpha.masked_scatter(used, self.view.compare(overlap, blocks, used, renormalize=False))
        reach = alpha.cumprod(-1) * power_decay(used.shape[1], self.gamma).to(alpha.device)
        lengths = reach.sum(-1)
        length = weighted_mean(lengths, torch.ones_like(lengths))
        return LossOutput(-length, {"expected_accepted_length": length.detach(), **self.view.report(blocks)})
