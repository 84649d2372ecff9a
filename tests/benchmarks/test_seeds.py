"""Intervals over prompts and seeds."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.studies.seeds import Tested, gain, tau


def runs(means: list[float], prompts: int, spread: float, seed: int) -> list[Tested]:
    """Runs whose tau is about ``means``; prompts differ by ``spread``, alike in every run."""
    draws = np.random.default_rng(seed)
    ease = draws.normal(0, spread, prompts)
    return [{str(p): list(draws.poisson(max(0.1, mean + ease[p]), 20)) for p in range(prompts)} for mean in means]


def test_values_are_means_of_micro_tau() -> None:
    first: list[Tested] = [{"a": [2, 4], "b": [3]}, {"a": [4], "b": [5, 6]}]
    control: list[Tested] = [{"a": [1], "b": [3]}]
    assert tau(first).value == pytest.approx((9 / 3 + 15 / 3) / 2)
    assert gain(first, control).value == pytest.approx(4 / 2 - 1)


def test_what_prompts_share_does_not_widen_a_gain() -> None:
    """Drawn with the same prompts, two recipes differ by far less than either varies."""
    first, control = runs([4.4] * 3, 100, 1.0, seed=0), runs([4.0] * 3, 100, 1.0, seed=0)
    found, alone = gain(first, control), tau(first)
    assert found.low > 0 and found.high - found.low < (alone.high - alone.low) / alone.value


def test_seeds_that_disagree_widen_it() -> None:
    same, apart = (gain(runs(m, 100, 0.1, 0), runs([4.0] * 3, 100, 0.1, 1)) for m in ([4.4] * 3, [3.9, 4.4, 4.9]))
    assert same.excludes_zero and not apart.excludes_zero


def test_covers_the_truth() -> None:
    """Of many experiments with runs alike, about 95 % of the intervals hold the true tau."""
    held = 0
    for seed in range(40):
        found = tau([*runs([4.0], 60, 0.5, seed)], seed)
        held += found.low <= 4.0 <= found.high
    assert held >= 34  # fewer has a chance below 0.5 % at 95 %


def test_other_prompts_are_refused() -> None:
    with pytest.raises(ValueError, match=r"same data\.test_count"):
        gain([{"a": [1]}], [{"b": [1]}])
    with pytest.raises(ValueError, match="without a test"):
        tau([{}])
    with pytest.raises(ValueError, match="at least one run"):
        gain([{"a": [1]}], [])
