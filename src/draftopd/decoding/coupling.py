"""The reverse coupling: the proposals that rejection sampling would have made on a given text.

Rejection sampling draws a proposal ``d ~ q`` and emits ``d`` with probability ``min(1, p(d) / q(d))``, else a token of
``norm(max(p - q, 0))``. In reverse: given the emitted token ``y ~ p``, the proposal was ``y`` with probability
``min(1, q(y) / p(y))``, else a draw from ``norm(max(q - p, 0))``. Both have the same joint distribution, so a text that
the target has produced yields the blocks of any drafter.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from draftopd.decoding.sampling import inverse_draw


class Coupled(NamedTuple):
    """``proposals [..., K]``, and ``agreed [...]``: True where every slot so far was accepted."""

    proposals: Tensor
    agreed: Tensor


def couple(
    labels: Tensor, recorded: Tensor, draft_probs: Tensor, target_probs: Tensor, uniforms: Tensor, agreed: Tensor
) -> Coupled:
    """Proposals of consecutive slots, given the text.

    A block-parallel drafter passes all slots in one call. An autoregressive drafter passes one slot per call, with the
    distribution that follows its own earlier proposals; while those were accepted they equal the text.

    Args:
        labels: ``[..., K]`` the text's token at each slot.
        recorded: ``[..., K]`` False beyond the end of the text, where nothing is tested.
        draft_probs: ``[..., K, vocab]`` the drafter's warped distribution.
        target_probs: ``[..., K, vocab]`` the target's distribution at the same positions of the text, warped the same
            way; not used after the first rejected slot.
        uniforms: ``[..., K, 2]`` uniform numbers in [0, 1) for the acceptance test and for the draw.
        agreed: ``[...]`` True where every earlier slot of the block was accepted.
    """
    token = labels[..., None]
    p, q = (probs.gather(-1, token)[..., 0] for probs in (target_probs, draft_probs))
    accepts = (uniforms[..., 0] * p < q) & recorded
    chain = (torch.cat([agreed[..., None], accepts], -1)).long().cumprod(-1).bool()
    reached, accepted = chain[..., :-1], chain[..., 1:]
    rejected = reached & ~accepted & recorded
    free = draw_rejected(draft_probs, target_probs, rejected, uniforms[..., 1])
    return Coupled(torch.where(accepted, labels, free), chain[..., -1])


def draw_rejected(draft_probs: Tensor, target_probs: Tensor, rejected: Tensor, uniforms: Tensor) -> Tensor:
    """A token from ``norm(max(q - p, 0))`` at the first rejected slot, else from ``q``.

    Slots after the first rejection and beyond the end of the text were not tested: the drafter drew them from its own
    distribution.
    """
    residual = (draft_probs - target_probs).clamp_min(0)
    # Where p and q are equal up to rounding the residual is 0, and q is its limit.
    tested = rejected & (residual.sum(-1) > 0)
    return inverse_draw(torch.where(tested[..., None], residual, draft_probs), uniforms)
