"""Which anchors are replayed."""

from __future__ import annotations

import pytest
import torch

from draftopd.rollout.anchors import choose_anchors


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_visited_anchors_are_taken_as_they_are() -> None:
    assert choose_anchors("visited", [4, 7, 9], 4, 12, 10, generator()).tolist() == [4, 7, 9]


def test_too_many_are_drawn_from() -> None:
    chosen = choose_anchors("visited", list(range(4, 40)), 4, 50, 5, generator()).tolist()
    assert len(set(chosen)) == 5 and chosen == sorted(chosen) and set(chosen) <= set(range(4, 40))
    assert chosen != choose_anchors("visited", list(range(4, 40)), 4, 50, 5, generator(1)).tolist()


def test_random_anchors_cover_the_response_evenly() -> None:
    source = generator()
    counts = torch.zeros(20)
    for _ in range(2000):
        counts[choose_anchors("random", [], 5, 20, 4, source)] += 1
    # Position 19 is the last token: it can begin no block.
    assert counts[:5].sum() == 0 and counts[19] == 0
    expected = 2000 * 4 / 14
    assert ((counts[5:19] - expected).abs() < 5 * expected**0.5).all()


def test_a_response_of_one_token_has_no_random_anchor() -> None:
    assert choose_anchors("random", [], 5, 6, 4, generator()).tolist() == []


def test_unknown_choice() -> None:
    with pytest.raises(ValueError, match="visited"):
        choose_anchors("all", [], 1, 2, 3, generator())  # type: ignore[arg-type]
