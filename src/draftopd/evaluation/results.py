"""Results of an evaluation: figures per prompt, and the figures of one benchmark and drafter computed from them."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from functools import cached_property

import torch

from draftopd.decoding.draft_text import DraftedBlock
from draftopd.evaluation.lossless import Mismatch, same_distribution
from draftopd.evaluation.settings import Settings
from draftopd.evaluation.statistics import Interval, bootstrap
from draftopd.metrics.acceptance_length import acceptance_length
from draftopd.metrics.entropy_acceptance import EDGES
from draftopd.metrics.positions import AcceptanceByPosition, RejectionPosition

#: Response tokens per bin of tau by length, and the end of the last bin.
LENGTH_BIN, LENGTH_END = 1024, 8192

#: Above temperature 0 a speedup is withheld if the p-value of the same distribution is below this.
MIN_P = 1e-3


@dataclass(frozen=True)
class PromptResult:
    """One turn of one example by one drafter; seconds are its batch's, divided evenly among the batch.

    ``accepted[i]`` and ``emitted[i]`` are block ``i``'s, see :class:`Decoded`. ``solved`` is None if the benchmark
    knows no answer, ``mismatch`` if the texts are equal or were not compared. ``entropy_tested[b]`` counts the tested
    slots whose target entropy is in bin ``b`` of :data:`~draftopd.metrics.entropy_acceptance.EDGES`,
    ``entropy_accepted[b]`` the accepted ones. ``plain_features`` and ``features`` describe both texts above temperature
    0, see :func:`~draftopd.evaluation.lossless.features`. ``batch`` names the batch it was timed in. ``drafts`` are the
    text's blocks if the report shows it.
    """

    id: str
    prompt_tokens: int
    response_tokens: int
    plain_response_tokens: int
    accepted: list[int]
    emitted: list[int]
    finish: str
    solved: bool | None
    plain_seconds: float
    speculative_seconds: float
    mismatch: Mismatch | None
    turn: int = 0
    batch: str = ""
    entropy_tested: list[int] = field(default_factory=lambda: [0] * len(EDGES))
    entropy_accepted: list[int] = field(default_factory=lambda: [0] * len(EDGES))
    plain_features: list[float] = field(default_factory=list)
    features: list[float] = field(default_factory=list)
    question: str = ""
    drafts: list[DraftedBlock] = field(default_factory=list)


@dataclass(frozen=True)
class Evaluation:
    """A benchmark's figures for one drafter.

    ``tolerance`` is the logit gap up to which a difference from plain decoding is a tie.
    """

    benchmark: str
    block_size: int
    settings: Settings
    prompts: list[PromptResult]
    drafter: str = "drafter"
    tolerance: float = 0.0

    @property
    def checked(self) -> bool:
        """Whether texts were compared with plain decoding: at temperature 0 they must be equal."""
        return self.settings.sampling.greedy

    @property
    def tau(self) -> tuple[float, float]:
        """Micro and macro acceptance length; NaN if no prompt has a block."""
        return acceptance_length([p.emitted for p in self.prompts])

    @cached_property
    def tau_interval(self) -> Interval:
        """Micro tau's 95 % interval over examples."""
        return bootstrap(self.tau_parts(), [p.id for p in self.prompts])

    def tau_parts(self) -> list[tuple[float, float]]:
        """Emitted tokens and verifications of every prompt; the ratio of their sums is micro tau."""
        return [(float(sum(p.emitted)), float(len(p.emitted))) for p in self.prompts]

    @property
    def mean_accepted(self) -> float:
        """Mean accepted length of :meth:`whole_blocks`."""
        return float(self.whole_blocks().float().mean())

    @property
    def plain_rate(self) -> float:
        """Tokens per second of plain decoding."""
        return sum(p.plain_response_tokens for p in self.prompts) / sum(p.plain_seconds for p in self.prompts)

    @property
    def speculative_rate(self) -> float:
        """Tokens per second with the drafter."""
        return sum(p.response_tokens for p in self.prompts) / sum(p.speculative_seconds for p in self.prompts)

    @property
    def mismatches(self) -> list[PromptResult]:
        """Texts that differ from plain decoding's, ties included."""
        return [p for p in self.prompts if p.mismatch is not None]

    @property
    def ties(self) -> list[PromptResult]:
        """The mismatches with a logit gap within the tolerance, where rounding decided between two tokens."""
        return [p for p in self.mismatches if p.mismatch is not None and p.mismatch.tied(self.tolerance)]

    @property
    def speedup(self) -> float | None:
        """Median over batches of the paired speedups; None if decoding was not lossless."""
        return None if self.withheld else statistics.median(self.speedups().values())

    @property
    def speedup_interval(self) -> Interval | None:
        """95 % interval of the speedup over batches, since a batch is timed as a whole."""
        if self.withheld:
            return None
        speedups = self.speedups()
        return bootstrap([(s, 1.0) for s in speedups.values()], list(speedups), median=True)

    def speedups(self) -> dict[str, float]:
        """Tokens per second with the drafter over those of plain decoding, by batch."""
        batches: dict[str, list[PromptResult]] = {}
        for prompt in self.prompts:
            batches.setdefault(prompt.batch or prompt.id, []).append(prompt)
        return {
            name: (sum(p.response_tokens for p in batch) / sum(p.speculative_seconds for p in batch))
            / (sum(p.plain_response_tokens for p in batch) / sum(p.plain_seconds for p in batch))
            for name, batch in batches.items()
        }

    @cached_property
    def distribution_p(self) -> float | None:
        """p-value of the same distribution as plain sampling; None at temperature 0 and for a single prompt."""
        pairs = [(p.plain_features, p.features) for p in self.prompts if p.features]
        return same_distribution(pairs) if len(pairs) > 1 else None

    @property
    def withheld(self) -> str | None:
        """Why no speedup is given, or None."""
        wrong = len(self.mismatches) - len(self.ties)
        if wrong:
            return f"not lossless: {wrong} of {len(self.prompts)} texts differ"
        p = self.distribution_p
        if p is not None and p < MIN_P:
            return f"not lossless: the tokens are not distributed as plain sampling's (p = {p:.1g})"
        return None

    @property
    def solved(self) -> float | None:
        """Fraction of correct answers; None if the benchmark knows none."""
        known = [p.solved for p in self.prompts if p.solved is not None]
        return sum(known) / len(known) if known else None

    def blocks(self) -> torch.Tensor:
        """``[2, blocks]``: the accepted and the emitted tokens of each block."""
        pairs = [pair for p in self.prompts for pair in zip(p.accepted, p.emitted, strict=True)]
        return torch.tensor(pairs, dtype=torch.long).view(-1, 2).T

    def whole_blocks(self) -> torch.Tensor:
        """Accepted lengths of the blocks that the end of the text did not cut short."""
        accepted, emitted = self.blocks()
        return accepted[emitted > accepted]

    def acceptance_by_position(self) -> list[float]:
        """See :class:`AcceptanceByPosition`; NaN if no block reached the position."""
        metric = AcceptanceByPosition(self.block_size - 1)
        metric.update(*self.blocks())
        return [float(x) for x in metric.compute()]

    def rejection_positions(self) -> list[int]:
        """See :class:`RejectionPosition`."""
        metric = RejectionPosition(self.block_size - 1)
        metric.update(*self.blocks())
        return [int(x) for x in metric.compute()]

    def tau_by_length(self) -> list[tuple[int, float, int]]:
        """``(first token, tau, blocks)`` of the blocks that began in each :data:`LENGTH_BIN` tokens of a response."""
        bins = [[0, 0] for _ in range(LENGTH_END // LENGTH_BIN)]
        for prompt in self.prompts:
            begin = 1  # the prefill gave the first token
            for emitted in prompt.emitted:
                if begin < LENGTH_END:
                    bins[begin // LENGTH_BIN][0] += emitted
                    bins[begin // LENGTH_BIN][1] += 1
                begin += emitted
        return [(i * LENGTH_BIN, tokens / blocks, blocks) for i, (tokens, blocks) in enumerate(bins) if blocks]

    def acceptance_by_entropy(self) -> list[tuple[float, float, int]]:
        """``(lower edge, acceptance rate, slots)`` of each bin of the target's entropy that holds a tested slot."""
        tested, accepted = (
            [sum(column) for column in zip(*(getattr(p, name) for p in self.prompts), strict=True)]
            for name in ("entropy_tested", "entropy_accepted")
        )
        return [(edge, a / t, t) for edge, a, t in zip(EDGES, accepted, tested, strict=True) if t]
