"""Slot weights and weighted means."""

from __future__ import annotations

import torch
from torch import Tensor

#: DFlash's decay constants by block size (arXiv 2602.06036).
_CE_GAMMA = {16: 7.0, 10: 5.0, 8: 4.0}


def power_decay(slots: int, gamma: float) -> Tensor:
    """``gamma^(k-1)`` for ``k = 1..slots``: early slots weigh most (Draft-OPD, arXiv 2605.29343)."""
    return gamma ** torch.arange(slots, dtype=torch.float32)


def exponential_decay(slots: int, gamma: float) -> Tensor:
    """``exp(-(k-1) / gamma)`` for ``k = 1..slots`` (DFlash)."""
    return torch.exp(-torch.arange(slots, dtype=torch.float32) / gamma)


def cross_entropy_gamma(block_size: int) -> float:
    """DFlash's constant for this block size; between its three values a straight line."""
    return _CE_GAMMA.get(block_size, 1 + 0.375 * block_size)


def weighted_mean(values: Tensor, weights: Tensor) -> Tensor:
    """``sum(w v) / sum(w)``; 0 (with a gradient of 0) where no weight is left."""
    total = weights.sum()
    return (values * weights).sum() / torch.where(total > 0, total, torch.ones_like(total))
