"""Where recorded sequences come from: in-process decoding, with the drafter or without."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

from draftopd.decoding.generate import Decoded, Decoder
from draftopd.decoding.sampling import Sampling
from draftopd.decoding.verify import Verification
from draftopd.drafters.base import Drafter
from draftopd.rollout.buffer import Recorded
from draftopd.targets.target import Target


class Rollout(Protocol):
    """Decode prompts into recorded sequences, batch by batch."""

    sampling: Sampling
    #: Whether the recorded sequences carry the current drafter's anchors.
    records_anchors: bool

    def collect(
        self, target: Target, drafter: Drafter, prompts: Sequence[list[int]], stop: frozenset[int], seed: int
    ) -> Iterator[list[Recorded]]: ...


class SpeculativeRollout:
    """Target-assisted rollout: speculative decoding with the current drafter, anchors recorded.

    Args:
        batch_size: prompts decoded together.
        max_new_tokens: response limit.
        temperature, top_k, top_p: see :class:`Sampling`.
        verification: acceptance rule above temperature 0.
    """

    records_anchors = True

    def __init__(
        self,
        batch_size: int = 32,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        verification: Verification = "rejection_sampling",
    ) -> None:
        self.batch_size = batch_size
        self.max_new_tokens = max_new_tokens
        self.sampling = Sampling(temperature, top_k, top_p)
        self.verification = verification

    def collect(
        self, target: Target, drafter: Drafter, prompts: Sequence[list[int]], stop: frozenset[int], seed: int
    ) -> Iterator[list[Recorded]]:
        decoder = Decoder(target, self._drafter(drafter), self.sampling, self.verification, self.max_new_tokens, stop)
        for batch in decoder.decode(prompts, self.batch_size, seed):
            yield [self._record(decoded) for decoded in batch]

    def _drafter(self, drafter: Drafter) -> Drafter | None:
        return drafter

    def _record(self, decoded: Decoded) -> Recorded:
        return Recorded(decoded.tokens, len(decoded.prompt), decoded.anchors, decoded.accepted, decoded.emitted)


class TargetRollout(SpeculativeRollout):
    """The target's own trajectories, plainly decoded: what SFT trains on. No anchors are recorded."""

    records_anchors = False

    def _drafter(self, drafter: Drafter) -> Drafter | None:
        return None

    def _record(self, decoded: Decoded) -> Recorded:
        return Recorded(decoded.tokens, len(decoded.prompt), [], [], [])
