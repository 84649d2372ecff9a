"""Chooses the part of the target's vocabulary that a drafter with its own LM head proposes."""

from __future__ import annotations

import logging
from collections.abc import Iterable

import torch
from torch import Tensor

from draftopd.errors import DrafterError

log = logging.getLogger(__name__)


def frequent_tokens(texts: Iterable[list[int]], size: int, vocab_size: int) -> Tensor:
    """The ``size`` most frequent token ids of the texts, ascending; ties go to the smaller id.

    Raises:
        DrafterError: if the size or a token lies outside the vocabulary, or there is no text to count.
    """
    if not 0 < size <= vocab_size:
        raise DrafterError(f"draft_vocab_size must lie between 1 and the target's {vocab_size}, found {size}.")
    counts = torch.zeros(vocab_size, dtype=torch.long)
    for text in texts:
        if text and not 0 <= min(text) <= max(text) < vocab_size:
            raise DrafterError(
                f"A text holds ids from {min(text)} to {max(text)}, but the target's vocabulary has {vocab_size}: use "
                "texts of this target."
            )
        counts += torch.bincount(torch.tensor(text, dtype=torch.long), minlength=vocab_size)
    total = int(counts.sum())
    if total == 0:
        raise DrafterError(
            "A reduced draft vocabulary is chosen from the target's texts, and there are none: "
            "leave drafter.draft_vocab_size=null, or load a drafter that has its tables."
        )
    chosen = counts.sort(descending=True, stable=True).indices[:size]
    covered = float(counts[chosen].sum()) / total
    log.info("The draft vocabulary of %d tokens covers %.2f %% of the target's texts.", size, 100 * covered)
    return chosen.sort().values
