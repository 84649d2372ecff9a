"""Anchors found in the training step, by the drafter that is about to learn from them."""

from __future__ import annotations

import torch

from draftopd.drafters.base import Drafter
from draftopd.replay.batch import ReplayBatch
from draftopd.replay.replay import Reading
from draftopd.rollout.anchors import AnchorPolicy
from draftopd.rollout.walk import Texts, Walker, text_seed
from draftopd.targets.target import Target


class FreshAnchors:
    """Walks the texts of a replay batch, which the target has read for the step anyway.

    Args:
        walker: finds the blocks.
        policy: which of their anchors are replayed.
    """

    def __init__(self, walker: Walker, policy: AnchorPolicy) -> None:
        self.walker, self.policy = walker, policy

    @property
    def needs_states(self) -> bool:
        """Whether the walk needs the target's states too: above temperature 0 under rejection sampling."""
        return self.walker.coupled

    def renew(
        self, target: Target, drafter: Drafter, batch: ReplayBatch, reading: Reading, seed: int, step: int
    ) -> ReplayBatch:
        """The batch at this drafter's anchors.

        Args:
            reading: the target's reading of the batch, with states where :attr:`needs_states`.
            seed: of the coupling's draws, and of which anchors are kept where there are too many.
            step: optimizer steps that the drafter has taken.
        """
        states = batch.unpacked(reading.states) if reading.states is not None and self.needs_states else None
        features = batch.unpacked(reading.features)
        texts = Texts(batch.unpacked(batch.ids), batch.starts, batch.lengths, features, states)
        rows = zip(texts.ids.tolist(), batch.lengths.tolist(), strict=True)
        seeds = [text_seed(seed, ids[:length]) for ids, length in rows]
        visited = self.walker.walk(target, drafter, texts, seeds)
        generator = torch.Generator().manual_seed(seed % 2**63)
        ends = zip(batch.starts.tolist(), batch.lengths.tolist(), strict=True)
        chosen = [
            self.policy.choose(found.anchors, found.accepted, start, length, generator)
            for found, (start, length) in zip(visited, ends, strict=True)
        ]
        return batch.at(chosen, step)
