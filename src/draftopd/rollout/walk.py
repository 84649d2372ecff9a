"""Anchors without decoding: the blocks that the current drafter would have drafted on a given text.

Speculative decoding is lossless, so the text does not depend on the drafter. On a text of the target, the anchors,
proposals and accepted lengths of any drafter are found without target steps: draft at the anchor, compare with the
text, advance by the accepted length plus one.

- At temperature 0 and with target-only verification a proposal is accepted while it equals the text's token.
- With rejection sampling the proposals come from the reverse coupling (:mod:`draftopd.decoding.coupling`).

There are two ways to find the blocks. Walking drafts at the next anchor of every text, in rounds. Drafting at every
position at once has no rounds, but drafts at unvisited positions too. A round costs about the same for one text and for
many, so many texts are walked, and the last few are finished at every position at once (`--parallel-below` of
`benchmarks/speed/rollout.py` measures both).
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

#: Number of tokens that the target reads at a time; more do not run faster and need more memory.
READ_TOKENS = 4096


class Visited(NamedTuple):
    """The blocks of one text in order, as in :class:`~draftopd.decoding.generate.Decoded`."""

    anchors: list[int]
    accepted: list[int]
    emitted: list[int]
    proposals: list[list[int]]


class Texts(NamedTuple):
    """Recorded texts and the target's states on them.

    ``ids [batch, n]`` are padded on the right, ``starts [batch]`` are the first response positions. The drafter reads
    ``features [batch, n, taps * hidden]``. The reverse coupling alone needs ``states [batch, n, hidden]``, after the
    final norm.
    """

    ids: Tensor
    starts: Tensor
    lengths: Tensor
    features: Tensor
    states: Tensor | None


class Walker:
    """Finds the blocks of a drafter along recorded texts.

    Args:
        rules: the rules under which the texts were drawn.
        parallel_below: with at most this many unfinished texts, all their remaining positions are drafted at once; 0
            always walks.
        blocks_at_once: maximum number of blocks drafted in one pass, which bounds memory.

    Raises:
        ValueError: if a number lies outside its range.
    """

    def __init__(self, rules: Rules, parallel_below: int = 8, blocks_at_once: int = 4096) -> None:
        if parallel_below < 0 or blocks_at_once < 1:
            raise ValueError(
                "parallel_below must be 0 or more and blocks_at_once 1 or more, "
                f"found {parallel_below} and {blocks_at_once}."
            )
        self.sampling = rules.sampling
        #: Whether proposals come from the reverse coupling, which needs the target's states.
        self.coupled = rules.rejection
        self.parallel_below, self.blocks_at_once = parallel_below, blocks_at_once

    def read(self, target: Target, ids: Tensor, starts: Tensor, lengths: Tensor) -> Texts:
        """The target's forward over texts ``ids [batch, n]``, in parts and only through the layers that are needed."""
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
            texts: from :meth:`read`.
            seeds: one per text, for the draws of the reverse coupling. Each draw belongs to a text and a position, so
                the result does not depend on the batch or on ``parallel_below``.
        """
        visits = _Visits(texts.lengths.tolist())
        uniforms = _uniforms(texts, drafter.num_proposals, seeds) if self.coupled else None
        rows = (texts.starts < texts.lengths - 1).nonzero()[:, 0]
        anchors = texts.starts[rows]
        if len(rows) > self.parallel_below:
            width = texts.ids.shape[1]
            state = drafter.start(width)
            positions = torch.arange(width, device=texts.ids.device).expand_as(texts.ids)
            drafter.observe(target, state, texts.features, texts.ids, positions)
            if len(rows) < len(texts.ids):
                drafter.select(state, rows)
            while len(rows) > self.parallel_below:
                block = _Block(texts, rows, anchors[:, None], drafter.num_proposals)
                choose = self._chooser(target, drafter, texts, block, uniforms)
                visible = int(anchors.max())
                tokens = drafter.draft(target, state, anchors, block.tokens[:, 0], visible, choose).tokens
                accepted = block.agreement(tokens)
                visits.add(rows, anchors, tokens[:, 0], accepted[:, 0])
                anchors = anchors + accepted[:, 0] + 1
                keep = (anchors < texts.lengths[rows] - 1).nonzero()[:, 0]
                if len(keep) == len(rows):
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
        """Draft at every remaining position of these rows, then select the blocks that decoding would visit."""
        last = texts.lengths[rows] - 2
        count = int((last - anchors).max()) + 1
        step = max(1, self.blocks_at_once // len(rows))
        features, ids = texts.features[rows], texts.ids[rows]
        for begin in range(0, count, step):
            offsets = torch.arange(begin, min(begin + step, count), device=rows.device)
            positions = torch.minimum(anchors[:, None] + offsets, last[:, None])
            block = _Block(texts, rows, positions, drafter.num_proposals)
            choose = self._chooser(target, drafter, texts, block, uniforms)
            tokens = drafter.replay(target, features, ids, positions, choose).tokens
            visits.add_every(rows, anchors + begin, tokens, block.agreement(tokens))

    def _chooser(
        self, target: Target, drafter: Drafter, texts: Texts, block: _Block, uniforms: Tensor | None
    ) -> Chooser:
        """The choice of proposals: the drafter's best tokens, or those of the reverse coupling."""
        head = drafter.head(target)
        if uniforms is None:
            return head.best_tokens
        assert texts.states is not None
        offsets = block.anchors - texts.starts[block.rows, None]
        uniforms = uniforms[block.rows[:, None], offsets]
        return _CoupledChoice(head, target.head, self.sampling, texts.states, block, uniforms)


class _Block:
    """Blocks at ``anchors [rows, A]``: the anchors' tokens, the text's tokens at their slots, and where it ends."""

    def __init__(self, texts: Texts, rows: Tensor, anchors: Tensor, slots: int) -> None:
        self.rows, self.anchors = rows, anchors
        ids = texts.ids[rows]
        self.tokens = ids.gather(1, anchors)
        self.slots = anchors[..., None] + torch.arange(1, slots + 1, device=anchors.device)
        inside = self.slots.clamp_max(ids.shape[1] - 1).flatten(1)
        self.labels = ids.gather(1, inside).view_as(self.slots)
        self.recorded = self.slots < texts.lengths[rows, None, None]

    def agreement(self, proposals: Tensor) -> Tensor:
        """Accepted lengths ``[rows, A]`` of ``proposals [rows, A, K]``."""
        return accepted_prefix((proposals == self.labels) & self.recorded)


class _CoupledChoice:
    """Draws the proposals of successive slots by the reverse coupling, in chunks of bounded memory."""

    def __init__(
        self, head: LMHead, target_head: LMHead, sampling: Sampling, states: Tensor, block: _Block, uniforms: Tensor
    ) -> None:
        self.head, self.target_head, self.sampling = head, target_head, sampling
        self.states, self.block, self.uniforms = states, block, uniforms
        self.slot = 0
        self.agreed = torch.ones_like(block.anchors, dtype=torch.bool)

    def __call__(self, hidden: Tensor) -> Tensor:
        """``[rows, A, n, hidden] -> [rows, A, n]``: the next ``n`` slots."""
        n = hidden.shape[2]
        part = slice(self.slot, self.slot + n)
        self.slot += n
        labels, recorded = self.block.labels[..., part].flatten(0, 1), self.block.recorded[..., part].flatten(0, 1)
        # The state one position earlier predicts a slot's token.
        before = (self.block.slots[..., part] - 1).clamp_max(self.states.shape[1] - 1).flatten(0, 1)
        rows = self.block.rows[:, None].expand_as(self.block.anchors).flatten()
        uniforms, agreed = self.uniforms[..., part, :].flatten(0, 1), self.agreed.flatten()
        drafted = hidden.flatten(0, 1)
        tokens = torch.empty_like(labels)
        chunk = self.target_head.rows_at_once(n)
        for begin in range(0, len(labels), chunk):
            at = slice(begin, begin + chunk)
            q = self.sampling.probabilities(self.head.target_logits(drafted[at]))
            p = self.sampling.probabilities(self.target_head.logits(self.states[rows[at, None], before[at]]))
            tokens[at], agreed[at] = couple(labels[at], recorded[at], q, p, uniforms[at], agreed[at])
        self.agreed = agreed.view_as(self.agreed)
        return tokens.view(hidden.shape[:-1])


class _Visits:
    """Collects the visited blocks of texts of these lengths."""

    def __init__(self, lengths: list[int]) -> None:
        self.lengths = lengths
        self.visited = [Visited([], [], [], []) for _ in lengths]

    def _add(self, row: int, anchor: int, accepted: int, proposals: list[int]) -> None:
        blocks = self.visited[row]
        blocks.anchors.append(anchor)
        blocks.accepted.append(accepted)
        # The last block may extend beyond the end of the text.
        blocks.emitted.append(min(accepted + 1, self.lengths[row] - 1 - anchor))
        blocks.proposals.append(proposals)

    def add(self, rows: Tensor, anchors: Tensor, proposals: Tensor, accepted: Tensor) -> None:
        """Add one block per row: ``[rows]``, ``[rows]``, ``[rows, K]``, ``[rows]``."""
        for block in zip(rows.tolist(), anchors.tolist(), accepted.tolist(), proposals.tolist(), strict=True):
            self._add(*block)

    def add_every(self, rows: Tensor, first: Tensor, proposals: Tensor, accepted: Tensor) -> None:
        """Add the visited ones among blocks at consecutive positions that begin at ``first [rows]``."""
        lengths, starts = accepted.tolist(), first.tolist()
        chosen: list[tuple[int, int]] = []  # index of the row and of the block in it
        for i, row in enumerate(rows.tolist()):
            blocks, end = self.visited[row], self.lengths[row] - 1 - starts[i]
            j = blocks.anchors[-1] + blocks.accepted[-1] + 1 - starts[i] if blocks.anchors else 0
            while j < min(len(lengths[i]), end):
                chosen.append((i, j))
                j += lengths[i][j] + 1
        if chosen:
            picked = tuple(torch.tensor(chosen, device=proposals.device).T)
            for (i, j), tokens in zip(chosen, proposals[picked].tolist(), strict=True):
                self._add(int(rows[i]), starts[i] + j, lengths[i][j], tokens)


def _uniforms(texts: Texts, slots: int, seeds: Sequence[int]) -> Tensor:
    """``[batch, positions, K, 2]`` uniform numbers, which depend on the text's seed only."""
    counts = (texts.lengths - texts.starts).clamp_min(1).tolist()
    drawn = [
        torch.rand(n, slots, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        for n, seed in zip(counts, seeds, strict=True)
    ]
    return torch.nn.utils.rnn.pad_sequence(drawn, batch_first=True).to(texts.ids.device)


def text_seed(seed: int, tokens: Sequence[int]) -> int:
    """The seed of one text's draws, independent of the other texts of its batch."""
    return zlib.crc32(repr(list(tokens)).encode(), seed & 0xFFFFFFFF)
