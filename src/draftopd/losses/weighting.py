"""Slot weights and weighted means."""

from __future__ import annotations

import torch
from torch import Tensor

from draftopd.distributed import ranks

#: DFlash's decay constants by block size (arXiv 2602.06036).
_CE_GAMMA = {16: 7.0, 10: 5.0, 8: 4.0}


def power_decay(slots: int, gamma: float) -> Tensor:
    """``gamma^(k-1)`` for ``k = 1..slots``: earlier slots weigh more (Draft-OPD, arXiv 2605.29343)."""
    return gamma ** torch.arange(slots, dtype=torch.float32)


def exponential_decay(slots: int, gamma: float) -> Tensor:
    """``exp(-(k-1) / gamma)`` for ``k = 1..slots`` (DFlash)."""
    return torch.exp(-torch.arange(slots, dtype=torch.float32) / gamma)


def cross_entropy_gamma(block_size: int) -> float:
    """DFlash's constant for this block size; linear for sizes other than its three."""
    return _CE_GAMMA.get(block_size, 1 + 0.375 * block_size)


def expected_length_gradient(confidence: Tensor, counted: Tensor, smoothing: float) -> Tensor:
    """The gradient of the expected accepted length in each slot's log-confidence (D-PACE, arXiv 2605.18810).

    Args:
        confidence, counted: as of :func:`reach`.
        smoothing: weight of 1 mixed into the confidence.

    Returns:
        ``[N, K]``: ``sum_{i>=k} prod_{j<=i} c_j``, 0 at slots that do not count.
    """
    smooth = (1 - smoothing) * confidence + smoothing
    return smooth * marginal_gain(smooth, counted)


def reach(confidence: Tensor, counted: Tensor) -> Tensor:
    """The probability that drafting reaches each slot.

    Args:
        confidence: ``[N, K]`` the drafter's probability of the recorded token.
        counted: ``[N, K]`` slots that count; the others do not shorten the prefix.

    Returns:
        ``[N, K]``: ``prod_{j<k} c_j``, 0 at slots that do not count.
    """
    sure = torch.where(counted, confidence, torch.ones_like(confidence))
    return torch.cat((torch.ones_like(sure[:, :1]), sure[:, :-1].cumprod(-1)), -1) * counted


def marginal_gain(confidence: Tensor, counted: Tensor) -> Tensor:
    """The gradient of the expected accepted length in each slot's confidence ``c_k``.

    Args:
        confidence, counted: as of :func:`reach`.

    Returns:
        ``[N, K]``: ``prod_{j<k} c_j sum_{i>=k} prod_{k<j<=i} c_j``, 0 at slots that do not count.
    """
    sure = torch.where(counted, confidence, torch.ones_like(confidence))
    # Expected tokens that depend on each slot, from the last one back.
    dependent = torch.zeros_like(sure)
    following = torch.zeros_like(sure[:, 0])
    for k in reversed(range(sure.shape[1])):
        dependent[:, k] = counted[:, k] + following
        following = sure[:, k] * dependent[:, k]
    return reach(confidence, counted) * dependent


def weighted_mean(values: Tensor, weights: Tensor) -> Tensor:
    """``sum(w v) / sum(w)``; 0 (with a gradient of 0) where no weight is left.

    In a distributed run ``sum(w)`` is the mean of the ranks' sums, so that the mean over ranks of the results, and of
    their gradients, is what one process would find on all the ranks' slots together.
    """
    total = ranks.mean(weights.sum())
    return (values * weights).sum() / torch.where(total > 0, total, torch.ones_like(total))
