"""The processes of a run; sums and means over them are the value itself with one process."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist
from lightning.fabric.utilities.rank_zero import rank_zero_only
from torch import Tensor

_T = TypeVar("_T")


def wait(minutes: float) -> timedelta:
    """How long ranks wait for one another where they do something together."""
    return timedelta(minutes=minutes)


def count() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def mix(seed: int, *numbers: int) -> int:
    """A seed for one of many draws under the same ``seed``, told apart by ``numbers``; fits a torch generator."""
    for number in numbers:
        seed = seed * 1_000_003 + number
    return seed % 2**63


def own(seed: int) -> int:
    """A seed for draws of this process's own; the seed itself in the first process."""
    rank = dist.get_rank() if count() > 1 else 0
    return mix(seed, rank) if rank else seed


def is_first() -> bool:
    """Whether this process is the first of its run; from its environment, so that it is known before they have met."""
    node = os.environ.get("NODE_RANK", os.environ.get("GROUP_RANK", "0"))
    return getattr(rank_zero_only, "rank", 0) == 0 and int(node) == 0


def total(value: Tensor) -> Tensor:
    """The sum over ranks, without a gradient; every rank must call it."""
    if count() == 1:
        return value.detach()
    summed = value.detach().clone()
    dist.all_reduce(summed)
    return summed


def gathered(value: _T) -> list[_T]:
    """Every rank's value, by rank; every rank must call it."""
    if count() == 1:
        return [value]
    values: list[Any] = [None] * count()
    dist.all_gather_object(values, value)
    return values


def mean(value: Tensor) -> Tensor:
    """The mean over ranks, without a gradient; every rank must call it."""
    return total(value) / count()
