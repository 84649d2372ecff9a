"""Costs of a draft step and a verification in units of a plain step, and the speedup expected from them.

A block of ``B`` tokens costs one draft step and one verification, and yields ``tau(B)`` tokens:
``speedup(B) = tau(B) / (draft(B) + verify(B))``. The tau of smaller blocks follows from the accepted lengths ``n``: a
block cut to ``B`` accepts ``min(n, B - 1)``.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from draftopd.drafters.base import Drafter
from draftopd.targets.target import Target

#: Timed repetitions of each kind of step; their median is used.
STEPS = 15


@dataclass(frozen=True)
class Costs:
    """Seconds of a plain step, and of a draft step and a verification by block size."""

    plain: float
    draft: dict[int, float]
    verify: dict[int, float]


@dataclass(frozen=True)
class Prediction:
    """Expected tau and costs (in units of a plain step) of one block size."""

    block_size: int
    tau: float
    draft: float
    verify: float

    @property
    def speedup(self) -> float:
        return self.tau / (self.draft + self.verify)


def block_sizes(largest: int) -> list[int]:
    """Block sizes to compare, up to the drafter's own."""
    return sorted({size for size in (2, 3, 4, 6, 8, 12, 16, 24, 32) if size < largest} | {largest})


@torch.no_grad()
def measure(target: Target, drafter: Drafter, context: int, batch_size: int = 1) -> Costs:
    """Time all kinds of step after ``context`` tokens.

    Each round times every kind once, so that a slow moment affects all of them.
    """
    head, original = drafter.head(target), drafter.block_size
    sizes = block_sizes(original)
    context = max(2, min(context, target.max_positions - original))
    recorded = torch.arange(context, device=target.device).expand(batch_size, -1)
    ids = recorded % target.vocab_size
    anchors = torch.full((batch_size,), context - 1, device=target.device)
    target.tap(drafter.target_layer_ids)
    cache, state = target.new_cache(context + original), drafter.start(context + original)
    drafter.observe(target, state, target.read(ids, cache).features, ids, recorded)

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
                if round_:  # the first round is a warm-up
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
    """Tau of blocks cut to this size, from the accepted lengths of larger ones; NaN if there are none."""
    return 1 + sum(min(n, block_size - 1) for n in accepted) / len(accepted) if accepted else float("nan")


def predict(costs: Costs, accepted: Sequence[int]) -> list[Prediction]:
    """Predictions by block size, from the costs measured here."""
    return [
        Prediction(size, tau_of(accepted, size), costs.draft[size] / costs.plain, costs.verify[size] / costs.plain)
        for size in costs.draft
    ]


def predict_bandwidth(target: Target, drafter: Drafter, accepted: Sequence[int]) -> list[Prediction]:
    """Predictions by block size if a step costs only the reading of weights: one sequence on a large GPU.

    A verification then costs one plain step. A draft step reads the drafter and the LM head once per block, or once
    per proposal if the drafter is autoregressive. Empty for a mixture of experts, whose verification reads more experts
    than a plain step.
    """
    if any(getattr(target.config, name, None) for name in ("num_experts", "num_local_experts")):
        return []
    embedding = target.model.get_input_embeddings().weight
    head = drafter.head(target).weight
    # A step reads one row of the embedding, unless the LM head is tied to it.
    read = (p for p in target.model.parameters() if p is not embedding or p is target.head.weight)
    whole = sum(p.numel() for p in read)
    own = sum(p.numel() for p in drafter.parameters() if p.requires_grad and p is not head)
    step = (own + head.numel()) / whole
    return [
        Prediction(size, tau_of(accepted, size), step * (size - 1 if drafter.autoregressive else 1), 1.0)
        for size in block_sizes(drafter.block_size)
    ]


def best(predictions: Sequence[Prediction]) -> Prediction:
    """The prediction with the largest expected speedup."""
    return max(predictions, key=lambda p: p.speedup)
