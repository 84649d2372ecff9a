"""The choice of the anchors at which a recorded sequence is replayed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

AnchorChoice = Literal["visited", "error", "random", "all"]


@dataclass(frozen=True)
class AnchorPolicy:
    """How the anchors of one sequence are chosen.

    Args:
        choice: ``visited`` takes the anchors at which decoding began a block. ``error`` takes the last token before
            each first rejection, so that the first proposal of the block is the rejected one. ``random`` draws anchors
            uniformly over the response (SFT, and the paper's main ablation). ``all`` takes every response position,
            without the limit.
        limit: maximum number of anchors per sequence; None takes all.
        slots: number of proposals per block.

    Raises:
        ValueError: if the choice is unknown.
    """

    choice: AnchorChoice
    limit: int | None
    slots: int

    def __post_init__(self) -> None:
        if self.choice not in get_args(AnchorChoice):
            raise ValueError(f"anchors must be one of {', '.join(get_args(AnchorChoice))}, found {self.choice!r}.")

    @property
    def of_the_drafter(self) -> bool:
        """Whether the anchors depend on the drafter's blocks, see :func:`depends_on_drafter`."""
        return depends_on_drafter(self.choice)

    def choose(
        self, visited: Sequence[int], accepted: Sequence[int], start: int, length: int, generator: torch.Generator
    ) -> Tensor:
        """The anchors ``[A]``, ascending.

        Args:
            visited, accepted: anchors and accepted lengths of the drafter's blocks.
            start: first response position.
            length: number of recorded tokens; the last one cannot begin a block.
            generator: chooses the anchors at random where there are more than the limit.
        """
        if self.choice == "visited":
            candidates = torch.as_tensor(visited, dtype=torch.long)
        elif self.choice == "error":
            blocks = zip(visited, accepted, strict=True)
            errors = [anchor + n for anchor, n in blocks if n < self.slots and anchor + n < length - 1]
            candidates = torch.as_tensor(errors, dtype=torch.long)
        else:
            candidates = torch.arange(start, max(length - 1, start))
        if self.limit is not None and self.choice != "all" and len(candidates) > self.limit:
            candidates = candidates[torch.randperm(len(candidates), generator=generator)[: self.limit]]
        return candidates.sort().values


def depends_on_drafter(choice: AnchorChoice) -> bool:
    """Whether these anchors follow from the blocks of a drafter."""
    return choice in ("visited", "error")
