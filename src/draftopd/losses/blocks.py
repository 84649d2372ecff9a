"""What a loss sees: the replayed blocks of a batch and their streams."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Head(Protocol):
    """An LM head, over the target's vocabulary or a part of it; ``softcap`` bounds the logits where set."""

    softcap: float | None

    @property
    def weight(self) -> Tensor: ...

    def logits(self, hidden: Tensor) -> Tensor:
        """``[..., hidden] -> [..., size]`` in float32."""
        ...

    def restrict(self, log_probs: Tensor) -> Tensor:
        """The columns of ``[..., vocab]`` that this head has, ``[..., size]``."""
        ...

    def covers(self, tokens: Tensor) -> Tensor:
        """Which tokens ``[...]`` it can give."""
        ...

    def row_of(self, tokens: Tensor) -> Tensor:
        """The place ``[...]`` of each token ``[...]`` among its logits."""
        ...


@dataclass(frozen=True)
class Blocks:
    """Replayed blocks, flattened over batch and anchors to ``N`` blocks of ``K`` slots.

    Slot ``k`` (``0..K-1`` here, ``1..K`` in the papers) proposes the token at ``anchor + k + 1``.

    Args:
        student: ``[N, K, hidden]`` the drafter's states, carrying gradients.
        teacher: ``[N, K, hidden]`` the target's states on the drafter's own tokens, or None where the
            loss needs none.
        head: maps the drafter's states to logits; the target's own where the drafter has none.
        proposals: ``[N, K]`` the drafter's tokens.
        labels: ``[N, K]`` the recorded tokens.
        accepted: ``[N]`` accepted lengths, 0..K.
        valid: ``[N, K]`` slots up to the end of the drafted text (its first stop token) where the drafter's
            vocabulary has the token that the target would take.
        recorded: ``[N, K]`` slots that have a recorded token.
        teacher_head: maps the target's states to logits; None: ``head`` does.
    """

    student: Tensor
    teacher: Tensor | None
    head: Head
    proposals: Tensor
    labels: Tensor
    accepted: Tensor
    valid: Tensor
    recorded: Tensor
    teacher_head: Head | None = None

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

    def teacher_logits(self, states: Tensor) -> Tensor:
        """The target's logits ``[..., vocab]`` at its states ``[..., hidden]``."""
        return (self.teacher_head or self.head).logits(states)

    def until_fail(self) -> Tensor:
        """``[N, K]`` True up to and including the first rejected slot (Spec-AUF, arXiv 2607.01893)."""
        return self.slots <= self.accepted[:, None]
