"""Decode a benchmark with and without the drafter, by one engine, and compare."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

from draftopd.data.prompts import PromptEncoder
from draftopd.decoding.generate import Decoded, Decoder
from draftopd.decoding.sampling import Sampling
from draftopd.decoding.verify import Verification
from draftopd.drafters.base import Drafter
from draftopd.evaluation.benchmark import Benchmark, Example
from draftopd.evaluation.lossless import Mismatch, compare
from draftopd.metrics.acceptance_length import acceptance_length
from draftopd.metrics.positions import AcceptanceByPosition, RejectionPosition
from draftopd.targets.target import Target


@dataclass(frozen=True)
class PromptResult:
    """One prompt's figures; ``seconds`` are its batch's, shared evenly among the batch."""

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
    """A benchmark's figures for one drafter.

    ``checked`` says whether token equality with plain decoding was to be expected (temperature 0).
    """

    benchmark: str
    block_size: int
    batch_size: int
    sampling: Sampling
    checked: bool
    prompts: list[PromptResult]

    @property
    def tau(self) -> tuple[float, float]:
        """Micro and macro acceptance length."""
        return acceptance_length([p.emitted for p in self.prompts])

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
        return None if self.mismatches else self.speculative_rate / self.plain_rate

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
        """See :class:`AcceptanceByPosition`."""
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
    benchmark: Benchmark,
    stop: frozenset[int],
    sampling: Sampling = Sampling(),
    verification: Verification = "rejection_sampling",
    max_new_tokens: int = 256,
    batch_size: int = 1,
    limit: int | None = None,
    thinking: bool = True,
    seed: int = 0,
    advance: Callable[[int, int], None] = lambda prompts, tokens: None,
) -> Evaluation:
    """Decode every prompt plainly and with the drafter, the two in turns, the first batch once unmeasured.

    Args:
        limit: at most so many prompts.
        advance: told after each batch how many prompts and tokens were done.

    Raises:
        PromptError: if a prompt does not fit the target's context.
        DrafterError: if the drafter does not fit the target.
    """
    encoder = PromptEncoder(tokenizer, thinking, max_tokens=target.max_positions)
    examples = benchmark.examples(limit)
    prompts = [encoder.encode(example.messages) for example in examples]
    speculative = Decoder(target, drafter, sampling, verification, max_new_tokens, stop)
    plain = Decoder(target, None, sampling, verification, max_new_tokens, stop)
    for index, prompt in enumerate(prompts):
        speculative.check(prompt, index)
    results: list[PromptResult] = []
    for number, start in enumerate(range(0, len(prompts), batch_size)):
        batch = prompts[start : start + batch_size]
        pair = [plain, speculative]
        if number == 0:
            for decoder in pair:
                decoder.decode_batch(batch, _generator(target, seed, start))
        timed: dict[bool, tuple[list[Decoded], float]] = {}
        for decoder in pair if number % 2 == 0 else reversed(pair):
            began = time.perf_counter()
            decoded = decoder.decode_batch(batch, _generator(target, seed, start))
            timed[decoder is plain] = decoded, (time.perf_counter() - began) / len(batch)
        (without, plain_seconds), (drafted, seconds) = timed[True], timed[False]
        for example, p, s in zip(examples[start : start + batch_size], without, drafted, strict=True):
            mismatch = compare(target, s.prompt, p.response, s.response) if sampling.greedy else None
            results.append(_result(example, p, s, str(tokenizer.decode(s.response)), plain_seconds, seconds, mismatch))
        advance(len(batch), sum(len(d.response) for d in drafted))
    return Evaluation(benchmark.name, drafter.block_size, batch_size, sampling, sampling.greedy, results)


def _generator(target: Target, seed: int, start: int) -> torch.Generator:
    return torch.Generator(target.device).manual_seed(seed * 1_000_003 + start)


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
