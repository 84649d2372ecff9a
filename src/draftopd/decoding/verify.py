"""Acceptance rules of speculative decoding.

A block has proposals ``d_1..d_K``. Verification accepts the first ``n`` of them and emits one more token: the
correction if ``n < K``, the bonus if ``n = K``.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from draftopd.decoding.sampling import draw

Verification = Literal["rejection_sampling", "target_only"]


class Verdict(NamedTuple):
    """``accepted [...]``: number of accepted proposals, 0..K; ``token [...]``: the correction or bonus."""

    accepted: Tensor
    token: Tensor


def accepted_prefix(accepts: Tensor) -> Tensor:
    """Length of the leading run of True along the last dimension: ``[..., K] -> [...]``."""
    return accepts.long().cumprod(-1).sum(-1)


def verify_matching(proposals: Tensor, target_tokens: Tensor) -> Verdict:
    """Accept proposals while they equal the target's own tokens.

    With the target's argmax this is greedy verification. With the target's samples and the drafter's argmax as
    proposals it is "target-only" verification. Both are lossless.

    Args:
        proposals: ``[..., K]`` token ids.
        target_tokens: ``[..., K + 1]`` the target's token after each slot of the block.
    """
    accepted = accepted_prefix(proposals == target_tokens[..., :-1])
    return Verdict(accepted, target_tokens.gather(-1, accepted[..., None])[..., 0])


def verify_rejection(
    proposals: Tensor, draft_probs: Tensor, target_probs: Tensor, generator: torch.Generator | None = None
) -> Verdict:
    """Rejection sampling (Leviathan et al., arXiv 2211.17192): the output follows the target's distribution.

    Args:
        proposals: ``[..., K]`` with ``d_k`` drawn from ``draft_probs[..., k, :]``.
        draft_probs: ``[..., K, vocab]``, warped.
        target_probs: ``[..., K + 1, vocab]``, warped the same way.
    """
    chosen = proposals[..., None]
    q = draft_probs.gather(-1, chosen)[..., 0]
    p = target_probs[..., :-1, :].gather(-1, chosen)[..., 0]
    uniforms = torch.rand(q.shape, generator=generator, device=q.device)
    accepted = accepted_prefix(uniforms * q < p)
    return Verdict(accepted, draw(residual_at(accepted, draft_probs, target_probs), generator))


def residual_at(accepted: Tensor, draft_probs: Tensor, target_probs: Tensor) -> Tensor:
    """The unnormalised distribution ``[..., vocab]`` of the token after the accepted prefix.

    It is ``max(p - q, 0)`` at the first rejected slot, and ``p`` after a fully accepted block.
    """
    slot = accepted[..., None, None].expand(*accepted.shape, 1, target_probs.shape[-1])
    p = target_probs.gather(-2, slot)[..., 0, :]
    no_draft = torch.zeros_like(target_probs[..., :1, :])
    q = torch.cat([draft_probs, no_draft], dim=-2).gather(-2, slot)[..., 0, :]
    residual = (p - q).clamp_min(0)
    # Where p and q are equal up to rounding the residual is 0, and p is its limit. Subnormal numbers count as 0,
    # because a draw may round them to 0.
    return torch.where(residual.sum(-1, keepdim=True) > torch.finfo(p.dtype).tiny, residual, p)
