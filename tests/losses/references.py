"""Every loss on streams written out in float64, slot by slot and token by token: obvious, and slow."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from tests.support.blocks import VOCAB, K, N
from torch import Tensor

from draftopd.losses.base import StreamLoss
from draftopd.losses.cross_entropy import CrossEntropy, DPace, Reach
from draftopd.losses.distilled import Distilled
from draftopd.losses.divergence import (
    forward_kl,
    jensen_shannon,
    neg_log_acceptance,
    reverse_kl,
    total_variation,
)
from draftopd.losses.sampled_kl import SampledKL
from draftopd.replay.blocks import Blocks

Options = dict[str, Any]


class Slot(NamedTuple):
    """Slot ``k`` of a block that accepted ``n``: distributions over the drafter's vocabulary, tokens as its rows.

    ``whole`` is the target's distribution there as it is, ``p`` the same renormalised; ``q`` is the drafter's.
    ``label`` is -1 where the vocabulary lacks the recorded token, ``known`` says that there is one and it has a row.
    """

    block: int
    k: int
    n: int
    p: Tensor
    whole: Tensor
    q: Tensor
    proposal: int
    label: int
    valid: bool
    known: bool

    @property
    def confidence(self) -> float:
        return float(self.q[self.label].detach())


def total(terms: list[Tensor]) -> Tensor:
    return torch.stack(terms).sum()


def kl(p: Tensor, q: Tensor) -> Tensor:
    return total([p[v] * (p[v] / q[v]).log() for v in range(len(p))])


def jsd(p: Tensor, q: Tensor, beta: float) -> Tensor:
    m = beta * p + (1 - beta) * q
    return beta * kl(p, m) + (1 - beta) * kl(q, m)


def alpha(p: Tensor, q: Tensor) -> Tensor:
    return total([torch.minimum(p[v], q[v]) for v in range(len(p))])


def floored(p: Tensor, token: int) -> Tensor:
    return p[token].log() if p[token].log() > -6 else torch.full((), -6.0, dtype=p.dtype)


def capped(value: Tensor) -> Tensor:
    return value if value < 5 else value * 0 + 5


def two_outcomes(slot: Slot) -> Tensor:
    """KL between "the emitted token" and "another one"."""
    token = slot.proposal if slot.k <= slot.n else slot.label
    a, b = floored(slot.whole, token), floored(slot.q, token)
    return capped(a.exp() * (a - b) + (1 - a.exp()) * ((1 - a.exp()) / (1 - b.exp())).log())


def estimate(slot: Slot) -> Tensor:
    r = floored(slot.whole, slot.proposal) - floored(slot.q, slot.proposal)
    return capped(r.exp() - r - 1)


def power(slot: Slot, stream: str, options: Options) -> float:
    gamma: float = options.get("gamma", 1.0)
    if stream == "accepted":
        gamma = options.get("accepted_gamma", gamma)
    return gamma ** (slot.k - 1)


def power_on_rejected(slot: Slot, stream: str, options: Options) -> float:
    return power(slot, stream, {"gamma": 0.8, "accepted_gamma": 1.0, **options})


def exponential_of_dflash(slot: Slot, stream: str, options: Options) -> float:
    return math.exp(-(slot.k - 1) / options.get("gamma", 1 + 0.375 * (K + 1)))


def exponential(slot: Slot, stream: str, options: Options) -> float:
    return math.exp(-(slot.k - 1) / options["gamma"]) if "gamma" in options else 1.0


def nothing_more(slot: Slot, counted: Sequence[Slot]) -> float:
    return 1.0


def length_share(slot: Slot, counted: Sequence[Slot]) -> float:
    """D-PACE: the summed probabilities of reaching the end of this slot and of each later one."""
    return sum(
        math.prod(0.5 * c.confidence + 0.5 for c in counted if c.k <= end.k) for end in counted if end.k >= slot.k
    )


def reached(slot: Slot, counted: Sequence[Slot]) -> float:
    return math.prod(c.confidence for c in counted if c.k < slot.k)


def is_valid(slot: Slot, stream: str) -> bool:
    return slot.valid


def is_known(slot: Slot, stream: str) -> bool:
    return slot.known


def has_a_token(slot: Slot, stream: str) -> bool:
    """Of an accepted proposal the single-token estimate needs no label."""
    return slot.valid and (slot.known or slot.k <= slot.n or stream == "rejected")


class Case(NamedTuple):
    """A loss, its value on either stream, what a slot weighs, and which slots count.

    ``factor`` is a further weight, from the slot and all slots of its block that count; ``hard``: with the recorded
    tokens alone, so that it has no options of the target's distribution.
    """

    build: Callable[..., StreamLoss]
    accepted: Callable[[Slot], Tensor]
    rejected: Callable[[Slot], Tensor]
    weight: Callable[[Slot, str, Options], float] = power
    counts: Callable[[Slot, str], bool] = is_valid
    factor: Callable[[Slot, Sequence[Slot]], float] = nothing_more
    hard: bool = False


def asymmetric(**options: Any) -> StreamLoss:
    return Distilled(**{"accepted": forward_kl, "rejected": reverse_kl, "gamma": 0.8, "accepted_gamma": 1.0, **options})


def one(divergence: Callable[..., Tensor], value: Callable[[Slot], Tensor]) -> Case:
    return Case(partial(Distilled, accepted=divergence), value, value)


def hard(build: Callable[..., StreamLoss], **rest: Any) -> Case:
    def value(slot: Slot) -> Tensor:
        return -slot.q[slot.label].log()

    return Case(build, value, value, counts=is_known, hard=True, **rest)


CASES: dict[str, Case] = {
    "asymmetric_kl": Case(asymmetric, lambda s: kl(s.p, s.q), lambda s: kl(s.q, s.p), power_on_rejected),
    "forward_kl": one(forward_kl, lambda s: kl(s.p, s.q)),
    "reverse_kl": one(reverse_kl, lambda s: kl(s.q, s.p)),
    "jsd": one(partial(jensen_shannon, beta=0.3), lambda s: jsd(s.p, s.q, 0.3)),
    "total_variation": one(total_variation, lambda s: 1 - alpha(s.whole, s.q)),
    "lk_log": one(neg_log_acceptance, lambda s: -alpha(s.whole, s.q).log()),
    "sampled_kl": Case(
        partial(SampledKL, floor=-6.0, most=5.0), two_outcomes, estimate, power_on_rejected, has_a_token
    ),
    "cross_entropy": hard(CrossEntropy, weight=exponential_of_dflash),
    "d_pace": hard(DPace, weight=exponential, factor=length_share),
    "reach": hard(Reach, weight=exponential, factor=reached),
}


def target_distribution(logits: Tensor, options: Options) -> Tensor:
    p = (logits / options.get("target_temperature", 1.0)).softmax(-1)
    top_k = options.get("target_top_k")
    if top_k is None:
        return p
    best = p.argsort(descending=True)[:top_k].tolist()
    rest = (1 - p[best].sum()) / (VOCAB - top_k)
    return torch.stack([p[v] if v in best else rest for v in range(VOCAB)])


def slots(blocks: Blocks, options: Options) -> list[Slot]:
    drafted = blocks.head.logits(blocks.draft_states).softmax(-1)
    assert blocks.target_states is not None
    targets = blocks.target_logits(blocks.target_states)
    vocabulary = blocks.head.vocabulary
    row_of = {v: r for r, v in enumerate(vocabulary.ids.tolist() if vocabulary else range(VOCAB))}
    found = []
    for i in range(N):
        for j in range(K):
            whole = target_distribution(targets[i, j], options)[list(row_of)]
            proposal, label = (row_of.get(int(t[i, j]), -1) for t in (blocks.proposals, blocks.labels))
            known = bool(blocks.recorded[i, j]) and label >= 0
            found.append(
                Slot(
                    i, j + 1, int(blocks.accepted[i]), whole / whole.sum(), whole, drafted[i, j], proposal, label,
                    bool(blocks.valid[i, j]), known,
                )
            )  # fmt: skip
    return found


def slow(case: Case, blocks: Blocks, options: Options, normalization: str) -> Tensor:
    """The loss written out; slots that stand in both streams count twice."""
    shares = {stream: options.get(f"{stream}_weight", 1.0) for stream in ("accepted", "rejected")}
    members: dict[str, list[Slot]] = {"accepted": [], "rejected": []}
    for slot in slots(blocks, options):
        if slot.k <= slot.n + int(options.get("include_correction", False)):
            members["accepted"].append(slot)
        if slot.n < slot.k <= (slot.n + 1 if options.get("accept_until_fail") else K):
            members["rejected"].append(slot)
    streams = {s: [slot for slot in members[s] if shares[s] > 0 and case.counts(slot, s)] for s in members}
    counted: dict[int, dict[int, Slot]] = {i: {} for i in range(N)}
    for slot in streams["accepted"] + streams["rejected"]:
        counted[slot.block][slot.k] = slot
    sums = {}
    for stream, value in (("accepted", case.accepted), ("rejected", case.rejected)):
        weights = [
            case.weight(slot, stream, options) * case.factor(slot, list(counted[slot.block].values()))
            for slot in streams[stream]
        ]
        if weights:
            terms = [weight * value(slot) for weight, slot in zip(weights, streams[stream], strict=True)]
            sums[stream] = (total(terms), sum(weights))
    if normalization == "token":
        return total([shares[s] * terms for s, (terms, _) in sums.items()]) / sum(
            shares[s] * weights for s, (_, weights) in sums.items()
        )
    return total([shares[s] * terms / weights for s, (terms, weights) in sums.items()]) / sum(shares[s] for s in sums)
