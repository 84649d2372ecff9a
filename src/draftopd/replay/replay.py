"""Replay: draft again at recorded anchors, and let the target score the drafter's own tokens.

One target forward over the recorded tokens, one drafter pass over all anchors, one target pass over
all blocks; then the accepted lengths follow (method: "Replay and the two streams").
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from draftopd.decoding.sampling import Sampling
from draftopd.decoding.verify import Verification, accepted_prefix
from draftopd.drafters.base import Drafter
from draftopd.replay.batch import ReplayBatch
from draftopd.replay.blocks import Blocks, Scope
from draftopd.targets.head import LMHead, best_tokens
from draftopd.targets.target import Target
from draftopd.training.stopwatch import Stopwatch

#: Chooses anchors once the target's features ``[rows, n, taps * hidden]`` and states ``[rows, n, hidden]`` (None
#: where they were not computed) are known.
Reanchor = Callable[[ReplayBatch, Tensor, "Tensor | None"], ReplayBatch]


def replay(
    target: Target,
    drafter: Drafter,
    batch: ReplayBatch,
    sampling: Sampling,
    stop: frozenset[int],
    teacher: Scope = "proposals",
    generator: torch.Generator | None = None,
    clock: Stopwatch | None = None,
    reanchor: Reanchor | None = None,
    with_states: bool = False,
    verification: Verification = "rejection_sampling",
    measure: Callable[[Blocks], None] | None = None,
    propose: bool = True,
) -> Blocks:
    """The batch's blocks, with gradients on the drafter's side.

    Args:
        sampling: how proposals are chosen and accepted, as in the rollout.
        stop: token ids that end a text; slots after a proposed one do not count.
        teacher: which of the target's states to give. ``proposals``: the target scores the drafter's own
            tokens. ``until_fail``: its states on the recorded tokens, which up to the first rejection are the
            same at temperature 0, so nothing is scored again; slots without a recorded token do not count.
            ``recorded``: its states on the recorded tokens in every slot that has one. ``none``: no states. But for
            the first, a proposal counts as accepted while it equals the recorded token. In the last two an
            autoregressive drafter goes on from the recorded tokens instead of its own, as in SFT. Above temperature
            0 proposals are drawn anew and ``until_fail`` becomes ``proposals``.
        clock: told how long target and drafter took.
        reanchor: chooses the anchors now, from the target's features; default the batch's own.
        with_states: give it the target's states even where the loss needs none.
        verification: acceptance rule above temperature 0; ``target_only`` proposes the drafter's best tokens.
        measure: told the same blocks with every slot scored by the target, whatever the loss needs; valid there are
            also slots whose token the drafter's vocabulary lacks.
        propose: False spares the LM head's pass that finds the proposals, where they matter to nothing: with
            ``teacher="none"`` and without ``measure``. The recorded tokens then stand for them, none of them accepted.
    """
    clock = clock or Stopwatch()
    if teacher == "until_fail" and not sampling.greedy:
        teacher = "proposals"
    cache, begins = target.new_cache(batch.ids.shape[1]), batch.begins
    with clock("target"):
        if teacher == "none" and not with_states and measure is None:
            states, features = None, target.read_features(batch.ids, begins)
        else:
            states, features = target.read(batch.ids, cache, begins=begins)
    if reanchor is not None:
        with clock("walk"):
            batch = reanchor(batch, features, states)
    width = batch.ids.shape[1]
    slots = torch.arange(1, drafter.block_size, device=batch.ids.device)
    places = batch.anchors[..., None] + slots
    ends = _ends(batch, begins)[..., None]
    recorded = places < ends
    labels = batch.ids[:, None].expand(-1, places.shape[1], -1).gather(2, torch.minimum(places, ends - 1))
    head = drafter.head(target)
    forced = drafter.autoregressive and teacher in ("recorded", "none")
    draft_sampling = sampling if verification == "rejection_sampling" else Sampling()
    propose = propose or teacher != "none" or measure is not None
    own: list[Tensor] = []

    def choose(hidden: Tensor) -> Tensor:
        begin = sum(part.shape[-1] for part in own)
        part = slice(begin, begin + hidden.shape[-2])
        tokens = _choose(hidden, head, draft_sampling, generator) if propose else labels[..., part]
        own.append(tokens)
        return torch.where(recorded[..., part], labels[..., part], tokens) if forced else tokens

    with clock("drafter"):
        draft = drafter.replay(target, features, batch.ids, batch.anchors, choose, begins)
    kept = batch.anchor_mask
    student, proposals = draft.hidden[kept], torch.cat(own, -1)[kept]
    labels, recorded = labels[kept], recorded[kept]
    valid = _until_stop(proposals, stop)

    def scored() -> Blocks:
        """The blocks with the target's states along the tokens that the drafter went on from."""
        with clock("target"):
            tokens = torch.cat([batch.ids.gather(1, batch.anchors)[..., None], draft.tokens[..., :-1]], dim=-1)
            target_states = target.score_blocks(cache, width, batch.anchors, tokens, begins)[kept]
            possible = valid
            if verification == "rejection_sampling" and not sampling.greedy:
                accepted = _accepted(student.detach(), target_states, proposals, head, target.head, sampling, generator)
            else:
                chosen = _choose(target_states, target.head, sampling, generator)
                accepted = accepted_prefix(proposals == chosen)
                possible = valid & head.covers(chosen)
        return Blocks(student, target_states, head, proposals, labels, accepted, possible, recorded, target.head)

    if teacher == "proposals":
        blocks = scored()
        if measure is not None:
            measure(replace(blocks, valid=valid))
        return blocks
    accepted = accepted_prefix((proposals == labels) & recorded & propose)
    if teacher == "none" or states is None:
        blocks = Blocks(student, None, head, proposals, labels, accepted, valid, recorded, target.head)
    else:
        before = torch.minimum(places, ends)[kept] - 1
        rows = torch.arange(len(batch.ids), device=batch.ids.device)[:, None].expand_as(kept)[kept]
        if teacher == "recorded":
            # The text has the recorded stop token, if any; what the drafter proposed there does not end it.
            usable = recorded & head.covers(labels)
        else:
            # Beyond the first rejection these states follow other tokens than the drafter's: out of bounds.
            usable = valid & recorded & head.covers(labels) & (slots - 1 <= accepted[:, None])
        blocks = Blocks(
            student, states[rows[:, None], before], head, proposals, labels, accepted, usable, recorded, target.head
        )
    if measure is not None:
        measure(replace(scored(), valid=valid))
    return blocks


def _ends(batch: ReplayBatch, begins: Tensor | None) -> Tensor:
    """``[rows, A]``, or ``[rows, 1]`` where a row holds one sequence: where the anchors' sequences have ended."""
    if batch.layout is None or begins is None:
        return batch.lengths[:, None]
    return batch.layout.ends(batch.ids, batch.lengths).gather(1, begins.gather(1, batch.anchors))


def _choose(hidden: Tensor, head: LMHead, sampling: Sampling, generator: torch.Generator | None) -> Tensor:
    if sampling.greedy:
        return best_tokens(hidden, head)
    flat = hidden.detach().flatten(0, -2)
    with torch.no_grad():
        parts = [sampling.choose(head.target_logits(part), generator) for (part,) in head.chunks(flat)]
    return torch.cat(parts).view(hidden.shape[:-1])


@torch.no_grad()
def _accepted(
    student: Tensor,
    teacher: Tensor,
    proposals: Tensor,
    head: LMHead,
    target_head: LMHead,
    sampling: Sampling,
    generator: torch.Generator | None,
) -> Tensor:
    """Accepted lengths ``[N]`` of blocks ``[N, K]`` under rejection sampling."""
    accepts = []
    for s, t, d in target_head.chunks(student, teacher, proposals, per_row=proposals.shape[1]):
        q = sampling.probabilities(head.target_logits(s)).gather(-1, d[..., None])[..., 0]
        p = sampling.probabilities(target_head.logits(t)).gather(-1, d[..., None])[..., 0]
        accepts.append(torch.rand(q.shape, generator=generator, device=q.device) * q < p)
    return accepted_prefix(torch.cat(accepts)) if accepts else proposals.new_zeros(0)


def _until_stop(proposals: Tensor, stop: frozenset[int]) -> Tensor:
    """``[N, K]`` True up to and including the first proposed stop token."""
    stops = torch.isin(proposals, torch.tensor(sorted(stop), dtype=proposals.dtype, device=proposals.device))
    return stops.long().cumsum(-1) - stops.long() == 0
