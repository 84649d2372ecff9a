"""A text of the target, and a refresh's request for texts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from draftopd.decoding.rules import Rules
from draftopd.drafters.base import Drafter
from draftopd.targets.target import Target


class Trajectory(NamedTuple):
    """Token ids of one prompt and of the target's response, its stop token included."""

    prompt: list[int]
    response: list[int]

    @classmethod
    def ended(cls, prompt: list[int], response: list[int], request: Request) -> Trajectory:
        """The text up to the response's first stop token or the response limit."""
        end = next((i for i, token in enumerate(response) if token in request.rules.stop), len(response) - 1) + 1
        return cls(prompt, response[: min(end, request.rules.max_new_tokens)])


@dataclass(frozen=True)
class Request:
    """A refresh's request for the texts of a range of prompts.

    Args:
        target, drafter, tokenizer: in their current state; drafter is None where none exists yet.
        prompts: returns the prompts as token ids.
        indices: the range in the endless stream of prompts; in distributed runs each rank requests its shard.
        rules: how responses are drawn, verified and ended.
        max_prompt_tokens: longer prompts are left out.
        seed: seed of the draws.
        progress: called with the numbers of texts and tokens that were produced.
    """

    target: Target
    drafter: Drafter | None
    tokenizer: PreTrainedTokenizerBase
    prompts: Callable[[], list[list[int]]]
    indices: range
    rules: Rules
    max_prompt_tokens: int
    seed: int
    progress: Callable[[int, int], None] = lambda texts, tokens: None
