"""Whether speculative decoding gave plain decoding's text or, above temperature 0, texts of the same distribution."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from draftopd.targets.target import Target

#: Resamples of the permutation test.
FLIPS = 9_999

#: Classes of token ids (modulo this) whose frequencies are compared.
CLASSES = 16


@dataclass(frozen=True)
class Mismatch:
    """Where a text first differs from plain decoding.

    ``logit_gap`` is the target's logit of the plain token minus that of the other; about 0 means a tie that rounding
    decided. It is None if one text ends earlier.
    """

    position: int
    plain_token: int | None
    speculative_token: int | None
    logit_gap: float | None

    def tied(self, tolerance: float) -> bool:
        """Whether the gap is at most ``tolerance``."""
        return self.logit_gap is not None and abs(self.logit_gap) <= tolerance


def compare(target: Target, prompt: Sequence[int], plain: Sequence[int], speculative: Sequence[int]) -> Mismatch | None:
    """The first difference between two responses to a prompt, or None if they are equal.

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


def features(response: Sequence[int], log_probs: Tensor, entropies: Tensor) -> list[float]:
    """Features of a text by which distributions are compared.

    They are the length, the means of the target's ``log_probs`` and ``entropies`` (``[n]`` each), the first token's
    log-probability, the fraction of distinct tokens, and the frequency of each of :data:`CLASSES` classes of token ids.
    """
    classes = np.bincount(np.asarray(response) % CLASSES, minlength=CLASSES) / len(response)
    return [
        float(len(response)), float(log_probs.mean()), float(entropies.mean()), float(log_probs[0]),
        len(set(response)) / len(response), *map(float, classes),
    ]  # fmt: skip


def same_distribution(pairs: Sequence[tuple[Sequence[float], Sequence[float]]], seed: int = 0) -> float:
    """p-value of a two-sample permutation test that two decoders draw texts from the same distribution.

    If they do, the two texts of each prompt can be exchanged. The statistic is the largest of the features'
    standardised sums of differences, compared with its values under random exchanges.

    Args:
        pairs: both texts' features, one pair per prompt.
    """
    apart = np.array([np.subtract(a, b) for a, b in pairs])
    scale = np.sqrt((apart**2).sum(0))
    apart = apart[:, scale > 0] / scale[scale > 0]
    if not apart.size:
        return 1.0
    signs = np.random.default_rng(seed).choice([-1.0, 1.0], size=(FLIPS, len(apart)))
    found, flipped = np.abs(apart.sum(0)).max(), np.abs(signs @ apart).max(1)
    return float((1 + (flipped >= found - 1e-12).sum()) / (1 + FLIPS))
