"""What a loss sees: the replayed blocks of a batch and their streams."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor


class Head(Protocol):
    """The frozen LM head shared by drafter and target; ``softcap`` bounds the logits where set."""

    softcap: float | None

    @property
    def weight(self) -> Tensor: ...

    def logits(self, hidden: Tensor) -> Tensor:
        """``[..., hidden] -> [..., vocab]`` in float32."""
        ...


@dataclass(frozen=True)
class Blocks:
    """Replayed blocks, flattened over batch and anchors to ``N`` blocks of ``K`` slots.

    Slot ``k`` (``0..K-1`` here, ``1..K`` in the papers) proposes the token at ``anchor + k + 1``.

    Args:
        student: ``[N, K, hidden]`` the drafter's states, carrying gradients.
        teacher: ``[N, K, hidden]`` the target's states on the drafter's own tokens, or None where the
            loss needs none.
        head: maps both to logits.
        proposals: ``[N, K]`` the drafter's tokens.
        labels: ``[N, K]`` the recorded tokens.
        accepted: ``[N]`` accepted lengths, 0..K.
        valid: ``[N, K]`` slots up to the end of the drafted text (its first stop token).
        recorded: ``[N, K]`` slots that have a recorded token.
    """

    student: Tensor
    teacher: Tensor | None
    head: Head
    proposals: Tensor
    labels: Tensor
    accepted: Tensor
    valid: Tensor
    recorded: Tensor

    @property
    def slots(self) -> Tensor:
        """``[K]`` slot numbers from 0."""
        return torch.arange(self.proposals.shape[1], device=self.proposals.device)

    def accepted_stream(self, include_correction: bool = False) -> Tensor:
        """``[N, K]`` True at slots 1..n, and at the correction slot n + 1 where it is included."""
        return self.slots < (self.accepted + int(include_correction))[:, None]

    def rejected_stream(self) -> Tensor:
        """``[N, K]`` True at slots n + 1..K."""
        return self.slots >= self.accepted[:, None]

    def against_recorded(self, until_fail: bool) -> Blocks:
        """The same blocks judged by the recorded tokens alone, as where the target has not scored the drafter's own.

        Args:
            until_fail: only slots count that have a recorded token and lie no further than the first rejection.
        """
        same = (self.proposals == self.labels) & self.recorded
        judged = replace(self, accepted=same.long().cumprod(-1).sum(-1))
        if not until_fail:
            return judged
        return replace(judged, valid=self.valid & self.recorded & judged.until_fail())

    def until_fail(self) -> Tensor:
        """``[N, K]`` True up to and including the first rejected slot (Spec-AUF, arXiv 2607.01893)."""
        return self.slots <= self.accepted[:, None]
