"""Every loss with every option against one slow float64 reference, slot by slot and token by token."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.support.blocks import HIDDEN, VOCAB, K, N, WideHead, assert_same, identity_head, make_blocks
from tests.support.laws import SAMPLES, Laws
from torch import Tensor, nn

from draftopd.decoding.sampling import draw
from draftopd.decoding.verify import verify_rejection
from draftopd.losses.acceptance import LK, E2ETotalVariation, TotalVariation
from draftopd.losses.asymmetric_kl import AsymmetricKL
from draftopd.losses.base import Loss, StreamLoss, TargetView
from draftopd.losses.blend import Blend
from draftopd.losses.cross_entropy import CrossEntropy, DPace, Reach
from draftopd.losses.divergence import jensen_shannon, k3, keep_top_k, log_overlap, overlap, two_outcome_kl
from draftopd.losses.kl import JSD, ForwardKL, ReverseKL
from draftopd.losses.sampled_kl import SampledKL
from draftopd.losses.weighting import expected_length_share, marginal_gain
from draftopd.replay.blocks import Blocks
from draftopd.targets import head
from draftopd.targets.head import Vocabulary

Law = Tensor
SlotValue = Callable[[Law, Law, int, int], Tensor]  # p, q, proposal, label


def total(terms: list[Tensor]) -> Tensor:
    return torch.stack(terms).sum()


def kl(p: Law, q: Law) -> Tensor:
    return total([p[v] * (p[v] / q[v]).log() for v in range(len(p))])


def jsd(p: Law, q: Law, beta: float) -> Tensor:
    m = beta * p + (1 - beta) * q
    return beta * kl(p, m) + (1 - beta) * kl(q, m)


def alpha(p: Law, q: Law) -> Tensor:
    return total([torch.minimum(p[v], q[v]) for v in range(len(p))])


def floored(p: Law, token: int) -> Tensor:
    return p[token].log() if p[token].log() > -6 else torch.full((), -6.0, dtype=p.dtype)


def two_outcomes(p: Law, q: Law, token: int) -> Tensor:
    a, b = floored(p, token), floored(q, token)
    value = a.exp() * (a - b) + (1 - a.exp()) * ((1 - a.exp()) / (1 - b.exp())).log()
    return value if value < 5 else value * 0 + 5


def estimate(p: Law, q: Law, token: int) -> Tensor:
    r = floored(p, token) - floored(q, token)
    value = r.exp() - r - 1
    return value if value < 5 else value * 0 + 5


#: Each loss: how it is made, its value on the accepted and on the rejected stream, its decay.
CASES: dict[str, tuple[Callable[..., StreamLoss], SlotValue, SlotValue]] = {
    "asymmetric_kl": (AsymmetricKL, lambda p, q, d, y: kl(p, q), lambda p, q, d, y: kl(q, p)),
    "forward_kl": (ForwardKL, lambda p, q, d, y: kl(p, q), lambda p, q, d, y: kl(p, q)),
    "reverse_kl": (ReverseKL, lambda p, q, d, y: kl(q, p), lambda p, q, d, y: kl(q, p)),
    "jsd": (lambda **o: JSD(0.3, **o), lambda p, q, d, y: jsd(p, q, 0.3), lambda p, q, d, y: jsd(p, q, 0.3)),
    "total_variation": (TotalVariation, lambda p, q, d, y: 1 - alpha(p, q), lambda p, q, d, y: 1 - alpha(p, q)),
    "lk_log": (
        lambda **o: LK("log", **o),
        lambda p, q, d, y: -alpha(p, q).log(),
        lambda p, q, d, y: -alpha(p, q).log(),
    ),
    "sampled_kl": (
        lambda **o: SampledKL(-6.0, 5.0, **o),
        lambda p, q, d, y: two_outcomes(p, q, y),
        lambda p, q, d, y: estimate(p, q, d),
    ),
    "cross_entropy": (CrossEntropy, lambda p, q, d, y: -q[y].log(), lambda p, q, d, y: -q[y].log()),
    "d_pace": (DPace, lambda p, q, d, y: -q[y].log(), lambda p, q, d, y: -q[y].log()),
    "reach": (Reach, lambda p, q, d, y: -q[y].log(), lambda p, q, d, y: -q[y].log()),
}
#: Losses for which the target's law is not renormalised over the drafter's vocabulary.
ACCEPTANCE = ("total_variation", "lk_log", "sampled_kl")
#: Losses of the recorded tokens alone.
HARD = ("cross_entropy", "d_pace", "reach")
OPTIONS: list[dict[str, Any]] = [
    {},
    {"gamma": 0.6},
    {"accept_until_fail": True},
    {"include_correction": True, "rejected_weight": 0.0},
    {"include_correction": True, "accepted_weight": 0.4, "rejected_weight": 1.7},
    {"accept_until_fail": True, "accepted_weight": 2.0, "include_correction": True},
    {"target_temperature": 0.6},
    {"target_top_k": 4},
]


def slow_target(logits: Tensor, temperature: float, top_k: int | None) -> Law:
    p = (logits / temperature).softmax(-1)
    if top_k is None:
        return p
    best = p.argsort(descending=True)[:top_k].tolist()
    rest = (1 - p[best].sum()) / (VOCAB - top_k)
    return torch.stack([p[v] if v in best else rest for v in range(VOCAB)])


def slow(name: str, loss: StreamLoss, blocks: Blocks, options: dict[str, Any], normalization: str) -> Tensor:
    """The loss written out."""
    hard = name in HARD
    _, accepted_value, rejected_value = CASES[name]
    drafted = blocks.head.logits(blocks.draft_states).softmax(-1)
    targets = blocks.target_logits(blocks.target_states)
    vocabulary = blocks.head.vocabulary
    row_of = {v: r for r, v in enumerate(vocabulary.ids.tolist() if vocabulary else range(VOCAB))}
    temperature, top_k = options.get("target_temperature", 1.0), options.get("target_top_k")
    gamma = options.get("gamma", 0.8 if name in ("asymmetric_kl", "sampled_kl") else 1.0)
    streams: list[list[tuple[Tensor, float, tuple[int, int]]]] = [[], []]
    for i in range(N):
        n = int(blocks.accepted[i])
        for k in range(1, K + 1):
            known = bool(blocks.recorded[i, k - 1]) and int(blocks.labels[i, k - 1]) in row_of
            if not (known if hard else blocks.valid[i, k - 1]):
                continue
            p, q = slow_target(targets[i, k - 1], temperature, top_k), drafted[i, k - 1]
            p = p[list(row_of)]
            if name not in ACCEPTANCE:
                p = p / p.sum()
            d, y = (row_of.get(int(t[i, k - 1]), -1) for t in (blocks.proposals, blocks.labels))
            decays = [1.0, gamma ** (k - 1)] if name in ("asymmetric_kl", "sampled_kl") else [gamma ** (k - 1)] * 2
            if hard:
                constant = options.get("gamma", 1 + 0.375 * (K + 1) if name == "cross_entropy" else None)
                decays = [1.0 if constant is None else math.exp(-(k - 1) / constant)] * 2
            # Of an accepted proposal the single-token estimate needs no label.
            labelled = known or k <= n or name != "sampled_kl"
            if k <= n + int(options.get("include_correction", False)) and labelled:
                weight = options.get("accepted_weight", 1.0) * decays[0]
                emitted = d if k <= n and not hard else y
                streams[0].append((accepted_value(p, q, d, emitted), weight, (i, k)))
            if n < k <= (n + 1 if options.get("accept_until_fail") else K):
                weight = options.get("rejected_weight", 1.0) * decays[1]
                streams[1].append((rejected_value(p, q, d, y), weight, (i, k)))
    if name == "d_pace":
        counted = {place for stream in streams for _, w, place in stream if w > 0}

        def share(i: int, k: int) -> float:
            reach, value = 1.0, 0.0
            for j in range(1, K + 1):
                if (i, j) not in counted:
                    continue
                reach *= 0.5 * float(drafted[i, j - 1, row_of[int(blocks.labels[i, j - 1])]].detach()) + 0.5
                value += reach if j >= k else 0.0
            return value

        streams = [[(v, w * share(*place), place) for v, w, place in stream] for stream in streams]
    if name == "reach":
        counted = {place for stream in streams for _, w, place in stream if w > 0}

        def before(i: int, k: int) -> float:
            earlier = [j for j in range(1, k) if (i, j) in counted]
            return math.prod(float(drafted[i, j - 1, row_of[int(blocks.labels[i, j - 1])]].detach()) for j in earlier)

        streams = [[(v, w * before(*place), place) for v, w, place in stream] for stream in streams]
    if normalization == "token":
        every = streams[0] + streams[1]
        return total([v * w for v, w, _ in every]) / sum(w for _, w, _ in every)
    shares = (options.get("accepted_weight", 1.0), options.get("rejected_weight", 1.0))
    means = [
        (total([v * w for v, w, _ in stream]) / sum(w for _, w, _ in stream), share)
        for stream, share in zip(streams, shares, strict=True)
        if sum(w for _, w, _ in stream) > 0
    ]
    return total([m * w for m, w in means]) / sum(w for _, w in means)


COMBINATIONS = [
    (name, options)
    for name in CASES
    for options in OPTIONS
    # Losses with hard labels do not ask the target.
    if name not in HARD or not any(o.startswith("target") for o in options)
]


@pytest.mark.parametrize("normalization", ["stream", "token"])
@pytest.mark.parametrize("name, options", COMBINATIONS, ids=str)
def test_value_and_gradient(name: str, options: dict[str, Any], normalization: str) -> None:
    blocks = make_blocks()
    loss = CASES[name][0](**options, normalization=normalization)
    assert_same(loss, blocks, slow(name, loss, blocks, options, normalization))


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
    loss = CASES[name][0]()
    expected = slow(name, loss, blocks, {}, loss.normalization)
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
    p, q = blocks.head.logits(blocks.target_states).softmax(-1), blocks.head.logits(blocks.draft_states).softmax(-1)
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
    assert_same(LK("hybrid", scale, decay), blocks, slow_hybrid(blocks, scale, decay))


@pytest.mark.parametrize("options", [{}, {"gamma": 0.7}, {"accept_until_fail": True}, {"target_temperature": 0.5}])
def test_e2e_tv(options: dict[str, Any]) -> None:
    blocks = make_blocks()
    p = (blocks.head.logits(blocks.target_states) / options.get("target_temperature", 1.0)).softmax(-1)
    q = blocks.head.logits(blocks.draft_states).softmax(-1)
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
    parts = ForwardKL(target_top_k=4)(blocks).parts
    outside = keep_top_k(blocks.head.logits(blocks.target_states[blocks.valid]), 4)[1]
    torch.testing.assert_close(parts["target_mass_outside_top_k"].double(), outside.mean().double(), rtol=1e-5, atol=0)
    errors = [abs(ForwardKL(target_top_k=k)(blocks).loss - ForwardKL()(blocks).loss) for k in (2, 8, 16)]
    assert errors[0] > errors[1] > errors[2] and errors[2] < 0.05
    assert "target_mass_outside_top_k" not in ForwardKL()(blocks).parts


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
    small = jensen_shannon(s, t, 1e-6) / 1e-6
    torch.testing.assert_close(small, torch.stack([kl(p[i], q[i]) for i in range(7)]), rtol=1e-4, atol=1e-5)
    assert (jensen_shannon(s, t, 0.5) < math.log(2)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_log_overlap_is_the_logarithm_of_the_overlap(dtype: torch.dtype) -> None:
    s, t = torch.randn(9, VOCAB).to(dtype).float(), torch.randn(9, VOCAB).to(dtype).float().log_softmax(-1)
    torch.testing.assert_close(log_overlap(s, t).exp(), overlap(s, t))


@pytest.mark.parametrize(
    "build",
    [
        lambda: JSD(beta=0.0),
        lambda: JSD(beta=1.0),
        lambda: LK("both"),  # type: ignore[arg-type]
        lambda: LK(kl_scale=1.5),
        lambda: LK(kl_decay=-1.0),
        lambda: E2ETotalVariation(gamma=0.0),
        lambda: SampledKL(floor=1.0),
        lambda: SampledKL(most=0.0),
        lambda: DPace(smoothing=1.5),
        lambda: TargetView(top_k=0),
        lambda: TargetView(temperature=1e-40),
        lambda: TargetView(temperature=math.inf),
        lambda: TotalVariation(normalization="slot"),  # type: ignore[arg-type]
        lambda: CrossEntropy(accepted_weight=0.0, rejected_weight=0.0),
        lambda: ForwardKL(scored_on="nothing"),  # type: ignore[arg-type]
        lambda: E2ETotalVariation(scored_on="nothing"),  # type: ignore[arg-type]
        lambda: Blend(ForwardKL(), ReverseKL(), end=1.5),
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
    torch.testing.assert_close(expected_length_share(sure, counted, 0.0), gradient * sure)
    loss = Reach(future=True).importance(None, -sure.log(), counted)  # type: ignore[arg-type]
    torch.testing.assert_close(loss, gradient)


def test_a_blend_goes_from_the_one_loss_to_the_other() -> None:
    blocks, first = make_blocks(), Blend(ForwardKL(), CrossEntropy())
    loss = Blend(first, ReverseKL(target_top_k=4), begin=0.2, end=0.8)
    values = [part(blocks).loss.item() for part in (ForwardKL(), CrossEntropy(), ReverseKL(target_top_k=4))]
    for progress in (0.0, 0.25, 0.9):
        loss.progress = progress
        out, share = loss(blocks), 0.2 + 0.6 * progress
        inner = (1 - progress) * values[0] + progress * values[1]
        assert out.loss.item() == pytest.approx((1 - share) * inner + share * values[2])
        assert [out.parts[name].item() for name in ("share", "first_share")] == pytest.approx([share, progress])
        assert "second_target_mass_outside_top_k" in out.parts


def test_a_blend_asks_the_target_for_all_that_its_losses_need() -> None:
    until_fail, proposals = ForwardKL(accept_until_fail=True), ForwardKL()
    recorded, none = ForwardKL(scored_on="recorded"), CrossEntropy()
    assert Blend(until_fail, none).target_states == "until_fail"
    assert Blend(until_fail, proposals).target_states == "proposals"
    assert Blend(none, recorded).target_states == "recorded" and Blend(none, none).target_states == "none"
    assert Blend(none, ForwardKL()).uses_proposals and not Blend(none, none).uses_proposals
    with pytest.raises(ValueError, match="same text"):
        Blend(recorded, proposals)
