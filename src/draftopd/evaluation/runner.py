"""Decode a benchmark with and without the drafter, by one engine, and compare."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

from draftopd.data.prompts import PromptEncoder
from draftopd.decoding.generate import Decoded, Decoder
from draftopd.drafters.base import Drafter
from draftopd.errors import PromptError
from draftopd.evaluation.benchmark import Example
from draftopd.evaluation.lossless import Mismatch, compare
from draftopd.evaluation.settings import Settings
from draftopd.metrics.acceptance_length import acceptance_length
from draftopd.metrics.positions import AcceptanceByPosition, RejectionPosition
from draftopd.targets.target import Target


@dataclass(frozen=True)
class PromptResult:
    """One prompt's figures; seconds are its batch's, shared evenly among the batch.

    ``accepted[i]`` and ``emitted[i]`` are block ``i``'s, see :class:`Decoded`. ``solved`` is None where the
    benchmark knows no answer; ``mismatch`` is None where the texts are equal or were not compared.
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


@dataclass(frozen=True)
class Evaluation:
    """A benchmark's figures for one drafter."""

    benchmark: str
    block_size: int
    settings: Settings
    prompts: list[PromptResult]

    @property
    def checked(self) -> bool:
        """Whether texts were compared with plain decoding: at temperature 0 they must be equal."""
        return self.settings.sampling.greedy

    @property
    def tau(self) -> tuple[float, float]:
        """Micro and macro acceptance length; NaN where no prompt came to a block."""
        return acceptance_length([p.emitted for p in self.prompts])

    @property
    def mean_accepted(self) -> float:
        """Mean accepted length of :meth:`whole_blocks`."""
        return float(self.whole_blocks().float().mean())

    @property
    def plain_rate(self) -> float:
        """Tokens a second of plain decoding."""
        return sum(p.plain_response_tokens for p in self.prompts) / sum(p.plain_seconds for p in self.prompts)

    @property
    def speculative_rate(self) -> float:
        """Tokens a second with the drafter."""
        return sum(p.response_tokens for p in self.prompts) / sum(p.speculative_seconds for p in self.prompts)

    @property
    def mismatches(self) -> list[PromptResult]:
        return [p for p in self.prompts if p.mismatch is not None]

    @property
    def speedup(self) -> float | None:
        """Speculative over plain tokens a second; None for a decoder that proved not lossless."""
        return None if self.withheld else self.speculative_rate / self.plain_rate

    @property
    def withheld(self) -> str | None:
        """Why no speedup is given, or None."""
        if not self.mismatches:
            return None
        return f"not lossless: {len(self.mismatches)} of {len(self.prompts)} texts differ"

    @property
    def solved(self) -> float | None:
        """Share of right answers, where the benchmark knows them."""
        known = [p.solved for p in self.prompts if p.solved is not None]
        return sum(known) / len(known) if known else None

    def whole_blocks(self) -> torch.Tensor:
        """Accepted lengths of the blocks that the end of the text did not cut short."""
        pairs = [(n, e) for p in self.prompts for n, e in zip(p.accepted, p.emitted, strict=True)]
        return torch.tensor([n for n, e in pairs if e == n + 1], dtype=torch.long)

    def acceptance_by_position(self) -> list[float]:
        """See :class:`AcceptanceByPosition`; NaN where no block got that far."""
        metric = AcceptanceByPosition(self.block_size - 1)
        metric.update(self.whole_blocks())
        return [float(x) for x in metric.compute()]

    def rejection_positions(self) -> list[int]:
        """See :class:`RejectionPosition`."""
        metric = RejectionPosition(self.block_size - 1)
        metric.update(self.whole_blocks())
        return [int(x) for x in metric.compute()]


def evaluate(
    target: Target,
    drafter: Drafter,
    tokenizer: PreTrainedTokenizerBase,
    benchmark: str,
    examples: Sequence[Example],
    stop: frozenset[int],
    settings: Settings,
    advance: Callable[[int, int], None] = lambda prompts, tokens: None,
) -> Evaluation:
    """Decode every example plainly and with the drafter, the two in turns, the first batch once unmeasured.

    Args:
        benchmark: name of the results.
        stop: token ids that end a response.
        advance: told after each batch how many prompts and tokens were done, both texts counted.

    Raises:
        PromptError: if there is no example, or one does not fit the target's context.
        DrafterError: if the drafter does not fit the target.
    """
    if not examples:
        raise PromptError(f"The benchmark {benchmark} holds no prompts: give at least one.")
    encoder = PromptEncoder(tokenizer, settings.thinking, max_tokens=target.max_positions)
    prompts = [encoder.encode(example.messages) for example in examples]
    common = settings.sampling, settings.verification, settings.max_new_tokens, stop
    plain, speculative = Decoder(target, None, *common), Decoder(target, drafter, *common)
    for index, prompt in enumerate(prompts):
        speculative.check(prompt, index)
    results: list[PromptResult] = []
    for number, start in enumerate(range(0, len(prompts), settings.batch_size)):
        batch = prompts[start : start + settings.batch_size]
        if number == 0:
            for decoder in (plain, speculative):
                _timed(decoder, batch, settings.seed)
        timed: dict[Decoder, tuple[list[Decoded], float]] = {}
        for decoder in (plain, speculative) if number % 2 == 0 else (speculative, plain):
            timed[decoder] = _timed(decoder, batch, settings.seed * 1_000_003 + start)
        (without, plain_seconds), (drafted, seconds) = timed[plain], timed[speculative]
        for example, p, s in zip(examples[start : start + len(batch)], without, drafted, strict=True):
            mismatch = compare(target, s.prompt, p.response, s.response) if settings.sampling.greedy else None
            text = str(tokenizer.decode(s.response))
            results.append(_result(example, p, s, text, plain_seconds / len(batch), seconds / len(batch), mismatch))
        advance(len(batch), sum(len(d.response) for d in (*without, *drafted)))
    return Evaluation(benchmark, drafter.block_size, settings, results)


def _timed(decoder: Decoder, batch: list[list[int]], seed: int) -> tuple[list[Decoded], float]:
    """The decoded batch and its seconds. Decoding ends by reading tokens back, so a GPU has nothing left to do."""
    # Plain decoding must not pay for features that only a drafter reads.
    decoder.target.tap(decoder.drafter.target_layer_ids if decoder.drafter else ())
    generator = torch.Generator(decoder.target.device).manual_seed(seed)
    began = time.perf_counter()
    decoded = decoder.decode_batch(batch, generator)
    return decoded, time.perf_counter() - began


def _result(
    example: Example,
    plain: Decoded,
    drafted: Decoded,
    text: str,
    plain_seconds: float,
    seconds: float,
    mismatch: Mismatch | None,
) -> PromptResult:
    return PromptResult(
        id=example.id,
        prompt_tokens=len(drafted.prompt),
        response_tokens=len(drafted.response),
        plain_response_tokens=len(plain.response),
        accepted=drafted.accepted,
        emitted=drafted.emitted,
        finish=drafted.finish,
        solved=example.solved(text),
        plain_seconds=plain_seconds,
        speculative_seconds=seconds,
        mismatch=mismatch,
    )
