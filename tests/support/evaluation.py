"""Types and helpers of the evaluation's tests."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from draftopd.drafters.base import Drafter
from draftopd.drafters.dflash import DFlashDrafter
from draftopd.evaluation.results import Evaluation
from draftopd.evaluation.runner import ExampleResults
from draftopd.evaluation.settings import Settings
from draftopd.targets.target import Target

Pair = tuple[Target, DFlashDrafter, list[list[int]], frozenset[int]]


EvaluateAll = Callable[..., dict[str, Evaluation]]


def gather(
    batches: Iterable[Sequence[ExampleResults]], drafters: dict[str, Drafter], settings: Settings, tolerance: float
) -> dict[str, Evaluation]:
    """By drafter, what :func:`evaluate` gave batch by batch."""
    done = [example for batch in batches for example in batch]
    return {
        name: Evaluation(
            "reasoning", drafter.block_size, settings, [turn for example in done for turn in example[name]], name,
            tolerance,
        )
        for name, drafter in drafters.items()
    }  # fmt: skip
