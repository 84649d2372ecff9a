"""Schedules of the learning rate over the optimizer steps of a run."""

from __future__ import annotations

import math
from typing import Annotated

from pydantic import Field
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

Fraction = Annotated[float, Field(ge=0, le=1)]


def cosine(optimizer: Optimizer, total_steps: int, warmup: Fraction = 0.05, final: Fraction = 0.0) -> LambdaLR:
    """A linear rise, then half a cosine down; the first step has a rate above 0.

    Args:
        total_steps: optimizer steps of the run; steps beyond them keep the final rate.
        warmup: fraction of all steps over which the rate rises to the optimizer's own.
        final: fraction of the optimizer's rate that the cosine ends at.
    """
    rise = max(1, round(warmup * total_steps))

    def factor(step: int) -> float:
        if step < rise:
            return (step + 1) / rise
        progress = min(1.0, (step - rise) / max(1, total_steps - rise))
        return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress))

    return LambdaLR(optimizer, factor)


def constant(optimizer: Optimizer, total_steps: int, warmup: Fraction = 0.05) -> LambdaLR:
    """A linear rise over a fraction ``warmup`` of all steps, then the optimizer's own rate."""
    rise = max(1, round(warmup * total_steps))
    return LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / rise))
