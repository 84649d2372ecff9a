"""Batched speculative decoding and plain decoding.

Every step decodes one block of ``B`` tokens per row (:mod:`draftopd.decoding.step`). Rows may accept different numbers
of proposals: the caches are addressed by position, so accepting proposals only moves a row's anchor.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch

from draftopd.decoding.rules import Rules
from draftopd.decoding.step import compiled_step, decoding_step
from draftopd.distributed import ranks
from draftopd.drafters.base import Drafter
from draftopd.errors import PromptError
from draftopd.targets.target import Target

#: Cache capacities are multiples of this when compiled for a GPU, so that few shapes occur.
CAPACITY_STEP = 512


@dataclass
class Decoded:
    """One decoded sequence.

    For block ``i``, ``anchors[i]`` is the position of the token that began it, ``accepted[i]`` its accepted length,
    ``emitted[i]`` the number of tokens it added and ``proposals[i]`` the K drafted tokens. ``emitted`` is
    ``accepted + 1``, or less where a stop token or the length limit ended the response.
    """

    prompt: list[int]
    response: list[int] = field(default_factory=list)
    anchors: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)
    emitted: list[int] = field(default_factory=list)
    proposals: list[list[int]] = field(default_factory=list)
    finish: str = ""

    @property
    def tokens(self) -> list[int]:
        return self.prompt + self.response

    @property
    def acceptance_length(self) -> float:
        """Emitted tokens per verification; NaN if the first token ended the response."""
        return sum(self.emitted) / len(self.emitted) if self.emitted else float("nan")


class Decoder:
    """Decodes prompts with the target, speculatively if there is a drafter.

    Args:
        target: will be tapped for the drafter (see :meth:`Target.tap`).
        drafter: None decodes one token per target forward.
        rules: how responses are drawn, verified and ended.
        compiled: compile the steps with torch.compile. The first steps take up to a minute, later ones less time than
            without it; logits may differ in the last bits.
    """

    def __init__(self, target: Target, drafter: Drafter | None, rules: Rules = Rules(), compiled: bool = False) -> None:
        self.target, self.drafter, self.rules, self.compiled = target, drafter, rules, compiled
        if drafter is not None:
            drafter.config.check_fits(target.shape)
            target.tap(drafter.target_layer_ids)

    @property
    def block_size(self) -> int:
        return self.drafter.block_size if self.drafter else 1

    def decode(self, prompts: Sequence[list[int]], batch_size: int = 1, seed: int = 0) -> Iterator[list[Decoded]]:
        """Decode in batches of consecutive prompts; yields the results of each batch in the order of its prompts.

        Raises:
            PromptError: if a prompt is empty or does not fit the target's context.
        """
        for index, prompt in enumerate(prompts):
            self.check(prompt, index)
        for start in range(0, len(prompts), batch_size):
            generator = torch.Generator(self.target.device).manual_seed(ranks.mix(seed, start))
            yield self.decode_batch(prompts[start : start + batch_size], generator)

    def check(self, prompt: list[int], index: int = 0) -> None:
        """Refuse an empty prompt or one too long for the target's context.

        Raises:
            PromptError: with the prompt's index and the available length.
        """
        if not prompt:
            raise PromptError(f"Prompt {index} is empty: give it at least one token.")
        limit = self.rules.max_new_tokens
        room = self.target.max_positions - limit - self.block_size
        if len(prompt) > room:
            raise PromptError(
                f"Prompt {index} has {len(prompt)} tokens; with max_new_tokens={limit} the target's "
                f"context of {self.target.max_positions} leaves {max(room, 0)}. Shorten the prompt or max_new_tokens."
            )

    @torch.no_grad()
    def decode_batch(self, prompts: Sequence[list[int]], generator: torch.Generator | None = None) -> list[Decoded]:
        """Decode one batch of prompts that passed :meth:`check`."""
        target, drafter, size = self.target, self.drafter, self.block_size
        device = target.device
        step = compiled_step(device.type == "cuda") if self.compiled else decoding_step
        # CUDA graphs need the same shapes and memory in every step, so the batch and the visible context stay fixed.
        static_shapes = self.compiled and device.type == "cuda"
        results = [Decoded(list(p)) for p in prompts]
        longest = max(len(p) for p in prompts)
        capacity = longest + self.rules.max_new_tokens + size
        if static_shapes:
            capacity = -(-capacity // CAPACITY_STEP) * CAPACITY_STEP
        cache = target.new_cache(capacity)
        ids = torch.zeros(len(prompts), longest, dtype=torch.long, device=device)
        for row, prompt in enumerate(prompts):
            ids[row, : len(prompt)] = torch.tensor(prompt, device=device)
        anchors = torch.tensor([len(p) for p in prompts], device=device)
        reading = target.read(ids, cache)
        last = reading.hidden[torch.arange(len(prompts), device=device), anchors - 1]
        tokens = self.rules.sampling.choose(target.head.logits(last), generator)
        state = None
        if drafter is not None:
            state = drafter.start(capacity)
            positions = torch.arange(longest, device=device).expand(len(prompts), -1)
            drafter.observe(target, state, reading.features, ids, positions)
        if static_shapes:
            for store in (*cache.stores, *(drafter.stores(state) if drafter else ())):
                store.stay()
        for result, token in zip(results, tokens.tolist(), strict=True):
            self._emit(result, [token])
        rows = list(range(len(prompts)))  # indices of the results that the batch's rows belong to
        while True:
            alive = [i for i, row in enumerate(rows) if not results[row].finish]
            if not alive:
                return results
            if len(alive) < len(rows) and not static_shapes:
                keep = torch.tensor(alive, device=device)
                rows, anchors, tokens = [rows[i] for i in alive], anchors[keep], tokens[keep]
                cache.select(keep)
                if drafter is not None:
                    drafter.select(state, keep)
            visible = capacity - size if static_shapes else max(len(results[row].tokens) for row in rows) - 1
            block, accepted, tokens = step(
                target, drafter, self.rules, cache, state, anchors, tokens, visible, generator
            )
            # Only rows that have ended can reach the end of the cache.
            anchors = (anchors + accepted + 1).clamp_max(capacity - size)
            # The only transfer to the host, and the only time it waits, in a step.
            for row, (*drafted, n, token) in zip(
                rows, torch.cat([block[:, 1:], accepted[:, None], tokens[:, None]], 1).tolist(), strict=True
            ):
                result = results[row]
                if not result.finish:
                    result.anchors.append(len(result.tokens) - 1)
                    emitted = self._emit(result, [*drafted[:n], token])
                    result.accepted.append(min(n, emitted))
                    result.emitted.append(emitted)
                    result.proposals.append(drafted)

    def _emit(self, result: Decoded, tokens: list[int]) -> int:
        """Append tokens up to a stop token or the length limit; returns the number of appended tokens."""
        room = self.rules.max_new_tokens - len(result.response)
        kept = tokens[:room]
        stopped = next((i for i, token in enumerate(kept) if token in self.rules.stop), None)
        if stopped is not None:
            kept = kept[: stopped + 1]
        result.response += kept
        if stopped is not None:
            result.finish = "stop"
        elif len(result.response) >= self.rules.max_new_tokens:
            result.finish = "length"
        return len(kept)
