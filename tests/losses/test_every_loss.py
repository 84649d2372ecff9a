"""Every loss with every option against one slow float64 reference, slot by slot and token by token."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from tests.losses.references import CASES, alpha, kl, slow, total
from tests.support.blocks import HIDDEN, VOCAB, K, N, WideHead, assert_same, identity_head, laws, make_blocks
from tests.support.laws import SAMPLES, Laws
from torch import Tensor, nn

from draftopd.decoding.sampling import draw
from draftopd.decoding.verify import verify_rejection
from draftopd.losses.acceptance import E2ETotalVariation, LKHybrid
from draftopd.losses.base import Loss
from draftopd.losses.blend import Blend
from draftopd.losses.cross_entropy import CrossEntropy, DPace, Reach
from draftopd.losses.distilled import Distilled
from draftopd.losses.divergence import (
    UNKNOWN_COPIES,
    divergence,
    facts,
    forward_kl,
    jensen_shannon,
    k3,
    keep_top_k,
    log_overlap,
    overlap,
    reverse_kl,
    total_variation,
    two_outcome_kl,
)
from draftopd.losses.sampled_kl import SampledKL
from draftopd.losses.target_view import TargetView
from draftopd.losses.weighting import expected_length_gradient, marginal_gain
from draftopd.replay.blocks import Blocks
from draftopd.targets import head
from draftopd.targets.head import Vocabulary

OPTIONS: list[dict[str, Any]] = [
    {},
    {"gamma": 0.6},
    {"gamma": 0.7, "accept_until_fail": True},
    {"accept_until_fail": True},
    {"include_correction": True, "rejected_weight": 0.0},
    {"include_correction": True, "accepted_weight": 0.4, "rejected_weight": 1.7},
    {"accept_until_fail": True, "accepted_weight": 2.0, "include_correction": True},
    {"target_temperature": 0.6},
    {"target_top_k": 4},
]
FORWARD, REVERSE = partial(Distilled, accepted=forward_kl), partial(Distilled, accepted=reverse_kl)
COMBINATIONS = [
    (name, options)
    for name, case in CASES.items()
    for options in OPTIONS
    # Losses with hard labels do not ask the target.
    if not case.hard or not any(o.startswith("target") for o in options)
]


@pytest.mark.parametrize("normalization", ["stream", "token"])
@pytest.mark.parametrize("name, options", COMBINATIONS, ids=str)
def test_value_and_gradient(name: str, options: dict[str, Any], normalization: str) -> None:
    blocks = make_blocks()
    loss = CASES[name].build(**options, normalization=normalization)
    assert_same(loss, blocks, slow(CASES[name], blocks, options, normalization))


@pytest.mark.parametrize("normalization", ["stream", "token"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gamma": 0.5, "accepted_gamma": 0.7, "accepted_weight": 2.0, "rejected_weight": 0.3},
        {"include_correction": True},
        {"accept_until_fail": True},
        {"target_temperature": 0.5},
        {"include_correction": True, "accept_until_fail": True, "rejected_weight": 0.0},
        {"accepted_weight": 0.0},
    ],
    ids=str,
)
@pytest.mark.parametrize("accepted", [None, [K] * N, [0] * N], ids=str)
def test_a_stream_may_be_empty(accepted: list[int] | None, options: dict[str, Any], normalization: str) -> None:
    case, blocks = CASES["asymmetric_kl"], make_blocks(accepted)
    loss = case.build(**options, normalization=normalization)
    if accepted == [K] * N and options.get("accepted_weight") == 0:
        assert loss(blocks).loss == 0  # no slot is left
        return
    assert_same(loss, blocks, slow(case, blocks, options, normalization))


def test_options_make_a_difference() -> None:
    build = CASES["asymmetric_kl"].build
    base = build(normalization="stream")(make_blocks()).loss
    variants = ({"gamma": 0.5}, {"include_correction": True}, {"accept_until_fail": True}, {"rejected_weight": 0.5})
    for options in variants:
        assert abs(build(normalization="stream", **options)(make_blocks()).loss - base) > 1e-3


def test_softcapped_head() -> None:
    blocks = make_blocks(softcap=1.5)
    assert_same(FORWARD(), blocks, slow(CASES["forward_kl"], blocks, {}, "token"))


def reduced_blocks() -> Blocks:
    """A drafter with an LM head of its own, which learns too and lacks a third of the tokens."""
    blocks = make_blocks()
    inside = torch.arange(VOCAB) % 3 != 1
    ids = inside.nonzero()[:, 0]
    generator = torch.Generator().manual_seed(9)
    module = nn.Linear(HIDDEN, len(ids), bias=False, dtype=torch.float64)
    module.weight.data.normal_(generator=generator)
    wide = WideHead(module)
    wide.vocabulary = Vocabulary(inside)
    return replace(blocks, head=wide, target_head=blocks.head, proposals=ids[blocks.proposals % len(ids)])


@pytest.mark.parametrize("chunk", [1, 2**24])
@pytest.mark.parametrize("name", CASES)
def test_a_reduced_vocabulary_and_a_head_that_learns(name: str, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "CHUNK_ELEMENTS", chunk)
    blocks = reduced_blocks()
    loss = CASES[name].build()
    expected = slow(CASES[name], blocks, {}, loss.normalization)
    both = (blocks.draft_states, blocks.head.weight)
    wanted = torch.autograd.grad(expected, both)
    value = loss(blocks).loss
    found = torch.autograd.grad(value, both)
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-6)
    for mine, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)


def test_the_expected_length_counts_the_mass_outside_the_vocabulary_as_rejected() -> None:
    blocks = reduced_blocks()
    ids = blocks.head.vocabulary.ids
    p, q = (
        blocks.target_logits(blocks.target_states).softmax(-1)[..., ids],
        blocks.head.logits(blocks.draft_states).softmax(-1),
    )
    shared = torch.minimum(p, q).sum(-1) * blocks.valid
    expected = -shared.cumprod(-1).sum(-1).mean()
    torch.testing.assert_close(E2ETotalVariation()(blocks).loss.double(), expected, rtol=1e-5, atol=1e-6)


def slow_hybrid(blocks: Blocks, scale: float, decay: float) -> Tensor:
    p, q = laws(blocks)
    terms = []
    for k in range(K):
        rows = [i for i in range(N) if blocks.valid[i, k]]
        mean = sum(float(alpha(p[i, k], q[i, k]).detach()) for i in rows) / len(rows)
        w = scale * math.exp(-decay * mean)
        terms += [w * kl(p[i, k], q[i, k]) + (1 - w) * (1 - alpha(p[i, k], q[i, k])) for i in rows]
    return total(terms) / len(terms)


@pytest.mark.parametrize("scale, decay", [(1.0, 3.0), (0.5, 1.0), (0.0, 3.0)])
def test_lk_hybrid(scale: float, decay: float) -> None:
    blocks = make_blocks()
    assert_same(LKHybrid(kl_scale=scale, kl_decay=decay), blocks, slow_hybrid(blocks, scale, decay))


@pytest.mark.parametrize("options", [{}, {"gamma": 0.7}, {"accept_until_fail": True}, {"target_temperature": 0.5}])
def test_e2e_tv(options: dict[str, Any]) -> None:
    blocks = make_blocks()
    p, q = laws(blocks, options.get("target_temperature", 1.0))
    lengths = []
    for i in range(N):
        reach = torch.ones((), dtype=p.dtype)
        last = int(blocks.accepted[i]) + 1 if options.get("accept_until_fail") else K
        for k in range(1, K + 1):
            if not blocks.valid[i, k - 1] or k > last:
                break
            reach = reach * alpha(p[i, k - 1], q[i, k - 1])
            lengths.append(options.get("gamma", 1.0) ** (k - 1) * reach)
    assert_same(E2ETotalVariation(**options), blocks, -total(lengths) / N)


def test_e2e_tv_is_the_expected_accepted_length_of_real_rejection_sampling() -> None:
    """Against a Monte Carlo estimate: 300,000 blocks drawn and verified."""
    laws = Laws(3, seed=1, depends_on_prefix=False)
    proposals, q, p = laws.propose(SAMPLES, lambda probs: draw(probs, laws.generator))
    accepted = verify_rejection(proposals, q, p, laws.generator).accepted.double()

    one = Blocks(
        draft_states=q[:1].log().clamp_min(-1e4), target_states=p[:1, :3].log().clamp_min(-1e4),
        head=identity_head(laws.p[0].shape[-1]), proposals=proposals[:1],
        labels=proposals[:1], accepted=torch.tensor([3]),
        valid=torch.ones(1, 3, dtype=torch.bool), recorded=torch.ones(1, 3, dtype=torch.bool),
    )  # fmt: skip
    expected = -float(E2ETotalVariation()(one).loss)
    error = float(accepted.std()) / SAMPLES**0.5
    assert abs(float(accepted.mean()) - expected) < 4 * error < 0.02 * expected
    # Slots alone do not give it: the sum of the rates is another number.
    assert (
        abs(float(accepted.mean()) - float(overlap(one.draft_states[0], one.target_states[0].log_softmax(-1)).sum()))
        > 20 * error
    )


def test_top_k_keeps_the_mass_and_reports_what_it_spread() -> None:
    logits = torch.randn(5, VOCAB, dtype=torch.float64) * 2
    for k in (1, 4, VOCAB, VOCAB + 3):
        kept, outside = keep_top_k(logits, k)
        torch.testing.assert_close(kept.exp().sum(-1), torch.ones(5, dtype=torch.float64))
        exact = logits.softmax(-1).sort(descending=True).values
        torch.testing.assert_close(outside, exact[:, k:].sum(-1))
    blocks = make_blocks()
    parts = FORWARD(target_top_k=4)(blocks).parts
    outside = keep_top_k(blocks.head.logits(blocks.target_states[blocks.valid]), 4)[1]
    torch.testing.assert_close(parts["target_mass_outside_top_k"].double(), outside.mean().double(), rtol=1e-5, atol=0)
    errors = [abs(FORWARD(target_top_k=k)(blocks).loss - FORWARD()(blocks).loss) for k in (2, 8, 16)]
    assert errors[0] > errors[1] > errors[2] and errors[2] < 0.05
    assert "target_mass_outside_top_k" not in FORWARD()(blocks).parts


def test_estimates_have_the_divergences_as_their_mean() -> None:
    p, q = (
        torch.randn(6, generator=torch.Generator().manual_seed(s), dtype=torch.float64).log_softmax(-1) for s in (0, 1)
    )
    torch.testing.assert_close((q.exp() * k3(p, q)).sum(), (q.exp() * (q - p)).sum())
    assert (two_outcome_kl(p, q) >= 0).all() and two_outcome_kl(p, p).abs().max() < 1e-12
    assert (p.exp() * two_outcome_kl(p, q)).sum() <= (p.exp() * (p - q)).sum()


def test_jsd_lies_between_its_ends() -> None:
    s, t = torch.randn(7, VOCAB, dtype=torch.float64), torch.randn(7, VOCAB, dtype=torch.float64)
    p, q = t.softmax(-1), s.softmax(-1)
    t = t.log_softmax(-1)
    small = jensen_shannon(s, t, beta=1e-6) / 1e-6
    torch.testing.assert_close(small, torch.stack([kl(p[i], q[i]) for i in range(7)]), rtol=1e-4, atol=1e-5)
    assert (jensen_shannon(s, t) < math.log(2)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_log_overlap_is_the_logarithm_of_the_overlap(dtype: torch.dtype) -> None:
    s, t = torch.randn(9, VOCAB).to(dtype).float(), torch.randn(9, VOCAB).to(dtype).float().log_softmax(-1)
    torch.testing.assert_close(log_overlap(s, t).exp(), overlap(s, t))


@pytest.mark.parametrize(
    "build",
    [
        lambda: jensen_shannon(torch.zeros(1, 2), torch.zeros(1, 2), beta=0.0),
        lambda: jensen_shannon(torch.zeros(1, 2), torch.zeros(1, 2), beta=1.0),
        lambda: LKHybrid(kl_scale=1.5),
        lambda: LKHybrid(kl_decay=-1.0),
        lambda: E2ETotalVariation(gamma=0.0),
        lambda: SampledKL(floor=1.0),
        lambda: SampledKL(most=0.0),
        lambda: DPace(smoothing=1.5),
        lambda: TargetView(top_k=0),
        lambda: TargetView(temperature=1e-40),
        lambda: TargetView(temperature=math.inf),
        lambda: Distilled(accepted=total_variation, normalization="slot"),
        lambda: CrossEntropy(accepted_weight=0.0, rejected_weight=0.0),
        lambda: FORWARD(scored_on="nothing"),
        lambda: E2ETotalVariation(scored_on="nothing"),  # type: ignore[arg-type]
        lambda: Blend(first=FORWARD(), second=REVERSE(), end=1.5),
    ],
)
def test_wrong_options_are_refused(build: Callable[[], Loss]) -> None:
    with pytest.raises(ValueError, match="found"):
        build()


def test_weights_by_confidence_are_gradients_of_the_expected_length() -> None:
    generator = torch.Generator().manual_seed(0)
    confidence = torch.rand(6, 5, dtype=torch.float64, generator=generator).requires_grad_()
    counted = torch.rand(6, 5, generator=generator) < 0.8
    lengths = []
    for c, present in zip(confidence, counted, strict=True):
        places = [k for k in range(5) if present[k]]
        lengths += [torch.stack([c[j] for j in places[: i + 1]]).prod() for i in range(len(places))]
    (gradient,) = torch.autograd.grad(total(lengths), confidence)
    sure = confidence.detach()
    torch.testing.assert_close(marginal_gain(sure, counted), gradient)
    torch.testing.assert_close(expected_length_gradient(sure, counted, 0.0), gradient * sure)
    loss = Reach(future=True).importance(None, -sure.log(), counted)  # type: ignore[arg-type]
    torch.testing.assert_close(loss, gradient)


def test_a_blend_goes_from_the_one_loss_to_the_other() -> None:
    blocks, first = make_blocks(), Blend(first=FORWARD(), second=CrossEntropy())
    loss = Blend(first=first, second=REVERSE(target_top_k=4), begin=0.2, end=0.8)
    values = [part(blocks).loss.item() for part in (FORWARD(), CrossEntropy(), REVERSE(target_top_k=4))]
    for progress in (0.0, 0.25, 0.9):
        loss.progress = progress
        out, share = loss(blocks), 0.2 + 0.6 * progress
        inner = (1 - progress) * values[0] + progress * values[1]
        assert out.loss.item() == pytest.approx((1 - share) * inner + share * values[2])
        assert [out.parts[name].item() for name in ("share", "first_share")] == pytest.approx([share, progress])
        assert "second_target_mass_outside_top_k" in out.parts


def test_a_blend_asks_the_target_for_all_that_its_losses_need() -> None:
    until_fail, proposals = FORWARD(accept_until_fail=True), FORWARD()
    recorded, none = FORWARD(scored_on="recorded"), CrossEntropy()
    assert Blend(first=until_fail, second=none).scope == "until_fail"
    assert Blend(first=until_fail, second=proposals).scope == "proposals"
    assert Blend(first=none, second=recorded).scope == "recorded" and Blend(first=none, second=none).scope == "none"
    assert Blend(first=none, second=FORWARD()).uses_proposals and not Blend(first=none, second=none).uses_proposals
    with pytest.raises(ValueError, match="same text"):
        Blend(first=recorded, second=proposals)


def test_what_a_divergence_states_reaches_its_loss() -> None:
    def own(draft_logits: Tensor, log_p: Tensor) -> Tensor:
        return draft_logits.sum(-1)

    stated = divergence(logit_copies=4, renormalize=False)(lambda draft_logits, log_p: draft_logits.sum(-1))
    assert facts(own) == (UNKNOWN_COPIES, True) and facts(partial(partial(stated))) == (4, False)
    assert Distilled(accepted=stated).logit_copies == 4
    assert Distilled(accepted=stated, rejected=own).logit_copies == UNKNOWN_COPIES
    assert Blend(first=CrossEntropy(), second=Distilled(accepted=stated)).logit_copies == 4


def test_a_slot_in_both_streams_is_computed_once_where_both_have_one_divergence() -> None:
    blocks = make_blocks([0] * N)
    rows = []
    for rejected in (None, reverse_kl):
        blocks.head.rows.clear()
        Distilled(accepted=forward_kl, rejected=rejected, include_correction=True)(blocks)
        rows.append(sum(blocks.head.rows))
    valid = int(blocks.valid.sum())
    assert rows == [2 * valid, 2 * (valid + N)]  # drafter and target; the correction slot of each block once more
