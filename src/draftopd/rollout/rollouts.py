"""Rollouts: from a stretch of prompts to recorded sequences with the current drafter's anchors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Protocol

import torch
from pydantic import PositiveInt

from draftopd.decoding.generate import Decoder
from draftopd.decoding.sampling import Sampling
from draftopd.decoding.verify import Verification
from draftopd.distributed import ranks
from draftopd.drafters.base import Drafter
from draftopd.rollout.buffer import Recorded
from draftopd.rollout.request import Request, Trajectory
from draftopd.rollout.trajectories import Trajectories
from draftopd.rollout.walk import Walker, text_seed
from draftopd.targets.target import Target

#: Batches of texts sorted by length together, so that a batch holds texts of like length.
POOL = 16


class Rollout(Protocol):
    """From prompts to recorded sequences, batch by batch."""

    sampling: Sampling
    #: Acceptance rule above temperature 0.
    verification: Verification
    max_new_tokens: int
    #: Whether the recorded sequences carry the current drafter's anchors.
    records_anchors: bool
    #: Where the texts come from; None for a rollout that decodes them itself.
    trajectories: Trajectories | None
    #: Finds a drafter's anchors on recorded texts; None where that takes decoding.
    walker: Walker | None

    def collect(self, request: Request) -> Iterator[list[Recorded]]: ...

    def counts(self) -> Mapping[str, int]:
        """What became of the last request's texts, for the log."""


class SpeculativeRollout:
    """Target-assisted rollout: speculative decoding with the current drafter, anchors recorded.

    Args:
        batch_size: prompts decoded together.
        max_new_tokens: response limit.
        temperature, top_k, top_p: see :class:`Sampling`.
        verification: acceptance rule above temperature 0.
        compiled: run the decoding steps through torch.compile.
    """

    records_anchors = True
    trajectories = None
    walker = None

    def __init__(
        self,
        batch_size: PositiveInt = 32,
        max_new_tokens: PositiveInt = 256,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        verification: Verification = "rejection_sampling",
        compiled: bool = False,
    ) -> None:
        self.batch_size, self.compiled = batch_size, compiled
        self.max_new_tokens = max_new_tokens
        self.sampling = Sampling(temperature, top_k, top_p)
        self.verification = verification

    def collect(self, request: Request) -> Iterator[list[Recorded]]:
        decoder = Decoder(
            request.target, request.drafter, self.sampling, self.verification, self.max_new_tokens, request.stop,
            self.compiled,
        )  # fmt: skip
        for batch in decoder.decode(request.prompts(), self.batch_size, ranks.own(request.seed)):
            request.progress(len(batch), sum(len(d.response) for d in batch))
            yield [Recorded(d.tokens, len(d.prompt), d.anchors, d.accepted, d.emitted) for d in batch]

    def counts(self) -> Mapping[str, int]:
        return {}


class TargetRollout:
    """The target's own texts, without anchors: what SFT trains on.

    Args:
        trajectories: where the texts come from.
        max_new_tokens: response limit.
        temperature, top_k, top_p: see :class:`Sampling`.
    """

    records_anchors = False
    walker: Walker | None = None
    verification: Verification = "rejection_sampling"

    def __init__(
        self,
        trajectories: Trajectories,
        max_new_tokens: PositiveInt = 256,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
    ) -> None:
        self.trajectories = trajectories
        self.max_new_tokens = max_new_tokens
        self.sampling = Sampling(temperature, top_k, top_p)

    def collect(self, request: Request) -> Iterator[list[Recorded]]:
        for batch in self.trajectories.collect(request):
            yield [_without_anchors(text) for text in batch]

    def counts(self) -> Mapping[str, int]:
        return self.trajectories.counts


class DecodeFreeRollout(TargetRollout):
    """The target's own texts with the current drafter's anchors, found without decoding.

    Args:
        trajectories: where the texts come from.
        batch_size: texts read and walked together.
        max_new_tokens: response limit.
        temperature, top_k, top_p: see :class:`Sampling`; the texts must have been drawn with them.
        verification: acceptance rule above temperature 0.
        parallel_below, blocks_at_once: see :class:`Walker`.
    """

    records_anchors = True
    walker: Walker

    def __init__(
        self,
        trajectories: Trajectories,
        batch_size: PositiveInt = 64,
        max_new_tokens: PositiveInt = 256,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        verification: Verification = "rejection_sampling",
        parallel_below: int = 8,
        blocks_at_once: int = 4096,
    ) -> None:
        super().__init__(trajectories, max_new_tokens, temperature, top_k, top_p)
        self.batch_size, self.verification = batch_size, verification
        self.walker = Walker(self.sampling, verification, parallel_below, blocks_at_once)

    def texts_only(self) -> TargetRollout:
        """The same texts without looking for anchors."""
        sampling = self.sampling
        return TargetRollout(
            self.trajectories, self.max_new_tokens, sampling.temperature, sampling.top_k, sampling.top_p
        )

    def collect(self, request: Request) -> Iterator[list[Recorded]]:
        drafter = request.drafter
        assert drafter is not None
        pool: list[Recorded] = []
        for batch in super().collect(request):
            pool += batch
            if len(pool) >= POOL * self.batch_size:
                yield self.anchored(request.target, drafter, pool, request.seed)
                pool = []
        if pool:
            yield self.anchored(request.target, drafter, pool, request.seed)

    def anchored(self, target: Target, drafter: Drafter, records: Sequence[Recorded], seed: int) -> list[Recorded]:
        """The same texts, in the same order, with this drafter's anchors.

        Args:
            seed: of the draws above temperature 0.
        """
        order = sorted(range(len(records)), key=lambda i: len(records[i].tokens))
        result = list(records)
        for begin in range(0, len(order), self.batch_size):
            places = order[begin : begin + self.batch_size]
            batch = [records[i] for i in places]
            rows = [torch.tensor(r.tokens, device=target.device) for r in batch]
            ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
            starts = torch.tensor([r.prompt_length for r in batch], device=target.device)
            lengths = torch.tensor([len(r.tokens) for r in batch], device=target.device)
            texts = self.walker.read(target, ids, starts, lengths)
            visited = self.walker.walk(target, drafter, texts, [text_seed(seed, r.tokens) for r in batch])
            for i, record, found in zip(places, batch, visited, strict=True):
                result[i] = replace(record, anchors=found.anchors, accepted=found.accepted, emitted=found.emitted)
        return result


def _without_anchors(text: Trajectory) -> Recorded:
    return Recorded([*text.prompt, *text.response], len(text.prompt), [], [], [])
