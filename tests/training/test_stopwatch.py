"""The count of floating-point operations."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from draftopd.training.stopwatch import Stopwatch

#: Sequences, heads, tokens, head size.
N, H, T, D = 2, 4, 16, 8


def test_matrices_and_attention_by_section() -> None:
    clock = Stopwatch(counts=True)
    weight = torch.randn(D, 5, requires_grad=True)
    with clock("linear"):
        value = torch.randn(3, D) @ weight
    with clock("back"):
        value.sum().backward()
    assert clock.operations == {"linear": 2 * 3 * D * 5, "back": 2 * 3 * D * 5}


@pytest.mark.parametrize("heads", [H, H // 2])  # of keys and values; fewer are shared by several
def test_attention_counts_scores_and_values(heads: int) -> None:
    clock = Stopwatch(counts=True)
    query = torch.randn(N, H, T, D)
    key = torch.randn(N, heads, T, D)
    with clock("attention"):
        F.scaled_dot_product_attention(query, key, key, enable_gqa=heads < H)
    assert clock.operations["attention"] == 2 * N * H * 2 * T * T * D


def test_attention_backward_counts_the_scores_anew_and_four_gradients() -> None:
    clock = Stopwatch(counts=True)
    query, key, value = (torch.randn(N, H, T, D, requires_grad=True) for _ in range(3))
    found = F.scaled_dot_product_attention(query, key, value)
    with clock("back"):
        found.sum().backward()
    assert clock.operations["back"] == 5 * N * H * 2 * T * T * D


def test_nothing_is_counted_unasked() -> None:
    clock = Stopwatch()
    with clock("linear"):
        torch.randn(2, 3) @ torch.randn(3, 2)
    assert not clock.operations and clock.seconds["linear"] > 0
