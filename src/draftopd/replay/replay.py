"""Replay in three stages: the target reads the recorded texts, the drafter drafts at the anchors, blocks are compared.

    reading = read(target, batch)
    drafts = draft(target, drafter, reading, batch, rules)
    blocks = drafts.blocks("proposals")

One forward of the target over the recorded tokens, one pass of the drafter over all anchors and, where a loss needs
it, one pass of the target over the drafter's own tokens (method: "Replay and the two streams").
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from draftopd.decoding.rules import Rules
from draftopd.decoding.sampling import Sampling
from draftopd.decoding.verify import accepted_prefix
from draftopd.drafters.base import Drafter
from draftopd.replay.batch import ReplayBatch
from draftopd.replay.blocks import Blocks, Scope
from draftopd.targets.cache import PositionCache
from draftopd.targets.head import LMHead
from draftopd.targets.target import Target


@dataclass(frozen=True)
class Reading:
    """The target's forward over the recorded tokens of a batch.

    Args:
        features: ``[rows, n, taps * hidden]``, outputs of the tapped layers: what the drafter reads.
        states: ``[rows, n, hidden]`` after the final norm, or None if they are not needed.
        cache: the target's keys and values of these tokens, for scoring blocks.
    """

    features: Tensor
    states: Tensor | None
    cache: PositionCache


def read(target: Target, batch: ReplayBatch, states: bool = True) -> Reading:
    """Stage 1: read the recorded tokens once.

    Args:
        target: tapped for the drafter.
        states: False stops at the last tapped layer; the only available scope is then ``none``.
    """
    cache = target.new_cache(batch.ids.shape[1])
    if not states:
        return Reading(target.read_features(batch.ids, batch.begins), None, cache)
    hidden, features = target.read(batch.ids, cache, begins=batch.begins)
    return Reading(features, hidden, cache)


def draft(
    target: Target,
    drafter: Drafter,
    reading: Reading,
    batch: ReplayBatch,
    rules: Rules,
    *,
    forced: bool = False,
    propose: bool = True,
    generator: torch.Generator | None = None,
) -> Drafts:
    """Stage 2: draft at the batch's anchors, with gradients on the drafter's side.

    Args:
        rules: the rules of the rollout. Above temperature 0 the proposals are drawn again.
        forced: an autoregressive drafter continues from the recorded tokens instead of its own, as in SFT.
        propose: False skips the LM head's pass that chooses proposals, for losses without proposals. The recorded
            tokens then replace them, and none of them counts as accepted.
        generator: for the draws above temperature 0.
    """
    ids, begins = batch.ids, batch.begins
    slots = torch.arange(1, drafter.block_size, device=ids.device)
    positions = batch.anchors[..., None] + slots
    ends = _ends(batch, begins)[..., None]
    recorded = positions < ends
    labels = ids[:, None].expand(-1, positions.shape[1], -1).gather(2, torch.minimum(positions, ends - 1))
    head = drafter.head(target)
    forced = forced and drafter.autoregressive
    proposed: list[Tensor] = []

    def choose(hidden: Tensor) -> Tensor:
        begin = sum(part.shape[-1] for part in proposed)
        part = slice(begin, begin + hidden.shape[-2])
        tokens = _choose(hidden, head, rules.draft_sampling, generator) if propose else labels[..., part]
        proposed.append(tokens)
        return torch.where(recorded[..., part], labels[..., part], tokens) if forced else tokens

    drafted = drafter.replay(target, reading.features, ids, batch.anchors, choose, begins)
    kept = batch.anchor_mask
    rows = torch.arange(len(ids), device=ids.device)[:, None].expand_as(kept)[kept]
    return Drafts(
        target, head, reading, batch, rules, generator, propose,
        followed=drafted.tokens, hidden=drafted.hidden[kept], proposals=torch.cat(proposed, -1)[kept],
        labels=labels[kept], recorded=recorded[kept], rows=rows, before=torch.minimum(positions, ends)[kept] - 1,
    )  # fmt: skip


@dataclass(frozen=True)
class Drafts:
    """Drafted blocks, flattened over batch and anchors to ``N`` blocks of ``K`` slots.

    Args:
        followed: ``[rows, A, K]`` the tokens that the drafter continued from.
        hidden: ``[N, K, hidden]`` the drafter's states, carrying gradients.
        proposals, labels: ``[N, K]`` the drafter's and the recorded tokens.
        recorded: ``[N, K]`` True at slots with a recorded token.
        rows, before: ``[N]`` the row of each block, and ``[N, K]`` the index in the row before each slot.
    """

    target: Target
    head: LMHead
    reading: Reading
    batch: ReplayBatch
    rules: Rules
    generator: torch.Generator | None
    proposed: bool
    followed: Tensor
    hidden: Tensor
    proposals: Tensor
    labels: Tensor
    recorded: Tensor
    rows: Tensor
    before: Tensor

    def blocks(self, scope: Scope) -> Blocks:
        """Stage 3: the blocks for a loss of this scope.

        Slots are valid up to the first proposed stop token, if the drafter's vocabulary has the token that the target
        would take. In scope ``proposals`` the target decides acceptance; in the other scopes a proposal is accepted
        while it equals the recorded token. Above temperature 0 proposals differ from the recorded text, so
        ``until_fail`` is then the same as ``proposals``.
        """
        if scope == "until_fail" and not self.rules.sampling.greedy:
            scope = "proposals"
        if scope == "proposals":
            states, accepted, covered = self._scored
            return self._blocks(states, accepted, self.valid & covered)
        accepted = accepted_prefix((self.proposals == self.labels) & self.recorded)
        if not self.proposed:
            accepted = torch.zeros_like(accepted)
        if scope == "none":
            return self._blocks(None, accepted, self.valid)
        assert self.reading.states is not None
        states = self.reading.states[self.rows[:, None], self.before]
        known = self.recorded & self.head.covers(self.labels)
        if scope == "recorded":
            # The recorded text ends at its own stop token, not at a proposed one.
            return self._blocks(states, accepted, known)
        # After the first rejection these states follow the recorded tokens, not the drafter's.
        slots = torch.arange(self.proposals.shape[1], device=self.proposals.device)
        return self._blocks(states, accepted, self.valid & known & (slots <= accepted[:, None]))

    def scored(self) -> Blocks:
        """The blocks scored by the target in every slot up to a proposed stop token, for measuring their agreement."""
        states, accepted, _ = self._scored
        return self._blocks(states, accepted, self.valid)

    @cached_property
    def valid(self) -> Tensor:
        """``[N, K]`` True up to and including the first proposed stop token."""
        ends = torch.tensor(sorted(self.rules.stop), dtype=self.proposals.dtype, device=self.proposals.device)
        stops = torch.isin(self.proposals, ends).long()
        return stops.cumsum(-1) - stops == 0

    @cached_property
    def _scored(self) -> tuple[Tensor, Tensor, Tensor]:
        """The target's states ``[N, K, hidden]`` along the followed tokens, the accepted lengths ``[N]``, and the slots
        ``[N, K]`` for whose target token the drafter's vocabulary has a row."""
        batch, target = self.batch, self.target
        tokens = torch.cat([batch.ids.gather(1, batch.anchors)[..., None], self.followed[..., :-1]], dim=-1)
        states = target.score_blocks(self.reading.cache, batch.ids.shape[1], batch.anchors, tokens, batch.begins)
        states = states[batch.anchor_mask]
        if self.rules.rejection:
            return states, self._tested(states), torch.ones_like(self.recorded)
        chosen = _choose(states, target.head, self.rules.sampling, self.generator)
        return states, accepted_prefix(self.proposals == chosen), self.head.covers(chosen)

    @torch.no_grad()
    def _tested(self, states: Tensor) -> Tensor:
        """Accepted lengths ``[N]`` under rejection sampling."""
        target_head, sampling, accepts = self.target.head, self.rules.sampling, []
        sides = target_head.chunks(self.hidden.detach(), states, self.proposals, per_row=self.proposals.shape[1])
        for drafted, scored, tokens in sides:
            q = sampling.probabilities(self.head.target_logits(drafted)).gather(-1, tokens[..., None])[..., 0]
            p = sampling.probabilities(target_head.logits(scored)).gather(-1, tokens[..., None])[..., 0]
            accepts.append(torch.rand(q.shape, generator=self.generator, device=q.device) * q < p)
        return accepted_prefix(torch.cat(accepts)) if accepts else self.proposals.new_zeros(0)

    def _blocks(self, states: Tensor | None, accepted: Tensor, valid: Tensor) -> Blocks:
        return Blocks(
            self.hidden, states, self.head, self.proposals, self.labels, accepted, valid, self.recorded,
            self.target.head,
        )  # fmt: skip


def _ends(batch: ReplayBatch, begins: Tensor | None) -> Tensor:
    """The ends of the anchors' sequences: ``[rows, A]`` indices in the row, or ``[rows, 1]`` without packing."""
    if batch.layout is None or begins is None:
        return batch.lengths[:, None]
    return batch.layout.ends(batch.ids, batch.lengths).gather(1, begins.gather(1, batch.anchors))


@torch.no_grad()
def _choose(hidden: Tensor, head: LMHead, sampling: Sampling, generator: torch.Generator | None) -> Tensor:
    if sampling.greedy:
        return head.best_tokens(hidden)
    flat = hidden.detach().flatten(0, -2)
    parts = [sampling.choose(head.target_logits(part), generator) for (part,) in head.chunks(flat)]
    return torch.cat(parts).view(hidden.shape[:-1])
