"""Which anchors a recorded sequence is replayed at. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

AnchorChoice = Literal["visited", "random"]


def choose_anchors(
    choice: AnchorChoice,
    visited: Sequence[int],
    prompt_length: int,
    length: int,
    limit: int,
    generator: torch.Generator,
) -> Tensor:
    """At most ``limit`` anchors of one sequence, in order.

    Args:
        choice: ``visited`` takes the anchors that decoding began blocks at, ``random`` draws them
            uniformly over the response (SFT, and the paper's main ablation).
        visited: the recorded anchors.
        prompt_length: first response position.
        length: number of recorded tokens; the last one can begin no block.
        generator: draws the random anchors, or which visited ones stay where there are too many.

    Returns:
        ``[A]`` positions, ascending.

    Raises:
        ValueError: for an unknown choice.
    """
    if choice == "visited":
        candidates = torch.as_tensor(visited, dtype=torch.long)
    elif choice == "random":
        candidates = torch.arange(prompt_length, max(length - 1, prompt_length))
    else:
        raise ValueError(f"anchors must be 'visited' or 'random', found {choice!r}.")
    if len(candidates) > limit:
        candidates = candidates[torch.randperm(len(candidates), generator=generator)[:limit]]
    return candidates.sort().values
