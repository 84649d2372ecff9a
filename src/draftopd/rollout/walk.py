"""Anchors without decoding: the blocks that the current drafter would have drafted on a given text.

Speculative decoding is lossless, so the text does not depend on the drafter. On a trajectory that the target
has produced, the anchors, proposals and accepted lengths of any drafter follow without a target step: draft
at the anchor, see how far the text agrees, move on by the accepted length and one.

- Temperature 0, and target-only verification: a proposal is accepted while it equals the text's token.
- Rejection sampling: the proposals come from the reverse coupling (:mod:`draftopd.decoding.coupling`).

Two ways lead along the chain. Walking drafts the next anchor of every text, round by round. Drafting at every
position at once needs no rounds, but drafts the positions in between too. A round costs little more for many
texts than for one, so many texts are walked, and the last few are finished at every position at once
(`--parallel-below` of `benchmarks/speed/rollout.py` measures both).
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from draftopd.decoding.coupling import couple
from draftopd.decoding.rules import Rules
from draftopd.decoding.sampling import Sampling
from draftopd.decoding.verify import accepted_prefix
from draftopd.drafters.base import Chooser, Drafter
from draftopd.targets.head import LMHead
from draftopd.targets.target import Target

#: Tokens the target reads at once: enough to fill its matrices, few enough to stay in fast memory.
READ_TOKENS = 4096


class Visited(NamedTuple):
    """One text's blocks in order, as :class:`~draftopd.decoding.generate.Decoded` keeps them."""

    anchors: list[int]
    accepted: list[int]
    emitted: list[int]
    proposals: list[list[int]]


class Texts(NamedTuple):
    """Recorded texts and what the target made of them.

    ``ids [batch, n]`` padded on the right, ``starts [batch]`` the first response positions, ``lengths [batch]``.
    ``features [batch, n, taps * hidden]`` feed the drafter; ``states [batch, n, hidden]``, after the final norm,
    are needed for the reverse coupling only.
    """

    ids: Tensor
    starts: Tensor
    lengths: Tensor
    features: Tensor
    states: Tensor | None


class Walker:
    """Walks the chain of anchors along recorded texts.

    Args:
        rules: those under which the texts were drawn and would be decoded.
        parallel_below: with at most so many texts left, their remaining positions are drafted all at once.
            0 always walks.
        blocks_at_once: most blocks drafted in one pass, which bounds memory.

    Raises:
        ValueError: if a number lies outside its range.
    """

    def __init__(
        self,
        rules: Rules,
        parallel_below: int = 8,
        blocks_at_once: int = 4096,
    ) -> None:
        if parallel_below < 0 or blocks_at_once < 1:
            raise ValueError(
                "parallel_below must be 0 or more and blocks_at_once 1 or more, "
                f"found {parallel_below} and {blocks_at_once}."
            )
        self.sampling = rules.sampling
        #: Whether proposals are recovered by the reverse coupling, for which the target's states are needed.
        self.coupled = rules.rejection
        self.parallel_below, self.blocks_at_once = parallel_below, blocks_at_once

    def read(self, target: Target, ids: Tensor, starts: Tensor, lengths: Tensor) -> Texts:
        """The target's forward over texts ``ids [batch, n]``, a few at a time and only as deep as needed."""
        features, states = [], []
        for part in ids.split(max(1, READ_TOKENS // ids.shape[1])):
            if self.coupled:
                reading = target.read(part, target.new_cache(part.shape[1]))
                features.append(reading.features)
                states.append(reading.hidden)
            else:
                features.append(target.read_features(part))
        return Texts(ids, starts, lengths, torch.cat(features), torch.cat(states) if states else None)

    @torch.no_grad()
    def walk(self, target: Target, drafter: Drafter, texts: Texts, seeds: Sequence[int]) -> list[Visited]:
        """The drafter's blocks on each text; a text of a single response token has none.

        Args:
            target: tapped for the drafter.
            texts: as :meth:`read` gives them.
            seeds: one a text, of the reverse coupling's draws. The draws belong to text and position, so the
                result depends neither on the batch nor on the way.
        """
        visits = _Visits(texts.lengths.tolist())
        uniforms = _uniforms(texts, drafter.num_proposals, seeds) if self.coupled else None
        rows, anchors = _unfinished(torch.arange(len(texts.ids), device=texts.ids.device), texts.starts, texts.lengths)
        if len(rows) > self.parallel_below:
            width = texts.ids.shape[1]
            state = drafter.start(width)
            every = torch.arange(width, device=texts.ids.device).expand_as(texts.ids)
            drafter.observe(target, state, texts.features, texts.ids, every)
            if len(rows) < len(texts.ids):
                drafter.select(state, rows)
            while len(rows) > self.parallel_below:
                block = _Block(texts, rows, anchors[:, None], drafter.num_proposals)
                choose = self._chooser(target, drafter, texts, block, uniforms)
                visible = int(anchors.max())
                tokens = drafter.draft(target, state, anchors, block.tokens[:, 0], visible, choose).tokens
                accepted = block.agreement(tokens)
                visits.add(rows, anchors, tokens[:, 0], accepted[:, 0])
                # The fastest and the slowest text of a batch part ways; rows that are done are let go.
                before = len(rows)
                anchors = anchors + accepted[:, 0] + 1
                keep = (anchors < texts.lengths[rows] - 1).nonzero()[:, 0]
                if len(keep) == before:
                    continue
                rows, anchors = rows[keep], anchors[keep]
                if len(rows) > self.parallel_below:
                    drafter.select(state, keep)
        if len(rows):
            self._everywhere(target, drafter, texts, rows, anchors, uniforms, visits)
        return visits.visited

    def _everywhere(
        self,
        target: Target,
        drafter: Drafter,
        texts: Texts,
        rows: Tensor,
        anchors: Tensor,
        uniforms: Tensor | None,
        visits: _Visits,
    ) -> None:
        """Draft at every remaining position of these rows, then follow the chain through what came out."""
        last = texts.lengths[rows] - 2
        count = int((last - anchors).max()) + 1
        step = max(1, self.blocks_at_once // len(rows))
        features, ids = texts.features[rows], texts.ids[rows]
        for begin in range(0, count, step):
            offsets = torch.arange(begin, min(begin + step, count), device=rows.device)
            places = torch.minimum(anchors[:, None] + offsets, last[:, None])
            block = _Block(texts, rows, places, drafter.num_proposals)
            choose = self._chooser(target, drafter, texts, block, uniforms)
            tokens = drafter.replay(target, features, ids, places, choose).tokens
            visits.add_every(rows, anchors + begin, tokens, block.agreement(tokens))

    def _chooser(
        self, target: Target, drafter: Drafter, texts: Texts, block: _Block, uniforms: Tensor | None
    ) -> Chooser:
        """How proposals are picked: the drafter's best token, or the coupling's."""
        head = drafter.head(target)
        if uniforms is None:
            return head.best_tokens
        assert texts.states is not None
        offsets = block.places - texts.starts[block.rows, None]
        uniforms = uniforms[block.rows[:, None], offsets]
        return _CoupledChoice(head, target.head, self.sampling, texts.states, block, uniforms)


class _Block:
    """Blocks at ``places [rows, A]``: the anchors' tokens, the text at their slots, and where it has ended."""

    def __init__(self, texts: Texts, rows: Tensor, places: Tensor, slots: int) -> None:
        self.rows, self.places = rows, places
        ids = texts.ids[rows]
        self.tokens = ids.gather(1, places)
        self.slots = places[..., None] + torch.arange(1, slots + 1, device=places.device)
        inside = self.slots.clamp_max(ids.shape[1] - 1).flatten(1)
        self.labels = ids.gather(1, inside).view_as(self.slots)
        self.recorded = self.slots < texts.lengths[rows, None, None]

    def agreement(self, proposals: Tensor) -> Tensor:
        """``[rows, A]``: accepted lengths of ``proposals [rows, A, K]``."""
        return accepted_prefix((proposals == self.labels) & self.recorded)


class _CoupledChoice:
    """Picks the proposals of successive slots by the reverse coupling, in chunks of the vocabulary's size."""

    def __init__(
        self, head: LMHead, target_head: LMHead, sampling: Sampling, states: Tensor, block: _Block, uniforms: Tensor
    ) -> None:
        self.head, self.target_head, self.sampling = head, target_head, sampling
        self.states, self.block, self.uniforms = states, block, uniforms
        self.slot = 0
        self.agreed = torch.ones_like(block.places, dtype=torch.bool)

    def __call__(self, hidden: Tensor) -> Tensor:
        """``[rows, A, n, hidden] -> [rows, A, n]``: the next ``n`` slots."""
        n = hidden.shape[2]
        part = slice(self.slot, self.slot + n)
        self.slot += n
        labels, recorded = self.block.labels[..., part].flatten(0, 1), self.block.recorded[..., part].flatten(0, 1)
        # The state one position earlier predicts a slot's token.
        before = (self.block.slots[..., part] - 1).clamp_max(self.states.shape[1] - 1).flatten(0, 1)
        rows = self.block.rows[:, None].expand_as(self.block.places).flatten()
        uniforms, agreed = self.uniforms[..., part, :].flatten(0, 1), self.agreed.flatten()
        drafted = hidden.flatten(0, 1)
        tokens = torch.empty_like(labels)
        chunk = self.target_head.rows_at_once(n)
        for begin in range(0, len(labels), chunk):
            few = slice(begin, begin + chunk)
            q = self.sampling.probabilities(self.head.target_logits(drafted[few]))
            p = self.sampling.probabilities(self.target_head.logits(self.states[rows[few, None], before[few]]))
            tokens[few], agreed[few] = couple(labels[few], recorded[few], q, p, uniforms[few], agreed[few])
        self.agreed = agreed.view_as(self.agreed)
        return tokens.view(hidden.shape[:-1])


class _Visits:
    """Collects the blocks of texts of these lengths as they are visited."""

    def __init__(self, lengths: list[int]) -> None:
        self.lengths = lengths
        self.visited = [Visited([], [], [], []) for _ in lengths]

    def _add(self, row: int, anchor: int, accepted: int, proposals: list[int]) -> None:
        found = self.visited[row]
        found.anchors.append(anchor)
        found.accepted.append(accepted)
        # The end of a text cuts its last block short.
        found.emitted.append(min(accepted + 1, self.lengths[row] - 1 - anchor))
        found.proposals.append(proposals)

    def add(self, rows: Tensor, anchors: Tensor, proposals: Tensor, accepted: Tensor) -> None:
        """One block of each of these rows: ``[rows]``, ``[rows]``, ``[rows, K]``, ``[rows]``."""
        blocks = zip(rows.tolist(), anchors.tolist(), accepted.tolist(), proposals.tolist(), strict=True)
        for block in blocks:
            self._add(*block)

    def add_every(self, rows: Tensor, first: Tensor, proposals: Tensor, accepted: Tensor) -> None:
        """Blocks at consecutive positions from ``first [rows]`` on, of which the chain visits some."""
        lengths, starts = accepted.tolist(), first.tolist()
        chosen: list[tuple[int, int]] = []  # of these rows, of their positions
        for i, row in enumerate(rows.tolist()):
            found, end = self.visited[row], self.lengths[row] - 1 - starts[i]
            place = found.anchors[-1] + found.accepted[-1] + 1 - starts[i] if found.anchors else 0
            while place < min(len(lengths[i]), end):
                chosen.append((i, place))
                place += lengths[i][place] + 1
        if chosen:
            picked = tuple(torch.tensor(chosen, device=proposals.device).T)
            for (i, place), tokens in zip(chosen, proposals[picked].tolist(), strict=True):
                self._add(int(rows[i]), starts[i] + place, lengths[i][place], tokens)


def _unfinished(rows: Tensor, anchors: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """The rows whose anchor still has a token after it."""
    keep = (anchors < lengths - 1).nonzero()[:, 0]
    return rows[keep], anchors[keep]


def _uniforms(texts: Texts, slots: int, seeds: Sequence[int]) -> Tensor:
    """``[batch, positions, K, 2]`` uniform numbers, the same for a text wherever it stands in a batch."""
    counts = (texts.lengths - texts.starts).clamp_min(1).tolist()
    drawn = [
        torch.rand(n, slots, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        for n, seed in zip(counts, seeds, strict=True)
    ]
    return torch.nn.utils.rnn.pad_sequence(drawn, batch_first=True).to(texts.ids.device)


def text_seed(seed: int, tokens: Sequence[int]) -> int:
    """The seed of one text's draws, whatever stands beside it."""
    return zlib.crc32(repr(list(tokens)).encode(), seed & 0xFFFFFFFF)
