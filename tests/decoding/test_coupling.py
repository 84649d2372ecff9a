"""The reverse coupling against the law of real rejection sampling, written out outcome by outcome."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import pytest
import torch
from tests.support.laws import CORRECT, SAMPLES, VOCAB, WRONG, ChiSquare, Laws
from torch import Tensor

from draftopd.decoding import coupling
from draftopd.decoding.coupling import couple
from draftopd.decoding.sampling import draw, inverse_draw


def forward_law(laws: Laws) -> Tensor:
    """``[V, V, 3, V]``: the law of (d_1, d_2, accepted length, correction or bonus) under rejection sampling."""
    law = torch.zeros(VOCAB, VOCAB, 3, VOCAB, dtype=torch.float64)
    p, q = [t.double() for t in laws.p], [t.double() for t in laws.q]
    for a, b in product(range(VOCAB), repeat=2):
        drafted = q[0][a] * q[1][a, b]
        first = min(1.0, float(p[0][a] / q[0][a])) if q[0][a] > 0 else 0.0
        second = min(1.0, float(p[1][a, b] / q[1][a, b])) if q[1][a, b] > 0 else 0.0
        for n, chance, weights in (
            (0, 1 - first, (p[0] - q[0]).clamp_min(0)),
            (1, first * (1 - second), (p[1][a] - q[1][a]).clamp_min(0)),
            (2, first * second, p[2][a, b]),
        ):
            if chance > 0 and weights.sum() > 0:
                law[a, b, n] += drafted * chance * weights / weights.sum()
    assert abs(float(law.sum()) - 1) < 1e-6
    return law


def coupled_outcomes(laws: Laws, slot_by_slot: bool) -> Tensor:
    """Texts of the target, read backwards: each outcome as one number."""
    text = torch.zeros(SAMPLES, 0, dtype=torch.long)
    p = []
    for k in range(3):
        p.append(laws.at(laws.p[k], text))
        text = torch.cat([text, draw(p[-1], laws.generator)[:, None]], 1)
    luck = torch.rand(SAMPLES, 2, 2, generator=laws.generator, dtype=torch.float64)
    recorded, agreed = torch.ones(SAMPLES, 2, dtype=torch.bool), torch.ones(SAMPLES, dtype=torch.bool)
    if slot_by_slot:  # as an autoregressive drafter: each q follows the drafter's own earlier proposal
        proposals = torch.zeros(SAMPLES, 0, dtype=torch.long)
        for k in range(2):
            part = slice(k, k + 1)
            q = laws.at(laws.q[k], proposals)[:, None]
            one = couple(text[:, part], recorded[:, part], q, p[k][:, None], luck[:, part], agreed)
            proposals, agreed = torch.cat([proposals, one.proposals], 1), one.agreed
    else:
        q = torch.stack([laws.at(laws.q[k], text[:, :k]) for k in range(2)], 1)
        proposals, agreed = couple(text[:, :2], recorded, q, torch.stack(p[:2], 1), luck, agreed)
    same = proposals == text[:, :2]
    accepted = same.long().cumprod(-1).sum(-1)
    assert torch.equal(agreed, accepted == 2)
    emitted = text.gather(1, accepted[:, None])[:, 0]
    return ((proposals[:, 0] * VOCAB + proposals[:, 1]) * 3 + accepted) * VOCAB + emitted


def p_value(chi_square: ChiSquare, slot_by_slot: bool = True, seed: int = 0) -> float:
    # A block-parallel drafter's distributions depend on no proposal.
    laws = Laws(2, seed)
    if not slot_by_slot:
        laws.q[1] = laws.q[1][:1].expand(VOCAB, VOCAB)
    return chi_square(coupled_outcomes(laws, slot_by_slot), forward_law(laws))


@pytest.mark.parametrize("slot_by_slot", [False, True])
@pytest.mark.parametrize("seed", [0, 1])
def test_joint_law_of_proposals_accepted_length_and_text(slot_by_slot: bool, seed: int, chi_square: ChiSquare) -> None:
    assert p_value(chi_square, slot_by_slot, seed) > CORRECT


def from_drafter(q: Tensor, p: Tensor, rejected: Tensor, luck: Tensor) -> Tensor:
    return inverse_draw(q, luck)


def from_the_other_residual(q: Tensor, p: Tensor, rejected: Tensor, luck: Tensor) -> Tensor:
    residual = (p - q).clamp_min(0) + 1e-9
    return inverse_draw(torch.where(rejected[..., None], residual, q), luck)


def residual_at_every_slot(q: Tensor, p: Tensor, rejected: Tensor, luck: Tensor) -> Tensor:
    return inverse_draw((q - p).clamp_min(0) + 1e-9, luck)


@pytest.mark.parametrize("wrong", [from_drafter, from_the_other_residual, residual_at_every_slot])
def test_a_wrong_residual_is_noticed(
    wrong: Callable[..., Tensor], chi_square: ChiSquare, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(coupling, "draw_rejected", wrong)
    laws = Laws(2)
    text = torch.multinomial(laws.p[0], SAMPLES, replacement=True, generator=laws.generator)
    luck = torch.rand(SAMPLES, 1, 2, generator=laws.generator, dtype=torch.float64)
    agreed = torch.ones(SAMPLES, dtype=torch.bool)
    q, p = laws.q[0].expand(SAMPLES, 1, VOCAB), laws.p[0].expand(SAMPLES, 1, VOCAB)
    if wrong is residual_at_every_slot:
        agreed[: SAMPLES // 2] = False
    proposals, _ = couple(text[:, None], torch.ones(SAMPLES, 1).bool(), q, p, luck, agreed)
    # Proposals alone must follow q, whatever the text was.
    assert chi_square(proposals[:, 0], laws.q[0]) < WRONG


def test_one_percent_off_is_noticed(chi_square: ChiSquare) -> None:
    laws = Laws(2)
    right = forward_law(laws)
    shifted = right.clone()
    shifted[4] *= 1 - 0.01 / right[4].sum()
    shifted[2] *= 1 + 0.01 / right[2].sum()
    outcomes = coupled_outcomes(laws, slot_by_slot=True)
    assert chi_square(outcomes, right) > CORRECT
    assert chi_square(outcomes, shifted) < WRONG


def test_beyond_the_end_of_the_text_the_drafter_draws_freely(chi_square: ChiSquare) -> None:
    laws = Laws(1)
    luck = torch.rand(SAMPLES, 1, 2, generator=laws.generator, dtype=torch.float64)
    label, unrecorded = torch.full((SAMPLES, 1), 2), torch.zeros(SAMPLES, 1, dtype=torch.bool)
    q, p = laws.q[0].expand(SAMPLES, 1, VOCAB), laws.p[0].expand(SAMPLES, 1, VOCAB)
    proposals, agreed = couple(label, unrecorded, q, p, luck, torch.ones(SAMPLES, dtype=torch.bool))
    assert chi_square(proposals[:, 0], laws.q[0]) > CORRECT
    assert not agreed.any()


def test_equal_distributions_always_agree() -> None:
    p = torch.rand(1000, 3, VOCAB)
    p = p / p.sum(-1, keepdim=True)
    labels = draw(p)
    luck = torch.rand(1000, 3, 2, dtype=torch.float64)
    recorded = torch.ones(1000, 3, dtype=torch.bool)
    proposals, agreed = couple(labels, recorded, p, p, luck, torch.ones(1000, dtype=torch.bool))
    assert torch.equal(proposals, labels) and agreed.all()


def test_inverse_draw_takes_the_token_the_number_falls_on() -> None:
    weights = torch.tensor([0.0, 2.0, 0.0, 1.0, 1.0, 0.0])
    for luck, token in ((0.0, 1), (0.4999, 1), (0.5, 3), (0.7499, 3), (0.75, 4), (1 - 2**-53, 4)):
        assert inverse_draw(weights, torch.tensor(luck, dtype=torch.float64)).item() == token
