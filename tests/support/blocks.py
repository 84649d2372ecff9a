"""Blocks made by hand, and the comparison of a loss with its slow reference."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from draftopd.losses.base import Loss
from draftopd.replay.blocks import Blocks
from draftopd.targets.head import LMHead

N, K, HIDDEN, VOCAB = 6, 5, 8, 23


class WideHead(LMHead):
    """A head that keeps count of the rows it is asked for, and computes in the states' precision."""

    def __init__(self, module: nn.Module, softcap: float | None = None) -> None:
        super().__init__(module, softcap)
        self.rows: list[int] = []

    def logits(self, hidden: Tensor) -> Tensor:
        self.rows.append(hidden.shape[0])
        logits = hidden @ self.weight.to(hidden.dtype).T
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


def make_blocks(accepted: list[int] | None = None, softcap: float | None = None, double: bool = True) -> Blocks:
    generator = torch.Generator().manual_seed(3)
    dtype = torch.float64 if double else torch.float32

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=dtype)

    module = nn.Linear(HIDDEN, VOCAB, bias=False, dtype=dtype).requires_grad_(False)
    module.weight.copy_(normal(VOCAB, HIDDEN))
    valid = torch.ones(N, K, dtype=torch.bool)
    valid[2, 3:] = False
    recorded = torch.ones(N, K, dtype=torch.bool)
    recorded[4, 2:] = False
    return Blocks(
        draft_states=normal(N, K, HIDDEN).requires_grad_(),
        target_states=normal(N, K, HIDDEN),
        head=WideHead(module, softcap),
        proposals=torch.randint(0, VOCAB, (N, K), generator=generator),
        labels=torch.randint(0, VOCAB, (N, K), generator=generator),
        accepted=torch.tensor(accepted if accepted is not None else [0, 1, 3, 5, 2, 4]),
        valid=valid,
        recorded=recorded,
    )


def identity_head(size: int) -> LMHead:
    """A frozen head whose states are the logits themselves."""
    module = nn.Linear(size, size, bias=False).requires_grad_(False)
    module.weight.copy_(torch.eye(size))
    return LMHead(module)


def laws(blocks: Blocks, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """p (at this temperature) and q of every slot, with plain softmax."""
    assert blocks.target_states is not None
    p = (blocks.head.logits(blocks.target_states) / temperature).softmax(-1)
    return p, blocks.head.logits(blocks.draft_states).softmax(-1)


def assert_same(loss: Loss, blocks: Blocks, reference: Tensor) -> None:
    value = loss(blocks).loss
    (gradient,) = torch.autograd.grad(value, blocks.draft_states)
    (expected,) = torch.autograd.grad(reference, blocks.draft_states)
    # Slot values are kept in float32.
    torch.testing.assert_close(value.double(), reference.double(), rtol=2e-6, atol=1e-6)
    torch.testing.assert_close(gradient, expected, rtol=2e-6, atol=1e-8)
    assert expected.abs().max() > 1e-3
