"""Which anchors are replayed."""

from __future__ import annotations

import pytest
import torch

from draftopd.rollout.anchors import AnchorPolicy


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def choose(policy: AnchorPolicy, visited: list[int], accepted: list[int], start: int, length: int) -> list[int]:
    return policy.choose(visited, accepted, start, length, generator()).tolist()


def test_visited_anchors_are_taken_as_they_are() -> None:
    assert choose(AnchorPolicy("visited", 10, 3), [4, 7, 9], [2, 1, 1], 4, 12) == [4, 7, 9]


def test_too_many_are_drawn_from() -> None:
    policy, visited = AnchorPolicy("visited", 5, 3), list(range(4, 40))
    chosen = choose(policy, visited, [0] * 36, 4, 50)
    assert len(set(chosen)) == 5 and chosen == sorted(chosen) and set(chosen) <= set(visited)
    assert chosen != policy.choose(visited, [0] * 36, 4, 50, generator(1)).tolist()
    assert choose(AnchorPolicy("visited", None, 3), visited, [0] * 36, 4, 50) == visited


def test_errors_are_the_tokens_before_rejected_proposals() -> None:
    # Blocks of three proposals: one accepted, all accepted, none accepted.
    policy = AnchorPolicy("error", 10, slots=3)
    assert choose(policy, [4, 6, 10], [1, 3, 0], 4, 20) == [5, 10]


def test_a_block_that_the_end_of_the_text_cut_short_has_no_error() -> None:
    # Of the last block two proposals were accepted and the text ended with the second.
    assert choose(AnchorPolicy("error", 10, slots=3), [4, 6], [1, 2], 4, 9) == [5]
    # Here the rejected proposal stood where the last token stands.
    assert choose(AnchorPolicy("error", 10, slots=3), [4, 6], [1, 1], 4, 9) == [5, 7]


def test_random_anchors_cover_the_response_evenly() -> None:
    source = generator()
    counts = torch.zeros(20)
    for _ in range(2000):
        counts[AnchorPolicy("random", 4, 3).choose([], [], 5, 20, source)] += 1
    # Position 19 is the last token: it can begin no block.
    assert counts[:5].sum() == 0 and counts[19] == 0
    expected = 2000 * 4 / 14
    assert ((counts[5:19] - expected).abs() < 5 * expected**0.5).all()


def test_all_positions_whatever_the_limit() -> None:
    assert choose(AnchorPolicy("all", 4, 3), [], [], 5, 20) == list(range(5, 19))


@pytest.mark.parametrize("choice", ["random", "all"])
def test_a_response_of_one_token_has_no_anchor(choice: str) -> None:
    assert choose(AnchorPolicy(choice, 4, 3), [], [], 5, 6) == []


def test_unknown_choice() -> None:
    with pytest.raises(ValueError, match="visited, error, random, all, found 'some'"):
        AnchorPolicy("some", 1, 3)
