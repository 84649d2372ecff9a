"""The first difference between two texts, and the target's logit gap there."""

from __future__ import annotations

import pytest
import torch

from draftopd.evaluation.lossless import Mismatch, compare
from draftopd.targets.target import Target

PROMPT = [5, 9, 3]


def logits(target: Target, tokens: list[int]) -> torch.Tensor:
    """The model's own forward over the whole prefix, without the engine's cache."""
    return target.model(torch.tensor([tokens])).logits[0, -1]


def test_equal_texts(target: Target) -> None:
    assert compare(target, PROMPT, [1, 2, 3], [1, 2, 3]) is None
    assert compare(target, PROMPT, [], []) is None


@pytest.mark.parametrize("shared", [[], [7], [7, 8, 2]])
def test_position_and_gap(target: Target, shared: list[int]) -> None:
    plain, other = [*shared, 11, 4], [*shared, 30, 4]
    found = compare(target, PROMPT, plain, other)
    assert found is not None
    assert (found.position, found.plain_token, found.speculative_token) == (len(shared), 11, 30)
    reference = logits(target, PROMPT + shared)
    assert found.logit_gap == pytest.approx(float(reference[11] - reference[30]), abs=1e-4)
    # Seen from the other text the gap is the opposite.
    back = compare(target, PROMPT, other, plain)
    assert back is not None and back.logit_gap == pytest.approx(-found.logit_gap, abs=1e-5)


def test_the_greedy_token_stands_above_any_other(target: Target) -> None:
    best = int(logits(target, PROMPT).argmax())
    found = compare(target, PROMPT, [best], [(best + 1) % target.vocab_size])
    assert found is not None and found.logit_gap is not None and found.logit_gap > 0


def test_one_text_ends_earlier(target: Target) -> None:
    assert compare(target, PROMPT, [1, 2, 3], [1, 2]) == Mismatch(2, 3, None, None)
    assert compare(target, PROMPT, [1], [1, 2]) == Mismatch(1, None, 2, None)
    assert compare(target, PROMPT, [], [4]) == Mismatch(0, None, 4, None)
