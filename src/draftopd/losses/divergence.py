"""Divergences between the target ``p`` and the drafter ``q`` of one slot.

A divergence is a plain function ``(draft_logits [n, vocab], log_p [n, vocab]) -> [n]``, differentiable in its first
argument. ``log_p`` are the target's log-probabilities: normalised, except where part of the target's mass lies outside
the drafter's vocabulary and the function states ``renormalize=False``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Annotated, NamedTuple, TypeVar

import torch
from pydantic import Field
from torch import Tensor

Divergence = Callable[..., Tensor]
Function = TypeVar("Function", bound=Divergence)

#: ``logit_copies`` of a function or loss that does not state it: the largest of this package.
UNKNOWN_COPIES = 10


class Facts(NamedTuple):
    """What a divergence states about itself; see :func:`divergence`."""

    logit_copies: int = UNKNOWN_COPIES
    renormalize: bool = True


def divergence(*, logit_copies: int = UNKNOWN_COPIES, renormalize: bool = True) -> Callable[[Function], Function]:
    """State what a divergence needs; a function without this decorator has its defaults.

    Args:
        logit_copies: logits-sized float32 tensors that value and gradient hold at their peak; only planning needs it.
        renormalize: renormalise the target's distribution over a reduced draft vocabulary. A divergence between two
            distributions needs that; for a function of the acceptance rate it would be wrong, because a token that the
            drafter cannot propose is never accepted.
    """

    def state(function: Function) -> Function:
        function.facts = Facts(logit_copies, renormalize)  # type: ignore[attr-defined]
        return function

    return state


def facts(function: Divergence) -> Facts:
    """What a divergence states, through ``functools.partial`` too."""
    while isinstance(function, partial):
        function = function.func
    stated: Facts = getattr(function, "facts", Facts())
    return stated


@divergence(logit_copies=6)
def forward_kl(draft_logits: Tensor, log_p: Tensor) -> Tensor:
    """``KL(p || q)``: ``[n, vocab], [n, vocab] -> [n]``. The drafter must cover what the target does."""
    log_q = draft_logits.log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


@divergence(logit_copies=6)
def reverse_kl(draft_logits: Tensor, log_p: Tensor) -> Tensor:
    """``KL(q || p)``: ``[n, vocab], [n, vocab] -> [n]``. The drafter must avoid what the target does not."""
    log_q = draft_logits.log_softmax(-1)
    return (log_q.exp() * (log_q - log_p)).sum(-1)


@divergence(logit_copies=10)
def jensen_shannon(draft_logits: Tensor, log_p: Tensor, *, beta: Annotated[float, Field(gt=0, lt=1)] = 0.5) -> Tensor:
    """``beta KL(p || m) + (1 - beta) KL(q || m)`` with ``m = beta p + (1 - beta) q`` (GKD, arXiv 2306.13649).

    Near ``beta = 0`` it behaves like the forward, near 1 like the reverse KL, each times a factor.

    Raises:
        ValueError: if beta lies outside (0, 1).
    """
    if not 0 < beta < 1:
        raise ValueError(f"beta must lie between 0 and 1, found {beta}: at the ends use forward_kl or reverse_kl.")
    log_q = draft_logits.log_softmax(-1)
    log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
    to_p = (log_p.exp() * (log_p - log_m)).sum(-1)
    return beta * to_p + (1 - beta) * (log_q.exp() * (log_q - log_m)).sum(-1)


def overlap(draft_logits: Tensor, log_p: Tensor) -> Tensor:
    """``sum_v min(p, q)``: the probability that rejection sampling accepts: ``[n, vocab], [n, vocab] -> [n]``."""
    return torch.minimum(log_p.exp(), draft_logits.softmax(-1)).sum(-1)


def log_overlap(draft_logits: Tensor, log_p: Tensor) -> Tensor:
    """``log sum_v min(p, q)``, finite and with a gradient where the supports barely meet."""
    return torch.minimum(log_p, draft_logits.log_softmax(-1)).logsumexp(-1)


@divergence(logit_copies=5, renormalize=False)
def total_variation(draft_logits: Tensor, log_p: Tensor) -> Tensor:
    """``1 - sum_v min(p, q)``, the rejection rate (DistillSpec, arXiv 2310.08461)."""
    return 1 - overlap(draft_logits, log_p)


@divergence(logit_copies=6, renormalize=False)
def neg_log_acceptance(draft_logits: Tensor, log_p: Tensor) -> Tensor:
    """``-log sum_v min(p, q)``: ``[n, vocab], [n, vocab] -> [n]`` (LK losses, arXiv 2602.23881)."""
    return -log_overlap(draft_logits, log_p)


def two_outcome_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """``KL`` between "this token" and "another one" under ``p`` and under ``q``, from the token's log-probabilities."""
    p = log_p.exp()
    return p * (log_p - log_q) + (1 - p) * (_log_rest(log_p) - _log_rest(log_q))


def k3(log_p: Tensor, log_q: Tensor) -> Tensor:
    """``exp(r) - r - 1`` with ``r = log p - log q``: an unbiased estimate of ``KL(q || p)`` on a token drawn from q."""
    ratio = log_p - log_q
    return torch.expm1(ratio) - ratio


def _log_rest(log_p: Tensor) -> Tensor:
    """``log(1 - p)``; where rounding makes p 1, the largest float32 below 1 replaces it."""
    return torch.log1p(-log_p.exp().clamp_max(1 - 2**-24))


def keep_top_k(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Log-probabilities with only the ``k`` largest exact, the rest of the mass spread evenly over the others.

    Args:
        logits: ``[n, vocab]``.

    Returns:
        ``[n, vocab]``, and the mass outside the top ``k``, ``[n]``.
    """
    log_p = logits.log_softmax(-1)
    others = log_p.shape[-1] - k
    if others <= 0:
        return log_p, log_p.new_zeros(log_p.shape[:-1])
    top = log_p.topk(k, dim=-1)
    # Summed over the others: 1 minus the sum of the largest would be rounding.
    rest = log_p.scatter(-1, top.indices, -torch.inf).logsumexp(-1)
    spread = (rest - math.log(others))[..., None].expand_as(log_p)
    return spread.scatter(-1, top.indices, top.values), rest.exp()
