"""The target's distribution as a loss sees it, and its comparison with the drafter slot by slot."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from draftopd.decoding.sampling import MIN_TEMPERATURE
from draftopd.losses.chunked import SlotFunction, per_slot
from draftopd.losses.divergence import keep_top_k
from draftopd.replay.blocks import Blocks, Scope

#: The text that the target scores: the drafter's own tokens, or the recorded ones as in SFT, which saves a pass of the
#: target.
ScoredOn = Literal["proposals", "recorded"]

#: The log-probability of a token that the target excludes (a logit of -inf). It keeps ``0 log 0`` at 0, and the reverse
#: KL finite if the drafter proposes the token. Logits within 1e4 of one another stay above it at temperature 0.01.
MIN_LOG_P = -1e6


class TargetView:
    """The target's distribution as a loss sees it.

    Args:
        temperature: the target's logits are divided by it. 1 is the target's own distribution; towards 0 it approaches
            the argmax, which decoding at temperature 0 accepts.
        top_k: keep only the target's ``k`` most likely tokens and spread the remaining mass evenly over the others, as
            for an engine that returns only ``k``; None keeps the whole distribution.
        scored_on: see :data:`ScoredOn`.

    Raises:
        ValueError: if a number lies outside its range or ``scored_on`` is unknown.
    """

    def __init__(
        self, *, temperature: float = 1.0, top_k: int | None = None, scored_on: ScoredOn = "proposals"
    ) -> None:
        if not MIN_TEMPERATURE <= temperature < float("inf"):
            raise ValueError(f"target_temperature must be {MIN_TEMPERATURE:g} or more, found {temperature}.")
        if top_k is not None and top_k < 1:
            raise ValueError(f"target_top_k must be 1 or more, or null, found {top_k}.")
        if scored_on not in get_args(ScoredOn):
            raise ValueError(f"scored_on must be 'proposals' or 'recorded', found {scored_on!r}.")
        self.temperature, self.top_k, self.scored_on = temperature, top_k, scored_on

    def scope(self, needed: Scope) -> Scope:
        """The scope of a loss that needs ``needed`` when the target scores the drafter's own tokens."""
        return "recorded" if self.scored_on == "recorded" else needed

    def compare(
        self, fn: SlotFunction, blocks: Blocks, used: Tensor, *extras: Tensor, renormalize: bool = True
    ) -> Tensor:
        """``fn(draft_logits, log_p, *extras)`` at the slots where ``used [N, K]`` is True: ``[n]``.

        ``log_p`` are the target's log-probabilities of the tokens that the drafter's head has.

        Args:
            extras: ``[N, K]`` each, passed on slot by slot.
            renormalize: renormalise the target's distribution over a smaller draft vocabulary.

        Raises:
            ValueError: if the blocks carry none of the target's states.
        """
        head = blocks.head

        def with_target(draft_logits: Tensor, states: Tensor, *more: Tensor) -> Tensor:
            with torch.no_grad():
                log_p = self._log_probs(blocks, states)
                if self.top_k is not None:
                    log_p, _ = keep_top_k(log_p, self.top_k)
                kept = head.restrict(log_p)
                if renormalize and kept.shape != log_p.shape:
                    kept = kept.log_softmax(-1)
            return fn(draft_logits, kept, *more)

        states = _target_states(blocks)[used]
        return per_slot(with_target, blocks.draft_states[used], head, states, *(extra[used] for extra in extras))

    @torch.no_grad()
    def report(self, blocks: Blocks) -> dict[str, Tensor]:
        """The mean mass outside ``top_k`` over the valid slots; it costs one more pass of the head."""
        if self.top_k is None:
            return {}
        head, states = blocks.target_head or blocks.head, _target_states(blocks)[blocks.valid]
        parts = [keep_top_k(self._log_probs(blocks, part), self.top_k)[1] for (part,) in head.chunks(states)]
        outside = torch.cat(parts)
        return {"target_mass_outside_top_k": outside.sum() / max(1, len(outside))}

    def _log_probs(self, blocks: Blocks, states: Tensor) -> Tensor:
        logits = blocks.target_logits(states)
        if self.temperature != 1:
            logits = logits / self.temperature
        return logits.log_softmax(-1).clamp_(min=MIN_LOG_P)


def _target_states(blocks: Blocks) -> Tensor:
    if blocks.target_states is None:
        raise ValueError("This loss distils from the target, but the blocks carry none of the target's states.")
    return blocks.target_states
