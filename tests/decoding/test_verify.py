"""Acceptance rules: against loops, and against the target's own law."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import pytest
import torch
from tests.support.laws import CORRECT, SAMPLES, VOCAB, WRONG, ChiSquare, Laws, number
from torch import Tensor

from draftopd.decoding import verify
from draftopd.decoding.sampling import draw
from draftopd.decoding.verify import Verdict, accepted_prefix, residual_at, verify_matching, verify_rejection


def rejection_p_value(laws: Laws, chi_square: ChiSquare) -> float:
    proposals, q, p = laws.propose(SAMPLES, lambda probs: draw(probs, laws.generator))
    verdict = verify_rejection(proposals, q, p, laws.generator)
    return chi_square(number(laws.complete(proposals, verdict)), laws.target_law())


def target_only_p_value(laws: Laws, chi_square: ChiSquare, fresh_correction: bool = False) -> float:
    proposals, _, p = laws.propose(SAMPLES, lambda probs: probs.argmax(-1))
    verdict = verify_matching(proposals, draw(p, laws.generator))
    if fresh_correction:
        verdict = verdict._replace(token=draw(residual_at(verdict.accepted, 0 * p[:, 1:], p), laws.generator))
    return chi_square(number(laws.complete(proposals, verdict)), laws.target_law())


def test_accepted_prefix_is_the_leading_run() -> None:
    for row in product([False, True], repeat=4):
        expected = next((i for i, ok in enumerate(row) if not ok), 4)
        assert accepted_prefix(torch.tensor(row)).item() == expected


def test_matching_equals_a_loop() -> None:
    generator = torch.Generator().manual_seed(0)
    proposals = torch.randint(2, (7, 11, 4), generator=generator)
    target_tokens = torch.randint(2, (7, 11, 5), generator=generator)
    accepted, token = verify_matching(proposals, target_tokens)
    seen = set()
    for b, a in product(range(7), range(11)):
        n = 0
        while n < 4 and proposals[b, a, n] == target_tokens[b, a, n]:
            n += 1
        seen.add(n)
        assert accepted[b, a] == n
        assert token[b, a] == target_tokens[b, a, n]
    assert seen == {0, 1, 2, 3, 4}


@pytest.mark.parametrize("proposals", [1, 2, 3])
def test_rejection_sampling_follows_the_targets_law(proposals: int, chi_square: ChiSquare) -> None:
    assert rejection_p_value(Laws(proposals), chi_square) > CORRECT


@pytest.mark.parametrize("proposals", [2, 3])
def test_target_only_follows_the_targets_law(proposals: int, chi_square: ChiSquare) -> None:
    assert target_only_p_value(Laws(proposals), chi_square) > CORRECT


def test_one_percent_off_is_noticed(chi_square: ChiSquare) -> None:
    laws = Laws(2)
    right = laws.target_law()
    shifted = right.clone()
    # One hundredth of the mass moves, between first tokens.
    shifted[4] *= 1 - 0.01 / right[4].sum()
    shifted[2] *= 1 + 0.01 / right[2].sum()
    samples = torch.multinomial(right.flatten(), SAMPLES, replacement=True, generator=laws.generator)
    assert chi_square(samples, right) > CORRECT
    assert chi_square(samples, shifted) < WRONG


def correction_from_target(accepted: Tensor, draft_probs: Tensor, target_probs: Tensor) -> Tensor:
    slot = accepted[..., None, None].expand(*accepted.shape, 1, target_probs.shape[-1])
    return target_probs.gather(-2, slot)[..., 0, :]


def correction_without_clamp(accepted: Tensor, draft_probs: Tensor, target_probs: Tensor) -> Tensor:
    padded = torch.cat([draft_probs, torch.zeros_like(target_probs[..., :1, :])], -2)
    slot = accepted[..., None, None].expand(*accepted.shape, 1, target_probs.shape[-1])
    return (target_probs - padded).gather(-2, slot)[..., 0, :].abs()


def bonus_from_last_slot(accepted: Tensor, draft_probs: Tensor, target_probs: Tensor) -> Tensor:
    last = target_probs[..., -2:-1, :]
    return residual_at(accepted, draft_probs, torch.cat([target_probs[..., :-1, :], last], -2))


@pytest.mark.parametrize("wrong", [correction_from_target, correction_without_clamp, bonus_from_last_slot])
def test_a_wrong_residual_is_noticed(
    wrong: Callable[..., Tensor], chi_square: ChiSquare, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify, "residual_at", wrong)
    assert rejection_p_value(Laws(2), chi_square) < WRONG


def test_a_fresh_correction_in_target_only_is_noticed(chi_square: ChiSquare) -> None:
    assert target_only_p_value(Laws(2), chi_square, fresh_correction=True) < WRONG


@pytest.mark.parametrize("depends_on_prefix", [False, True])
def test_expected_accepted_length(depends_on_prefix: bool) -> None:
    laws = Laws(3, seed=1, depends_on_prefix=depends_on_prefix)
    proposals, q, p = laws.propose(SAMPLES, lambda probs: draw(probs, laws.generator))
    accepted = verify_rejection(proposals, q, p, laws.generator).accepted.double()
    if depends_on_prefix:
        expected, reach = 0.0, torch.ones((), dtype=torch.float64)
        for p_k, q_k in zip(laws.p[:-1], laws.q, strict=True):
            reach = reach[..., None] * torch.minimum(p_k, q_k).double()
            expected += float(reach.sum())
    else:
        alpha = torch.minimum(p[0, :-1], q[0]).double().sum(-1)
        expected = float(alpha.cumprod(0).sum())
    error = float(accepted.std()) / SAMPLES**0.5
    assert abs(float(accepted.mean()) - expected) < 4 * error
    assert error < 0.01 * expected


def test_equal_distributions_accept_everything() -> None:
    laws = Laws(3)
    laws.q = laws.p[:-1]
    proposals, q, p = laws.propose(10_000, lambda probs: draw(probs, laws.generator))
    assert verify_rejection(proposals, q, p, laws.generator).accepted.eq(3).all()


def test_residual_at_each_slot() -> None:
    p = torch.tensor([[0.5, 0.5, 0.0], [0.2, 0.3, 0.5], [0.1, 0.1, 0.8]])
    q = torch.tensor([[0.7, 0.1, 0.2], [0.2, 0.3, 0.5]])
    expected = torch.tensor([[0.0, 0.4, 0.0], [0.2, 0.3, 0.5], [0.1, 0.1, 0.8]])
    residual = residual_at(torch.arange(3), q.expand(3, -1, -1), p.expand(3, -1, -1))
    assert torch.allclose(residual, expected, atol=1e-7)


def test_rejection_over_blocks_and_seeds() -> None:
    laws = Laws(2)
    proposals, q, p = laws.propose(24, lambda probs: draw(probs, laws.generator))

    def verdict(seed: int, *shape: int) -> Verdict:
        generator = torch.Generator().manual_seed(seed)
        blocks = (proposals.view(*shape, 2), q.view(*shape, 2, VOCAB), p.view(*shape, 3, VOCAB))
        return verify_rejection(*blocks, generator)

    flat, blocked, other = verdict(3, 24), verdict(3, 4, 6), verdict(4, 24)
    assert torch.equal(flat.accepted.view(4, 6), blocked.accepted)
    assert torch.equal(flat.token.view(4, 6), blocked.token)
    assert not torch.equal(flat.token, other.token)
