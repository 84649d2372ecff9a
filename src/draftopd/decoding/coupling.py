"""The reverse coupling: which proposals real rejection sampling would have made on a given text.

Rejection sampling draws a proposal ``d ~ q`` and emits ``d`` with probability ``min(1, p(d) / q(d))``, else
a token of ``norm(max(p - q, 0))``. Read the other way round: given the emitted token ``y ~ p``, the proposal
was ``y`` with probability ``min(1, q(y) / p(y))``, else a draw from ``norm(max(q - p, 0))``. Both readings
give the same joint law, so text that the target produced once yields the blocks of any drafter. Pure
tensors.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from draftopd.decoding.sampling import inverse_draw


class Coupled(NamedTuple):
    """``proposals [..., K]``, and ``agreed [...]``: whether every slot so far was accepted."""

    proposals: Tensor
    agreed: Tensor


def couple(
    labels: Tensor, recorded: Tensor, draft_probs: Tensor, target_probs: Tensor, luck: Tensor, agreed: Tensor
) -> Coupled:
    """Proposals of consecutive slots, given the text.

    A block-parallel drafter's slots come in one call. An autoregressive drafter's come one by one, each with
    the distribution that follows its own earlier proposals: as long as those were accepted they are the text.

    Args:
        labels: ``[..., K]`` the text's token at each slot.
        recorded: ``[..., K]`` False beyond the end of the text, where nothing is tested.
        draft_probs: ``[..., K, vocab]`` the drafter's warped distribution.
        target_probs: ``[..., K, vocab]`` the target's at the same positions of the text, warped the same
            way; not looked at once a slot was rejected.
        luck: ``[..., K, 2]`` uniform numbers in [0, 1): for the acceptance test, and for the draw.
        agreed: ``[...]`` whether every earlier slot of the block was accepted.
    """
    token = labels[..., None]
    p, q = (probs.gather(-1, token)[..., 0] for probs in (target_probs, draft_probs))
    accepts = (luck[..., 0] * p < q) & recorded
    chain = (torch.cat([agreed[..., None], accepts], -1)).long().cumprod(-1).bool()
    reached, accepted = chain[..., :-1], chain[..., 1:]
    rejected = reached & ~accepted & recorded
    free = draw_rejected(draft_probs, target_probs, rejected, luck[..., 1])
    return Coupled(torch.where(accepted, labels, free), chain[..., -1])


def draw_rejected(draft_probs: Tensor, target_probs: Tensor, rejected: Tensor, luck: Tensor) -> Tensor:
    """A token from ``norm(max(q - p, 0))`` where the slot is the first rejected one, else from ``q``.

    Slots after the first rejection, and beyond the end of the text, were never tested: the drafter drew them
    from its own distribution.
    """
    residual = (draft_probs - target_probs).clamp_min(0)
    # Where p and q agree to the last bit a rejection is only rounding; q is then the limit.
    tested = rejected & (residual.sum(-1) > 0)
    return inverse_draw(torch.where(tested[..., None], residual, draft_probs), luck)
