"""Fixtures of the evaluation tests: results made by hand, the bundled pair with its tokenizer."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from transformers import PreTrainedTokenizerBase

from draftopd.drafters.dflash import DFlashDrafter
from draftopd.evaluation.benchmark import ReasoningBenchmark
from draftopd.evaluation.runner import Evaluation, PromptResult, evaluate
from draftopd.evaluation.settings import Settings
from draftopd.targets.target import Target, load_tokenizer


@pytest.fixture(scope="session")
def bundled_tokenizer() -> PreTrainedTokenizerBase:
    return load_tokenizer("bundled:tiny_target")


@pytest.fixture
def evaluate_bundled(
    bundled_pair: tuple[Target, DFlashDrafter, list[list[int]], frozenset[int]],
    bundled_tokenizer: PreTrainedTokenizerBase,
) -> Callable[..., Evaluation]:
    """Evaluates the bundled drafter, or another, on the first problems; keywords go to :class:`Settings`."""
    target, bundled, _, stop = bundled_pair

    def run(drafter: DFlashDrafter = bundled, **values) -> Evaluation:
        settings = Settings(**{"limit": 3, "max_new_tokens": 24} | values)
        examples = ReasoningBenchmark().examples(settings.limit)
        return evaluate(target, drafter, bundled_tokenizer, "reasoning", examples, stop, settings)

    return run


@pytest.fixture
def make_result() -> Callable[..., PromptResult]:
    """One prompt's figures, by default two blocks of which the end of the text cut the second short."""

    def make(number: int = 0, **changes) -> PromptResult:
        figures = {
            "id": f"test-{number}", "prompt_tokens": 10, "response_tokens": 6, "plain_response_tokens": 6,
            "accepted": [2, 2], "emitted": [3, 2], "finish": "stop", "solved": True,
            "plain_seconds": 3.0, "speculative_seconds": 1.0, "mismatch": None,
        }  # fmt: skip
        return PromptResult(**figures | changes)

    return make
