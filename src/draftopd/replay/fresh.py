"""Anchors found in the training step, by the drafter that is about to learn from them."""

from __future__ import annotations

import torch
from torch import Tensor

from draftopd.drafters.base import Drafter
from draftopd.replay.batch import ReplayBatch
from draftopd.rollout.anchors import AnchorPolicy
from draftopd.rollout.walk import Texts, Walker, text_seed
from draftopd.targets.target import Target


class FreshAnchors:
    """Walks a replay batch; the target's forward is the one that the replay needs anyway.

    Args:
        walker: finds the blocks.
        policy: which of their anchors are replayed.
    """

    def __init__(self, walker: Walker, policy: AnchorPolicy) -> None:
        self.walker, self.policy = walker, policy

    def renew(
        self,
        target: Target,
        drafter: Drafter,
        batch: ReplayBatch,
        features: Tensor,
        states: Tensor | None,
        seed: int,
        step: int,
    ) -> ReplayBatch:
        """The batch at this drafter's anchors.

        Args:
            features: ``[rows, n, taps * hidden]``, as the drafter reads them.
            states: ``[rows, n, hidden]``, needed where the walker is ``coupled``.
            seed: of the coupling's draws, and of which anchors stay where there are too many.
            step: optimizer steps the drafter has taken.
        """
        states = None if states is None else batch.unpacked(states)
        texts = Texts(batch.unpacked(batch.ids), batch.starts, batch.lengths, batch.unpacked(features), states)
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
