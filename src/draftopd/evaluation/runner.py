"""Decode a benchmark plainly and with each drafter by the same engine, in turns."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import groupby

import torch
from transformers import PreTrainedTokenizerBase

from draftopd.data.prompts import Messages, PromptEncoder
from draftopd.decoding.draft_text import blocks_of
from draftopd.decoding.generate import Decoded, Decoder
from draftopd.decoding.sampling import Sampling
from draftopd.distributed import ranks
from draftopd.drafters.base import Drafter
from draftopd.errors import PromptError
from draftopd.evaluation.benchmark import Example
from draftopd.evaluation.lossless import compare, features
from draftopd.evaluation.results import PromptResult
from draftopd.evaluation.settings import Settings
from draftopd.metrics.entropy_acceptance import EntropyAcceptance
from draftopd.targets.target import Target

#: One example's results by drafter, one per turn of the conversation.
ExampleResults = dict[str, list[PromptResult]]

#: Called with the numbers of examples and tokens that are done.
Advance = Callable[[int, int], None]


def evaluate(
    target: Target,
    drafters: Mapping[str, Drafter],
    tokenizer: PreTrainedTokenizerBase,
    benchmark: str,
    examples: Sequence[Example],
    stop: frozenset[int],
    settings: Settings,
    advance: Advance = lambda examples, tokens: None,
    shown: Collection[str] | None = None,
) -> Iterator[list[ExampleResults]]:
    """Decode every example plainly and with each drafter, batch by batch.

    The decoders take turns, and each batch starts with the next one; the first batch is decoded once unmeasured as a
    warm-up. Later turns of a conversation follow the plain answers for all decoders.

    Args:
        benchmark: name of the results.
        stop: token ids that end a response.
        advance: called after each batch with its numbers of examples and of tokens in all texts.
        shown: ids of the examples whose drafts are kept; None: the first ``settings.shown``.

    Raises:
        PromptError: if there are no examples, or one does not fit the target's context.
        DrafterError: if a drafter does not fit the target.
    """
    if not examples:
        raise PromptError(f"The benchmark {benchmark} holds no prompts: give at least one.")
    run = _Run(target, drafters, tokenizer, stop, settings)
    for index, example in enumerate(examples):
        run.check(run.encoder.encode(example.messages), index)
    if shown is None:
        shown = {example.id for example in examples[: settings.shown]}
    return run.batches(examples, shown, advance)


class _Run:
    def __init__(
        self,
        target: Target,
        drafters: Mapping[str, Drafter],
        tokenizer: PreTrainedTokenizerBase,
        stop: frozenset[int],
        settings: Settings,
    ) -> None:
        self.target, self.tokenizer, self.settings = target, tokenizer, settings
        self.encoder = PromptEncoder(tokenizer, settings.thinking, max_tokens=target.max_positions)
        common = settings.rules(stop), settings.compiled
        self.plain = Decoder(target, None, *common)
        self.drafted = {name: Decoder(target, drafter, *common) for name, drafter in drafters.items()}
        self.decoders = [self.plain, *self.drafted.values()]
        self.batches_done = 0

    def batches(
        self, examples: Sequence[Example], shown: Collection[str], advance: Advance
    ) -> Iterator[list[ExampleResults]]:
        for _, alike in groupby(examples, key=lambda example: len(example.follow_ups)):
            same_turns = list(alike)
            for start in range(0, len(same_turns), self.settings.batch_size):
                batch = same_turns[start : start + self.settings.batch_size]
                results, tokens = self._batch(batch, shown)
                advance(len(batch), tokens)
                yield results

    def _batch(self, batch: list[Example], shown: Collection[str]) -> tuple[list[ExampleResults], int]:
        """The results and number of tokens of a batch, whose examples all have the same number of turns."""
        conversations: list[Messages] = [list(example.messages) for example in batch]
        results: list[ExampleResults] = [{name: [] for name in self.drafted} for _ in batch]
        tokens = 0
        for turn in range(len(batch[0].follow_ups) + 1):
            prompts = [self.encoder.encode(messages) for messages in conversations]
            for index, prompt in enumerate(prompts):
                self.check(prompt, index)
            timed = self._in_turns(prompts)
            plain, plain_seconds = timed[self.plain]
            self.target.tap(())
            seen = [_Text(self.target, self.settings.sampling, d) for d in plain]
            for name, decoder in self.drafted.items():
                drafted, seconds = timed[decoder]
                for i, example in enumerate(batch):
                    per_example = plain_seconds / len(batch), seconds / len(batch)
                    found = replace(self._result(example, turn, seen[i], drafted[i], *per_example), batch=batch[0].id)
                    if example.id in shown:
                        question = conversations[i][-1]["content"]
                        found = replace(found, question=question, drafts=blocks_of(drafted[i], self.tokenizer))
                    results[i][name].append(found)
            tokens += sum(len(d.response) for decoded, _ in timed.values() for d in decoded)
            if turn < len(batch[0].follow_ups):
                for example, messages, decoded in zip(batch, conversations, plain, strict=True):
                    answer = str(self.tokenizer.decode(decoded.response, skip_special_tokens=True))
                    messages += [
                        {"role": "assistant", "content": answer},
                        {"role": "user", "content": example.follow_ups[turn]},
                    ]
        return results, tokens

    def _in_turns(self, prompts: list[list[int]]) -> dict[Decoder, tuple[list[Decoded], float]]:
        """Every decoder's texts and seconds; each batch starts with the next decoder."""
        seed = ranks.mix(self.settings.seed, self.batches_done)
        if self.batches_done == 0:
            for decoder in self.decoders:
                self._timed(decoder, prompts, seed)
        first = self.batches_done % len(self.decoders)
        self.batches_done += 1
        order = self.decoders[first:] + self.decoders[:first]
        # Each decoder has its own seed: above temperature 0, equal draws would make their texts dependent.
        seeds = {decoder: seed * 101 + number for number, decoder in enumerate(self.decoders)}
        return {decoder: self._timed(decoder, prompts, seeds[decoder]) for decoder in order}

    def _timed(self, decoder: Decoder, batch: list[list[int]], seed: int) -> tuple[list[Decoded], float]:
        """The decoded batch and its seconds; decoding reads the tokens back, so that a GPU has finished by then."""
        # Plain decoding must not spend time on features that only a drafter reads.
        self.target.tap(decoder.drafter.target_layer_ids if decoder.drafter else ())
        generator = torch.Generator(self.target.device).manual_seed(seed % 2**63)
        began = time.perf_counter()
        decoded = decoder.decode_batch(batch, generator)
        return decoded, time.perf_counter() - began

    def check(self, prompt: list[int], index: int) -> None:
        for decoder in self.decoders:
            decoder.check(prompt, index)

    def _result(
        self, example: Example, turn: int, plain: _Text, drafted: Decoded, plain_seconds: float, seconds: float
    ) -> PromptResult:
        greedy = self.settings.sampling.greedy
        same = plain.decoded.response == drafted.response
        text = plain if same else _Text(self.target, self.settings.sampling, drafted)
        tested, accepted = text.by_entropy(drafted)
        last = turn == len(example.follow_ups)
        return PromptResult(
            id=example.id,
            prompt_tokens=len(drafted.prompt),
            response_tokens=len(drafted.response),
            plain_response_tokens=len(plain.decoded.response),
            accepted=drafted.accepted,
            emitted=drafted.emitted,
            finish=drafted.finish,
            solved=example.solved(str(self.tokenizer.decode(drafted.response))) if last else None,
            plain_seconds=plain_seconds,
            speculative_seconds=seconds,
            mismatch=compare(self.target, drafted.prompt, plain.decoded.response, drafted.response) if greedy else None,
            turn=turn,
            entropy_tested=tested,
            entropy_accepted=accepted,
            plain_features=[] if greedy else plain.features,
            features=[] if greedy else text.features,
        )


class _Text:
    """The target's entropies and features of a text, read again outside the measured time."""

    def __init__(self, target: Target, sampling: Sampling, decoded: Decoded) -> None:
        self.decoded = decoded
        ids = torch.tensor([decoded.tokens], device=target.device)
        states = target.read(ids, target.new_cache(ids.shape[1])).hidden[0, len(decoded.prompt) - 1 : -1]
        response = ids[0, len(decoded.prompt) :]
        temperature = sampling.temperature or 1.0
        entropies, log_probs = [], []
        for part, tokens in target.head.chunks(states, response):
            log_p = (target.head.logits(part) / temperature).log_softmax(-1)
            entropies.append(-(log_p.exp() * log_p).sum(-1))
            log_probs.append(log_p.gather(-1, tokens[:, None])[:, 0])
        #: ``[n]`` nats at each response token, at the sampling temperature.
        self.entropies = torch.cat(entropies).cpu()
        self.features = features(decoded.response, torch.cat(log_probs).cpu(), self.entropies)

    def by_entropy(self, drafted: Decoded) -> tuple[list[int], list[int]]:
        """Tested and accepted slots by the target's entropy: a tested slot's prefix is part of the text."""
        metric = EntropyAcceptance()
        slots = len(drafted.proposals[0]) if drafted.proposals else 0
        anchors = torch.tensor(drafted.anchors, dtype=torch.long)
        positions = anchors[:, None] - len(drafted.prompt) + 1 + torch.arange(slots)
        inside = positions < len(self.entropies)
        entropy = self.entropies[positions.clamp_max(len(self.entropies) - 1)]
        metric.update(entropy, torch.tensor(drafted.accepted, dtype=torch.long), inside)
        return metric.tested.tolist(), metric.accepted.tolist()
