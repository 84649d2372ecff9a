"""One step of decoding: draft one block per row, read it with the target, verify it.

A step does not wait for the device, and all steps of a batch have the same shapes, so that a step can be compiled.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from draftopd.decoding.rules import Rules
from draftopd.decoding.verify import Verdict, verify_matching, verify_rejection
from draftopd.drafters.base import Drafter
from draftopd.targets.cache import PositionCache
from draftopd.targets.target import Target


class StepOutput(NamedTuple):
    """``block [batch, B]``: the anchor's token and the proposals; ``accepted, token [batch]``: see :class:`Verdict`."""

    block: Tensor
    accepted: Tensor
    token: Tensor


def decoding_step(
    target: Target,
    drafter: Drafter | None,
    rules: Rules,
    cache: PositionCache,
    state: Any,
    anchors: Tensor,
    tokens: Tensor,
    visible: int,
    generator: torch.Generator | None,
) -> StepOutput:
    """Draft at ``anchors [batch]``, whose tokens are ``tokens [batch]``, and verify.

    Without a drafter a block consists of the anchor only, and the step is plain decoding.

    Args:
        cache, state: the target's and the drafter's caches of the text; the block is written to both.
        visible: number of cached positions that rows may see; no anchor lies beyond it.
    """
    block, probs = _draft(target, drafter, rules, state, anchors, tokens, visible, generator)
    positions = anchors[:, None] + torch.arange(block.shape[1], device=block.device)
    reading = target.read(block, cache, positions, visible + block.shape[1])
    if drafter is not None:
        drafter.observe(target, state, reading.features, block, positions)
    logits = target.head.logits(reading.hidden)
    verdict: Verdict
    if probs is not None:
        verdict = verify_rejection(block[:, 1:], probs, rules.sampling.probabilities(logits), generator)
    else:
        verdict = verify_matching(block[:, 1:], rules.sampling.choose(logits, generator))
    return StepOutput(block, verdict.accepted, verdict.token)


def _draft(
    target: Target,
    drafter: Drafter | None,
    rules: Rules,
    state: Any,
    anchors: Tensor,
    tokens: Tensor,
    visible: int,
    generator: torch.Generator | None,
) -> tuple[Tensor, Tensor | None]:
    """The block ``[batch, B]``, and under rejection sampling the distributions of its proposals."""
    if drafter is None:
        return tokens[:, None], None
    head, distributions = drafter.head(target), []

    def choose(hidden: Tensor) -> Tensor:
        logits = head.target_logits(hidden)
        if rules.rejection:
            distributions.append(rules.draft_sampling.probabilities(logits)[:, 0])
        return rules.draft_sampling.choose(logits, generator)

    draft = drafter.draft(target, state, anchors, tokens, visible, choose)
    probs = torch.cat(distributions, dim=-2) if distributions else None
    return torch.cat([tokens[:, None], draft.tokens[:, 0]], dim=1), probs


@cache
def compiled_step(cuda: bool) -> Any:
    """:func:`decoding_step` compiled by torch.compile, once per process.

    On a GPU it runs as CUDA graphs, one per shape, if the caches keep their memory (:meth:`PositionStore.stay`).
    Elsewhere sizes are symbolic, so that growing texts and shrinking batches do not compile it again.
    """
    if not cuda:
        return torch.compile(decoding_step, dynamic=True)
    replayed = torch.compile(decoding_step, dynamic=False, mode="reduce-overhead")

    def step(*arguments: Any) -> StepOutput:
        # Every replay overwrites the results of the last one, but a step's tokens are the input of the next step.
        torch.compiler.cudagraph_mark_step_begin()
        return StepOutput(*(result.clone() for result in replayed(*arguments)))

    return step
