"""Fixtures of the evaluation tests: results made by hand, the bundled pair with its tokenizer."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from tests.support.evaluation import EvaluateAll, Pair, gather
from transformers import PreTrainedTokenizerBase

from draftopd.drafters.base import Drafter
from draftopd.drafters.load import load_drafter
from draftopd.evaluation.benchmark import Example, ReasoningBenchmark
from draftopd.evaluation.results import Evaluation, PromptResult
from draftopd.evaluation.runner import evaluate
from draftopd.evaluation.settings import Settings
from draftopd.targets.load import load_tokenizer


@pytest.fixture(scope="session")
def bundled_tokenizer() -> PreTrainedTokenizerBase:
    return load_tokenizer("bundled:tiny_target")


@pytest.fixture(scope="session")
def bundled_drafters(bundled_pair: Pair) -> dict[str, Drafter]:
    """Both bundled drafters, by name."""
    return {"sft": bundled_pair[1], "opd": load_drafter("bundled:tiny_dflash_opd").eval()}


@pytest.fixture
def evaluate_all(bundled_pair: Pair, bundled_tokenizer: PreTrainedTokenizerBase) -> EvaluateAll:
    """Evaluates drafters by name, on the first problems or given examples; keywords go to :class:`Settings`."""
    target, _, _, stop = bundled_pair

    def run(
        drafters: dict[str, Drafter], examples: list[Example] | None = None, **values: object
    ) -> dict[str, Evaluation]:
        settings = Settings(**{"limit": 3, "max_new_tokens": 24} | values)
        if examples is None:
            examples = ReasoningBenchmark().examples(settings.limit)
        batches = evaluate(target, drafters, bundled_tokenizer, "reasoning", examples, stop, settings)
        return gather(batches, drafters, settings, settings.tolerance(target.dtype))

    return run


@pytest.fixture
def evaluate_bundled(bundled_pair: Pair, evaluate_all: EvaluateAll) -> Callable[..., Evaluation]:
    """Evaluates the bundled drafter, or another, on the first problems; keywords go to :class:`Settings`."""

    def run(drafter: Drafter = bundled_pair[1], **values: object) -> Evaluation:
        return evaluate_all({"drafter": drafter}, **values)["drafter"]

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
