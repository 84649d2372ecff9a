"""Whether speculative decoding gave the target's own text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from draftopd.targets.target import Target


@dataclass(frozen=True)
class Mismatch:
    """Where a text first differs from plain decoding.

    ``logit_gap`` is how far the target's logit of the plain token stands above that of the other; about
    0 means a tie that rounding decided. None where one text merely ends earlier.
    """

    position: int
    plain_token: int | None
    speculative_token: int | None
    logit_gap: float | None


def compare(target: Target, prompt: Sequence[int], plain: Sequence[int], speculative: Sequence[int]) -> Mismatch | None:
    """The first difference between two responses to a prompt, or None where they are equal.

    ``position`` counts response tokens from 0.
    """
    if list(plain) == list(speculative):
        return None
    shared = 0
    while shared < min(len(plain), len(speculative)) and plain[shared] == speculative[shared]:
        shared += 1
    ours = plain[shared] if shared < len(plain) else None
    theirs = speculative[shared] if shared < len(speculative) else None
    gap = None
    if ours is not None and theirs is not None:
        prefix = torch.tensor([[*prompt, *plain[:shared]]], device=target.device)
        reading = target.read(prefix, target.new_cache(prefix.shape[1]))
        logits = target.head.logits(reading.hidden[0, -1])
        gap = float(logits[ours] - logits[theirs])
    return Mismatch(shared, ours, theirs, gap)
