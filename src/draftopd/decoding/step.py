"""One step of decoding: draft a block a row, let the target read it, verify. Tensors in, tensors out.

Nothing here waits for the device, and every step of a batch has the same shapes, so that it can be compiled.
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

    Without a drafter the block is the anchor alone, and the step is plain decoding.

    Args:
        cache, state: the target's and the drafter's memory of the text; both take in the block.
        visible: cached positions that any row may look at, all anchors being at most that.
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
    """The block ``[batch, B]``, and the proposals' distributions where verification needs them."""
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
    """:func:`decoding_step` through torch.compile, shared by all decoders of a process.

    On a GPU as CUDA graphs, one for each shape, if the step writes to memory that stays (:meth:`PositionStore.stay`)
    and else without them; elsewhere with symbolic sizes, so that growing texts and shrinking batches compile nothing
    new.
    """
    if not cuda:
        return torch.compile(decoding_step, dynamic=True)
    replayed = torch.compile(decoding_step, dynamic=False, mode="reduce-overhead")

    def step(*arguments: Any) -> StepOutput:
        # Each replay writes its results where the last one did, and a step's tokens go into the next one.
        torch.compiler.cudagraph_mark_step_begin()
        return StepOutput(*(result.clone() for result in replayed(*arguments)))

    return step
