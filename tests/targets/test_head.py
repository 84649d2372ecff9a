"""The shared LM head."""

from __future__ import annotations

import torch
from torch import nn

from draftopd.targets.head import LMHead


def test_logits_are_float32_whatever_comes_in() -> None:
    module = nn.Linear(6, 11, bias=False).bfloat16()
    hidden = torch.randn(2, 3, 6)
    logits = LMHead(module).logits(hidden)
    assert logits.dtype == torch.float32
    assert torch.equal(logits, module(hidden.bfloat16()).float())


def test_softcap() -> None:
    module, hidden = nn.Linear(6, 11, bias=False), 20 * torch.randn(5, 6)
    plain, capped = LMHead(module).logits(hidden), LMHead(module, softcap=2.0).logits(hidden)
    assert torch.allclose(capped, 2 * torch.tanh(plain / 2))
    assert plain.abs().max() > 2 >= capped.abs().max()


def test_weight_follows_the_module() -> None:
    module = nn.Linear(6, 11, bias=False)
    head = LMHead(module)
    module.to(torch.float64)
    assert head.weight is module.weight and head.weight.dtype == torch.float64
