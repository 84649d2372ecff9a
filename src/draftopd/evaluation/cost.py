"""What a draft step and a verification cost beside one plain step, and the speedup that follows.

A block of ``B`` yields ``tau(B)`` tokens for one draft step and one verification of ``B`` tokens. In units of a plain
step, ``speedup(B) = tau(B) / (draft(B) + verify(B))``. Smaller blocks' tau is read off the accepted lengths: a block
cut to ``B`` accepts ``min(n, B - 1)``.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from draftopd.drafters.base import Drafter
from draftopd.targets.target import Target

#: Steps timed of each kind; the median counts.
STEPS = 15


@dataclass(frozen=True)
class Costs:
    """Seconds of a plain step, and by block size of a draft step and of a verification."""

    plain: float
    draft: dict[int, float]
    verify: dict[int, float]


@dataclass(frozen=True)
class Prediction:
    """Expected figures of one block size; costs in units of a plain step."""

    block_size: int
    tau: float
    draft: float
    verify: float

    @property
    def speedup(self) -> float:
        return self.tau / (self.draft + self.verify)


def block_sizes(most: int) -> list[int]:
    """Block sizes worth a look, up to the drafter's own."""
    return sorted({size for size in (2, 3, 4, 6, 8, 12, 16, 24, 32) if size < most} | {most})


@torch.no_grad()
def measure(target: Target, drafter: Drafter, context: int, batch_size: int = 1) -> Costs:
    """Time the steps at a context of so many tokens.

    Every kind of step is timed once a round, so that a slow moment falls on all of them.
    """
    sizes = block_sizes(drafter.block_size)
    context = max(2, min(context, target.max_positions - drafter.block_size))
    ids = torch.arange(context, device=target.device).expand(batch_size, -1) % target.vocab_size
    anchors = torch.full((batch_size,), context - 1, device=target.device)
    every = torch.arange(context, device=target.device).expand(batch_size, -1)
    head, original = drafter.head(target), drafter.block_size
    target.tap(drafter.target_layer_ids)
    capacity = context + original
    cache = target.new_cache(capacity)
    reading = target.read(ids, cache)
    state = drafter.start(capacity)
    drafter.observe(target, state, reading.features, ids, every)

    def step(taps: tuple[int, ...], size: int) -> Callable[[], object]:
        tokens = ids[:, :1].expand(-1, size)
        positions = anchors[:, None] + torch.arange(size, device=target.device)

        def run() -> object:
            target.tap(taps)
            found = target.read(tokens, cache, positions, context - 1 + size)
            return target.head.logits(found.hidden).argmax(-1).tolist()

        return run

    def draft(size: int) -> Callable[[], object]:
        def run() -> object:
            drafter.block_size = size
            return drafter.draft(target, state, anchors, ids[:, -1], context - 1, head.best_tokens).tokens.tolist()

        return run

    kinds = {("plain", 1): step((), 1)}
    kinds |= {("verify", size): step(drafter.target_layer_ids, size) for size in sizes}
    kinds |= {("draft", size): draft(size) for size in sizes}
    seconds: dict[tuple[str, int], list[float]] = {kind: [] for kind in kinds}
    try:
        for round_ in range(STEPS + 1):
            for kind, run in kinds.items():
                began = time.perf_counter()
                run()
                if round_:  # the first warms up
                    seconds[kind].append(time.perf_counter() - began)
    finally:
        drafter.block_size = original
    median = {kind: statistics.median(values) for kind, values in seconds.items()}
    return Costs(
        median["plain", 1],
        {size: median["draft", size] for size in sizes},
        {size: median["verify", size] for size in sizes},
    )


def tau_of(accepted: Sequence[int], block_size: int) -> float:
    """Tau of blocks cut to this size, from accepted lengths of larger ones."""
    return 1 + sum(min(n, block_size - 1) for n in accepted) / len(accepted) if accepted else float("nan")


def predict(costs: Costs, accepted: Sequence[int]) -> list[Prediction]:
    """By block size, with the costs measured here."""
    return [
        Prediction(size, tau_of(accepted, size), costs.draft[size] / costs.plain, costs.verify[size] / costs.plain)
        for size in costs.draft
    ]


def predict_bandwidth(target: Target, drafter: Drafter, accepted: Sequence[int]) -> list[Prediction]:
    """By block size, where reading weights is all that a step costs: one sequence on a large GPU.

    A verification then costs a plain step. A draft step reads the drafter and the LM head, once a block or, where the
    drafter is autoregressive, once a proposal. Empty for a mixture of experts, whose verification reads more of them.
    """
    if any(getattr(target.config, name, None) for name in ("num_experts", "num_local_experts")):
        return []
    embedding = target.model.get_input_embeddings().weight
    head = drafter.head(target).weight
    # Of the embedding a step reads one row, unless it is the LM head too.
    read = (p for p in target.model.parameters() if p is not embedding or p is target.head.weight)
    whole = sum(p.numel() for p in read)
    own = sum(p.numel() for p in drafter.parameters() if p.requires_grad and p is not head)
    step = (own + head.numel()) / whole
    return [
        Prediction(size, tau_of(accepted, size), step * (size - 1 if drafter.autoregressive else 1), 1.0)
        for size in block_sizes(drafter.block_size)
    ]


def best(predictions: Sequence[Prediction]) -> Prediction:
    """The block size with the largest expected speedup."""
    return max(predictions, key=lambda p: p.speedup)
