"""Rollouts: from a range of prompts to recorded sequences, with or without the current drafter's anchors."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Literal

import torch
from pydantic import NonNegativeInt, PositiveInt

from draftopd.decoding.generate import Decoder
from draftopd.decoding.rules import Rules
from draftopd.distributed import ranks
from draftopd.rollout.buffer import Recorded
from draftopd.rollout.request import Request
from draftopd.rollout.trajectories import Trajectories
from draftopd.rollout.walk import Walker, text_seed

#: Number of batches whose texts are sorted by length together, so that a batch has texts of similar length.
POOL = 16

#: The origin of the current drafter's anchors: the rollout records them, every training step finds them, or neither.
AnchorSource = Literal["rollout", "step", "none"]


class Rollout(ABC):
    """Produces recorded sequences for a range of prompts."""

    anchors: AnchorSource
    #: The source of the texts; None for a rollout that decodes them itself.
    trajectories: Trajectories | None = None

    @abstractmethod
    def collect(self, request: Request) -> Iterator[list[Recorded]]:
        """The request's sequences, in batches."""

    def counts(self) -> Mapping[str, int]:
        """How many texts of the last request were used or left out, by reason, for the log."""
        return {}


class SpeculativeRollout(Rollout):
    """Target-assisted rollout: speculative decoding with the current drafter, which records its anchors.

    Args:
        batch_size: prompts decoded together.
        compiled: see :class:`~draftopd.decoding.generate.Decoder`.
    """

    anchors: AnchorSource = "rollout"

    def __init__(self, batch_size: PositiveInt = 32, compiled: bool = False) -> None:
        self.batch_size, self.compiled = batch_size, compiled

    def collect(self, request: Request) -> Iterator[list[Recorded]]:
        decoder = Decoder(request.target, request.drafter, request.rules, self.compiled)
        for batch in decoder.decode(request.prompts(), self.batch_size, ranks.own(request.seed)):
            request.progress(len(batch), sum(len(d.response) for d in batch))
            yield [Recorded.of(d) for d in batch]


class TargetRollout(Rollout):
    """The target's own texts without anchors, for SFT.

    Args:
        trajectories: the source of the texts.
    """

    anchors: AnchorSource = "none"
    trajectories: Trajectories

    def __init__(self, trajectories: Trajectories) -> None:
        self.trajectories = trajectories

    def collect(self, request: Request) -> Iterator[list[Recorded]]:
        for batch in self.trajectories.collect(request):
            yield [Recorded([*text.prompt, *text.response], len(text.prompt), [], [], []) for text in batch]

    def counts(self) -> Mapping[str, int]:
        return self.trajectories.counts


class FreshRollout(TargetRollout):
    """The target's own texts; every training step finds the anchors of its current drafter.

    Args:
        trajectories: the source of the texts.
        parallel_below, blocks_at_once: see :class:`~draftopd.rollout.walk.Walker`.
    """

    anchors: AnchorSource = "step"

    def __init__(
        self, trajectories: Trajectories, parallel_below: NonNegativeInt = 8, blocks_at_once: PositiveInt = 4096
    ) -> None:
        super().__init__(trajectories)
        self.parallel_below, self.blocks_at_once = parallel_below, blocks_at_once

    def walker(self, rules: Rules) -> Walker:
        """The walker for texts that were drawn under these rules."""
        return Walker(rules, self.parallel_below, self.blocks_at_once)


class DecodeFreeRollout(FreshRollout):
    """The target's own texts with the current drafter's anchors, found without decoding once per refresh.

    Args:
        trajectories: the source of the texts.
        batch_size: texts read and walked together.
        parallel_below, blocks_at_once: see :class:`~draftopd.rollout.walk.Walker`.
    """

    anchors: AnchorSource = "rollout"

    def __init__(
        self,
        trajectories: Trajectories,
        batch_size: PositiveInt = 64,
        parallel_below: NonNegativeInt = 8,
        blocks_at_once: PositiveInt = 4096,
    ) -> None:
        super().__init__(trajectories, parallel_below, blocks_at_once)
        self.batch_size = batch_size

    def collect(self, request: Request) -> Iterator[list[Recorded]]:
        pool: list[Recorded] = []
        for batch in super().collect(request):
            pool += batch
            if len(pool) >= POOL * self.batch_size:
                yield self.anchored(request, pool)
                pool = []
        if pool:
            yield self.anchored(request, pool)

    def anchored(self, request: Request, records: Sequence[Recorded]) -> list[Recorded]:
        """The same records, in the same order, with the drafter's blocks."""
        target, drafter, walker = request.target, request.drafter, self.walker(request.rules)
        assert drafter is not None
        order = sorted(range(len(records)), key=lambda i: len(records[i].tokens))
        result = list(records)
        for begin in range(0, len(order), self.batch_size):
            chosen = order[begin : begin + self.batch_size]
            batch = [records[i] for i in chosen]
            rows = [torch.tensor(r.tokens, device=target.device) for r in batch]
            ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
            starts = torch.tensor([r.prompt_length for r in batch], device=target.device)
            lengths = torch.tensor([len(r.tokens) for r in batch], device=target.device)
            texts = walker.read(target, ids, starts, lengths)
            visited = walker.walk(target, drafter, texts, [text_seed(request.seed, r.tokens) for r in batch])
            for i, record, blocks in zip(chosen, batch, visited, strict=True):
                result[i] = replace(record, anchors=blocks.anchors, accepted=blocks.accepted, emitted=blocks.emitted)
        return result
