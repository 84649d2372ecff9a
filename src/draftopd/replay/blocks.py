"""The input of a loss: the replayed blocks of a batch and their streams."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from draftopd.targets.head import LMHead

#: The slots in which a loss needs the target's states. ``proposals``: every slot, along the drafter's own tokens.
#: ``until_fail``: up to and including the first rejected slot; at temperature 0 the drafter's own tokens before it are
#: the recorded ones. ``recorded``: every slot with a recorded token, along the recorded tokens. ``none``: no slot.
Scope = Literal["proposals", "until_fail", "recorded", "none"]


@dataclass(frozen=True)
class Blocks:
    """Replayed blocks, flattened over batch and anchors to ``N`` blocks of ``K`` slots.

    Slot ``k`` (``0..K-1`` here, ``1..K`` in the papers) proposes the token at ``anchor + k + 1``.

    Args:
        draft_states: ``[N, K, hidden]`` the drafter's states, carrying gradients.
        target_states: ``[N, K, hidden]`` the target's states along the tokens of the scope, or None in scope ``none``.
        head: maps the drafter's states to logits; the target's head if the drafter has none of its own.
        proposals: ``[N, K]`` the drafter's tokens.
        labels: ``[N, K]`` the recorded tokens.
        accepted: ``[N]`` accepted lengths, 0..K.
        valid: ``[N, K]`` the slots that may count in a loss, see :meth:`~draftopd.replay.replay.Drafts.blocks`.
        recorded: ``[N, K]`` slots that have a recorded token.
        target_head: maps the target's states to logits; None stands for ``head``.
    """

    draft_states: Tensor
    target_states: Tensor | None
    head: LMHead
    proposals: Tensor
    labels: Tensor
    accepted: Tensor
    valid: Tensor
    recorded: Tensor
    target_head: LMHead | None = None

    @property
    def slots(self) -> Tensor:
        """``[K]`` slot numbers from 0."""
        return torch.arange(self.proposals.shape[1], device=self.proposals.device)

    def accepted_stream(self, include_correction: bool = False) -> Tensor:
        """``[N, K]`` True at slots 1..n, and at the correction slot n + 1 if it is included."""
        return self.slots < (self.accepted + int(include_correction))[:, None]

    def rejected_stream(self) -> Tensor:
        """``[N, K]`` True at slots n + 1..K."""
        return self.slots >= self.accepted[:, None]

    def target_logits(self, states: Tensor) -> Tensor:
        """The target's logits ``[..., vocab]`` at its states ``[..., hidden]``."""
        return (self.target_head or self.head).logits(states)

    def until_fail(self) -> Tensor:
        """``[N, K]`` True up to and including the first rejected slot (Spec-AUF, arXiv 2607.01893)."""
        return self.slots <= self.accepted[:, None]
