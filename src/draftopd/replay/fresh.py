"""Anchors found in the training step by the current drafter."""

from __future__ import annotations

import torch

from draftopd.drafters.base import Drafter
from draftopd.replay.batch import ReplayBatch
from draftopd.replay.replay import Reading
from draftopd.rollout.anchors import AnchorPolicy
from draftopd.rollout.walk import Texts, Walker, text_seed
from draftopd.targets.target import Target


class FreshAnchors:
    """Finds the anchors of a replay batch from the target's reading of it.

    Args:
        walker: finds the drafter's blocks.
        policy: chooses which of their anchors are replayed.
    """

    def __init__(self, walker: Walker, policy: AnchorPolicy) -> None:
        self.walker, self.policy = walker, policy

    @property
    def needs_states(self) -> bool:
        """Whether the walker needs the target's states, as under rejection sampling above temperature 0."""
        return self.walker.coupled

    def renew(
        self, target: Target, drafter: Drafter, batch: ReplayBatch, reading: Reading, seed: int, step: int
    ) -> ReplayBatch:
        """The batch with this drafter's anchors.

        Args:
            reading: the target's reading of the batch, with states if :attr:`needs_states`.
            seed: seed of the draws of the reverse coupling and of the choice of anchors.
            step: number of optimizer steps that the drafter has taken.
        """
        states = batch.unpacked(reading.states) if reading.states is not None and self.needs_states else None
        features = batch.unpacked(reading.features)
        texts = Texts(batch.unpacked(batch.ids), batch.starts, batch.lengths, features, states)
        rows = zip(texts.ids.tolist(), batch.lengths.tolist(), strict=True)
        seeds = [text_seed(seed, ids[:length]) for ids, length in rows]
        visited = self.walker.walk(target, drafter, texts, seeds)
        # Before torch 2.10 autocast would reuse weights that it cast here without gradients.
        torch.clear_autocast_cache()
        generator = torch.Generator().manual_seed(seed % 2**63)
        ends = zip(batch.starts.tolist(), batch.lengths.tolist(), strict=True)
        chosen = [
            self.policy.choose(blocks.anchors, blocks.accepted, start, length, generator)
            for blocks, (start, length) in zip(visited, ends, strict=True)
        ]
        return batch.at(chosen, step)
