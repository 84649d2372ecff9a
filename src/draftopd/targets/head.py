"""The target's LM head, shared with the drafter and frozen."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class LMHead:
    """Hidden states to logits.

    Args:
        module: the output embedding, ``weight [vocab, hidden]``; never trained.
        softcap: logits pass through ``softcap * tanh(logits / softcap)`` where set (Gemma).
    """

    def __init__(self, module: nn.Module, softcap: float | None = None) -> None:
        self._module = module
        self.softcap = softcap

    @property
    def weight(self) -> Tensor:
        weight = self._module.weight
        assert isinstance(weight, Tensor)
        return weight

    def logits(self, hidden: Tensor) -> Tensor:
        """``[..., hidden] -> [..., vocab]`` in float32."""
        logits = torch.nn.functional.linear(hidden.to(self.weight.dtype), self.weight).float()
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)
