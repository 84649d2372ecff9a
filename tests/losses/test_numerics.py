"""Every loss where numbers are extreme, and in bfloat16 beside float32."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.losses.references import CASES
from tests.support.blocks import VOCAB, K, N, make_blocks
from torch import Tensor, nn

from draftopd.losses.acceptance import E2ETotalVariation, LKHybrid
from draftopd.losses.base import Loss
from draftopd.losses.distilled import Distilled
from draftopd.losses.divergence import forward_kl, jensen_shannon, reverse_kl
from draftopd.losses.target_view import MIN_LOG_P
from draftopd.replay.blocks import Blocks
from draftopd.targets.head import LMHead

LOSSES: dict[str, Callable[..., Loss]] = {name: case.build for name, case in CASES.items()}
LOSSES |= {"lk_hybrid": LKHybrid, "e2e_tv": E2ETotalVariation}
#: What a loss cannot be below or above, whatever the distributions. KLs end where an excluded token's price does.
BOUNDS = dict.fromkeys(LOSSES, (0.0, -MIN_LOG_P))
BOUNDS |= {"total_variation": (0.0, 1.0), "e2e_tv": (-K, 0.0), "sampled_kl": (0.0, 5.0), "jsd": (0.0, 0.7)}

generator = torch.Generator().manual_seed(0)
first, even = torch.arange(VOCAB) < 3, torch.arange(VOCAB) % 2 == 0
LOGITS = {
    "uniform": torch.zeros(VOCAB),
    "low": torch.full((VOCAB,), -1e4),
    "one_hot": torch.full((VOCAB,), -1e4).index_fill(0, torch.tensor([3]), 1e4),
    "another_one_hot": torch.full((VOCAB,), -1e4).index_fill(0, torch.tensor([4]), 1e4),
    "even_half": torch.where(even, 0.0, -1e4),
    "odd_half": torch.where(even, -1e4, 0.0),
    "signs": 1e4 * torch.randn(VOCAB, generator=generator).sign(),
    "wide": 1e4 * (2 * torch.rand(VOCAB, generator=generator) - 1),
    "narrow": 1e-4 * torch.randn(VOCAB, generator=generator),
    "ordinary": torch.randn(VOCAB, generator=generator),
}
#: Only the target's: tokens that top-k left out.
EXCLUDING = {
    "top_3": torch.where(first, LOGITS["ordinary"], -torch.inf),
    "top_1": torch.where(torch.arange(VOCAB) == 5, 0.0, -torch.inf),
    "half": torch.where(even, LOGITS["wide"], -torch.inf),
}
OPTIONS: list[dict[str, Any]] = [{}, {"target_top_k": 1}, {"target_top_k": 4}, {"target_temperature": 0.1}]


class Given(LMHead):
    """A head whose states are the logits themselves, -inf included."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(VOCAB, VOCAB, bias=False).requires_grad_(False))

    def logits(self, hidden: Tensor) -> Tensor:
        return hidden.float()


#: Logits of one kind, or the sum of a kind and a share of another: names and share.
Mixture = tuple[str, str, float]


def mixtures(names: list[str]) -> st.SearchStrategy[Mixture]:
    return st.tuples(st.sampled_from(names), st.sampled_from(list(LOGITS)), st.sampled_from((0.0, 1e-3, 1.0)))


def logits_of(mixture: Mixture) -> Tensor:
    one, other, share = mixture
    return (LOGITS | EXCLUDING)[one] + share * LOGITS[other]


#: What drafter and target are in some slots; None: the target is as the drafter.
pairs = st.tuples(mixtures(list(LOGITS)), st.none() | mixtures([*LOGITS, *EXCLUDING]))


@pytest.mark.parametrize("name", LOSSES)
@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(drawn=st.lists(pairs, min_size=1, max_size=4), options=st.sampled_from(OPTIONS), half=st.booleans())
def test_extreme_distributions_give_finite_losses_and_gradients(
    name: str, drawn: list[tuple[Mixture, Mixture | None]], options: dict[str, Any], half: bool
) -> None:
    """Each slot of the batch is one of the drawn pairs."""
    loss = LOSSES[name](**({} if name in CASES and CASES[name].hard else options))
    sides = ([drafted for drafted, _ in drawn], [targets or drafted for drafted, targets in drawn])
    states, targets = (
        torch.stack([logits_of(side[i % len(side)]) for i in range(N * K)])
        .view(N, K, VOCAB)
        .to(torch.bfloat16 if half else torch.float32)
        for side in sides
    )
    states.requires_grad_()
    blocks = replace(make_blocks(double=False), draft_states=states, target_states=targets, head=Given())
    value = loss(blocks).loss
    value.backward()
    assert states.grad is not None and states.grad.isfinite().all()
    low, high = BOUNDS[name]
    # Rounding of logits that are 2e4 apart shows in the KLs, and in probabilities not at all.
    slack = 1e-5 if high <= 5 else 2e-2
    assert low - slack <= float(value.detach()) <= high + slack


def test_an_excluded_token_costs_nothing_where_it_should() -> None:
    """A target's logit of -inf: ``0 log 0`` is 0 in forward KL, and mass m of the drafter's pays m times the price."""
    blocks = make_blocks(double=False)
    targets = torch.randn(N, K, VOCAB, generator=torch.Generator().manual_seed(1)).masked_fill(~first, -torch.inf)
    drafted = torch.randn(N, K, VOCAB, generator=torch.Generator().manual_seed(2))
    blocks = replace(blocks, draft_states=drafted, target_states=targets, head=Given())
    log_p, log_q = targets[..., first].double().log_softmax(-1), drafted.double().log_softmax(-1)
    expected = (log_p.exp() * (log_p - log_q[..., first])).sum(-1)[blocks.valid].mean()
    torch.testing.assert_close(Distilled(accepted=forward_kl)(blocks).loss.double(), expected, rtol=1e-5, atol=0)
    outside = log_q.exp()[..., ~first].sum(-1)[blocks.valid].mean()
    torch.testing.assert_close(
        Distilled(accepted=reverse_kl)(blocks).loss.double(), -MIN_LOG_P * outside, rtol=1e-4, atol=0
    )
    assert 0 < Distilled(accepted=jensen_shannon)(blocks).loss < 0.7


def test_what_is_not_excluded_keeps_its_value() -> None:
    """Logits 2e4 apart cost that much, no less."""
    drafted, targets = LOGITS["one_hot"], LOGITS["another_one_hot"]
    blocks = replace(
        make_blocks(double=False),
        draft_states=drafted.expand(N, K, -1),
        target_states=targets.expand(N, K, -1),
        head=Given(),
    )
    for divergence in (forward_kl, reverse_kl):
        exact = divergence(drafted.double(), targets.double().log_softmax(-1))
        torch.testing.assert_close(Distilled(accepted=divergence)(blocks).loss.double(), exact, rtol=1e-6, atol=0)


#: Relative differences between bfloat16 and float32 of the value, and of the gradient's norm. A gradient that is
#: chosen by ``min(p, q)`` jumps where p and q are equal, so rounding moves it more.
SMOOTH, JUMPS = (0.01, 0.025), (0.01, 0.3)
AGREEMENT = dict.fromkeys(LOSSES, SMOOTH)
AGREEMENT |= dict.fromkeys(("total_variation", "lk_log", "lk_hybrid", "e2e_tv"), JUMPS)


def random_blocks(dtype: torch.dtype, seed: int, blocks: int = 24, hidden: int = 64, vocab: int = 200) -> Blocks:
    """A drafter about half way to its target, at ordinary logits; states and head in ``dtype``."""
    drawn = torch.Generator().manual_seed(seed)
    weight = torch.randn(vocab, hidden, generator=drawn) * 2 / hidden**0.5
    targets = torch.randn(blocks, K, hidden, generator=drawn)
    drafted = 0.6 * targets + 0.6 * torch.randn(blocks, K, hidden, generator=drawn)
    module = nn.Linear(hidden, vocab, bias=False, dtype=dtype).requires_grad_(False)
    module.weight.copy_(weight)
    everywhere = torch.ones(blocks, K, dtype=torch.bool)
    return Blocks(
        drafted.to(dtype).requires_grad_(), targets.to(dtype), LMHead(module), (drafted @ weight.T).argmax(-1),
        (targets @ weight.T).argmax(-1), torch.randint(0, K + 1, (blocks,), generator=drawn), everywhere, everywhere,
    )  # fmt: skip


@pytest.mark.parametrize("name", LOSSES)
def test_bfloat16_stays_near_float32(name: str) -> None:
    for seed in range(5):
        found = []
        for dtype in (torch.float32, torch.bfloat16):
            blocks = random_blocks(dtype, seed)
            value = LOSSES[name]()(blocks).loss
            (gradient,) = torch.autograd.grad(value, blocks.draft_states)
            assert gradient.dtype == dtype and value.dtype == torch.float32
            found.append((value.detach().double(), gradient.double()))
        (exact, slope), (rounded, moved) = found
        of_value, of_gradient = AGREEMENT[name]
        assert abs(rounded - exact) <= of_value * abs(exact)
        assert (moved - slope).norm() <= of_gradient * slope.norm()
