"""Sums and means over the processes of a run; with one process, the value itself."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor


def count() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def total(value: Tensor) -> Tensor:
    """The sum over ranks, without a gradient; every rank must call it."""
    if count() == 1:
        return value.detach()
    summed = value.detach().clone()
    dist.all_reduce(summed)
    return summed


def mean(value: Tensor) -> Tensor:
    """The mean over ranks, without a gradient; every rank must call it."""
    return total(value) / count()
