"""Warping against a slow reference in float64."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from draftopd.decoding.sampling import Sampling, draw


def reference(logits: list[float], temperature: float, top_k: int, top_p: float) -> list[float]:
    """Temperature, then top-k, then top-p over what top-k left, one token at a time."""
    scaled = [x / temperature for x in logits]
    kept = sorted(range(len(scaled)), key=lambda v: -scaled[v])
    if top_k:
        kept = [v for v in kept if scaled[v] >= scaled[kept[min(top_k, len(kept)) - 1]]]
    weights = {v: math.exp(scaled[v] - max(scaled)) for v in kept}
    total = sum(weights.values())
    if top_p < 1:
        nucleus, mass = [], 0.0
        for v in kept:
            nucleus.append(v)
            mass += weights[v] / total
            if mass >= top_p:
                break
        kept, total = nucleus, sum(weights[v] for v in nucleus)
    return [weights[v] / total if v in kept else 0.0 for v in range(len(scaled))]


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("top_k", [0, 1, 4, 50])
@pytest.mark.parametrize("top_p", [0.05, 0.6, 0.95, 1.0])
def test_probabilities_equal_the_reference(temperature: float, top_k: int, top_p: float) -> None:
    logits = torch.randn(3, 4, 12, generator=torch.Generator().manual_seed(0)) * 2
    found = Sampling(temperature, top_k, top_p).probabilities(logits)
    expected = [[reference(row, temperature, top_k, top_p) for row in block] for block in logits.double().tolist()]
    assert found.dtype == torch.float32
    assert torch.allclose(found.double(), torch.tensor(expected, dtype=torch.float64), atol=1e-6, rtol=0)
    assert torch.equal(found == 0, torch.tensor(expected) == 0)


def test_top_k_keeps_all_tied_with_the_last() -> None:
    probs = Sampling(1.0, top_k=2).probabilities(torch.tensor([3.0, 1.0, 1.0, 1.0, 0.0]))
    weights = torch.tensor([math.e**2, 1.0, 1.0, 1.0, 0.0])
    assert torch.allclose(probs, weights / weights.sum())


def test_top_p_keeps_as_few_tied_as_needed() -> None:
    probs = Sampling(1.0, top_p=0.5).probabilities(torch.zeros(8))
    assert sorted(probs.tolist()) == [0.0] * 4 + [0.25] * 4


def test_top_p_is_never_empty() -> None:
    probs = Sampling(1.0, top_p=1e-6).probabilities(torch.tensor([0.0, 2.0, 1.0]))
    assert probs.tolist() == [0.0, 1.0, 0.0]


def test_half_precision_logits_are_warped_in_float32() -> None:
    logits = torch.randn(6, 40, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert torch.equal(Sampling(0.7).probabilities(logits), (logits.float() / 0.7).softmax(-1))


def test_greedy_is_one_hot_and_chooses_the_same_token() -> None:
    logits = torch.randn(5, 6, 9, generator=torch.Generator().manual_seed(0))
    logits[0, 0] = 1.0  # all tied
    greedy = Sampling()
    probs, tokens = greedy.probabilities(logits), greedy.choose(logits)
    assert greedy.greedy and not Sampling(0.1).greedy
    assert torch.equal(probs.sort(-1).values[..., -2:], torch.tensor([0.0, 1.0]).expand(5, 6, 2))
    assert torch.equal(probs.argmax(-1), tokens)
    assert torch.equal(logits.gather(-1, tokens[..., None])[..., 0], logits.amax(-1))


def test_choose_follows_the_warped_law(chi_square: Callable[[Tensor, Tensor], float]) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(7, generator=generator)
    sampling = Sampling(0.8, top_k=5, top_p=0.9)
    tokens = sampling.choose(logits.expand(100_000, 7), generator)
    assert chi_square(tokens, sampling.probabilities(logits)) > 1e-3
    assert chi_square(tokens, Sampling(0.85, top_k=5, top_p=0.9).probabilities(logits)) < 1e-6


def test_draw_needs_no_normalisation_and_reproduces(chi_square: Callable[[Tensor, Tensor], float]) -> None:
    weights = torch.tensor([0.5, 0.0, 3.0, 1.5])
    rows = weights.expand(200, 300, 4)
    tokens = draw(rows, torch.Generator().manual_seed(1))
    assert tokens.shape == (200, 300)
    assert chi_square(tokens, weights / weights.sum()) > 1e-3
    assert torch.equal(tokens, draw(rows, torch.Generator().manual_seed(1)))
    assert not torch.equal(tokens, draw(rows, torch.Generator().manual_seed(2)))


@pytest.mark.parametrize(
    ("values", "name"),
    [
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": 1e-40}, "temperature"),
        ({"temperature": math.inf}, "temperature"),
        ({"top_k": -1}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.01}, "top_p"),
        ({"top_p": float("nan")}, "top_p"),
    ],
)
def test_bad_values_raise(values: dict[str, float], name: str) -> None:
    with pytest.raises(ValueError, match=name):
        Sampling(**values)
