"""Requests for texts of the small target."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tests.support.models import MakeRequest
from transformers import PreTrainedTokenizerFast

from draftopd.decoding.rules import Rules
from draftopd.drafters.dflash import DFlashDrafter
from draftopd.rollout.request import Request
from draftopd.targets.target import Target


@pytest.fixture
def make_request(
    target: Target, make_drafter: Callable[..., DFlashDrafter], tokenizer: PreTrainedTokenizerFast
) -> MakeRequest:
    """``(prompts, **changes) -> Request``; without prompts, twelve short random ones."""
    drafter = make_drafter(target, block_size=4)
    target.tap(drafter.target_layer_ids)

    def make(prompts: list[list[int]] | None = None, **changes: object) -> Request:
        generator = torch.Generator().manual_seed(1)
        drawn = [torch.randint(0, 60, (4 + i % 5,), generator=generator).tolist() for i in range(12)]
        asked = drawn if prompts is None else prompts
        options = {
            "target": target, "drafter": drafter, "tokenizer": tokenizer, "prompts": lambda: asked,
            "indices": range(len(asked)), "max_prompt_tokens": 64, "seed": 0,
        }  # fmt: skip
        rules = {"stop": frozenset({3, 11}), "max_new_tokens": 20}
        rules |= {name: changes.pop(name) for name in ("sampling", "stop", "max_new_tokens") if name in changes}
        return Request(**options | changes, rules=Rules(**rules))

    return make
