"""One recorded text, and what a refresh asks for."""

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
        """The text up to the response's first stop token, or the limit."""
        end = next((i for i, token in enumerate(response) if token in request.rules.stop), len(response) - 1) + 1
        return cls(prompt, response[: min(end, request.rules.max_new_tokens)])


@dataclass(frozen=True)
class Request:
    """What a refresh asks for: the texts of one stretch of prompts.

    Args:
        target, drafter, tokenizer: as they are now; no drafter before there is one.
        prompts: gives the stretch's prompts as token ids.
        places: the stretch in the endless stream of prompts; in distributed runs each rank asks for its share.
        rules: how responses are drawn, verified and ended.
        max_prompt_tokens: longer prompts are left out.
        seed: of the draws.
        progress: told how many texts and tokens were produced.
    """

    target: Target
    drafter: Drafter | None
    tokenizer: PreTrainedTokenizerBase
    prompts: Callable[[], list[list[int]]]
    places: range
    rules: Rules
    max_prompt_tokens: int
    seed: int
    progress: Callable[[int, int], None] = lambda texts, tokens: None
