"""Intervals: against slow resampling, the normal distribution, and their promise to hold the truth."""

from __future__ import annotations

import math
import random
import statistics

import numpy as np
import pytest

from draftopd.evaluation.statistics import Interval, bootstrap, difference, sentence

Parts = list[tuple[float, float]]


def figure(parts: Parts, median: bool) -> float:
    if median:
        return statistics.median(a / b for a, b in parts)
    return sum(a for a, _ in parts) / sum(b for _, b in parts)


def resampled(
    first: Parts, second: Parts | None, groups: list[str], median: bool = False, draws: int = 4000
) -> tuple[float, float]:
    """The percentile interval, one draw after the other."""
    names = sorted(set(groups))
    rng, found = random.Random(1), []
    for _ in range(draws):
        chosen = [place for name in rng.choices(names, k=len(names)) for place, g in enumerate(groups) if g == name]
        value = figure([first[i] for i in chosen], median)
        found.append(value - figure([second[i] for i in chosen], median) if second is not None else value)
    found.sort()
    return found[round(0.025 * draws)], found[round(0.975 * draws)]


def data(count: int, seed: int, shift: float = 0.0) -> Parts:
    """Tokens and verifications, of more or less long texts."""
    rng = np.random.default_rng(seed)
    blocks = rng.integers(3, 40, count)
    return [(float(n * (2.5 + shift + 0.6 * rng.standard_normal())), float(n)) for n in blocks]


@pytest.mark.parametrize("median", [False, True])
@pytest.mark.parametrize("turns", [1, 2])
def test_interval_against_slow_resampling(median: bool, turns: int) -> None:
    parts = data(24, seed=3)
    groups = [str(i // turns) for i in range(24)]
    found = bootstrap(parts, groups, median)
    low, high = resampled(parts, None, groups, median)
    assert found.value == pytest.approx(figure(parts, median))
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.15 * (high - low))


@pytest.mark.parametrize("median", [False, True])
def test_difference_against_slow_resampling(median: bool) -> None:
    first, second = data(30, seed=4), data(30, seed=5, shift=0.2)
    groups = [str(i // 2) for i in range(30)]
    found = difference(second, first, groups, median)
    low, high = resampled(second, first, groups, median)
    assert found.value == pytest.approx(figure(second, median) - figure(first, median))
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.15 * (high - low))


def test_a_ratio_of_many_prompts_has_the_normal_laws_interval() -> None:
    """By the delta method: the ratio's error is the mean of ``a - ratio * b`` over the mean of ``b``."""
    parts = np.array(data(2000, seed=6))
    ratio = parts[:, 0].sum() / parts[:, 1].sum()
    error = np.std(parts[:, 0] - ratio * parts[:, 1]) / parts[:, 1].mean() / math.sqrt(len(parts))
    found = bootstrap([tuple(p) for p in parts.tolist()], range(2000))
    assert found.value == pytest.approx(ratio)
    assert (found.low - ratio) / error == pytest.approx(-1.96, abs=0.08)
    assert (found.high - ratio) / error == pytest.approx(1.96, abs=0.08)


@pytest.mark.slow
@pytest.mark.parametrize("what", ["ratio", "median", "difference"])
def test_intervals_hold_the_truth_as_often_as_they_say(what: str) -> None:
    held, tries = 0, 300
    for seed in range(tries):
        rng = np.random.default_rng(seed)
        blocks = rng.integers(5, 30, 60)
        each = blocks * (3 + 0.5 * rng.standard_normal(60))
        parts = list(zip(each.tolist(), blocks.astype(float).tolist(), strict=True))
        if what == "difference":
            other = blocks * (each / blocks - 0.3 + 0.2 * rng.standard_normal(60))
            pairs = list(zip(other.tolist(), blocks.astype(float).tolist(), strict=True))
            found, truth = difference(parts, pairs, range(60)), 0.3
        else:
            found, truth = bootstrap(parts, range(60), median=what == "median"), 3.0
        held += found.low <= truth <= found.high
    assert 0.90 <= held / tries <= 0.99


def test_turns_of_an_example_are_drawn_together() -> None:
    """Ten times the same prompt tells no more than one of it."""
    few = data(20, seed=7)
    many = [part for part in few for _ in range(10)]
    once = bootstrap(few, range(20))
    together = bootstrap(many, [i // 10 for i in range(200)])
    apart = bootstrap(many, range(200))
    assert together == pytest.approx(once)
    assert (apart.high - apart.low) * 2.5 < together.high - together.low


def test_pairing_matters() -> None:
    """Drafters that agree on which prompts are hard are told apart where unpaired intervals overlap."""
    first = data(40, seed=8)
    second = [(a + 0.1 * b, b) for a, b in first]
    found = difference(second, first, range(40))
    assert found == pytest.approx((0.1, 0.1, 0.1)) and found.excludes_zero
    assert bootstrap(first, range(40)).high > bootstrap(second, range(40)).low


def test_the_order_of_prompts_does_not_matter() -> None:
    parts, groups = data(12, seed=9), [f"g{i % 4}" for i in range(12)]
    for median in (False, True):
        value = bootstrap(parts, groups, median).value
        assert bootstrap(parts[::-1], groups[::-1], median).value == pytest.approx(value)


@pytest.mark.parametrize("values", [[1.0, 2.0], [3.0, 1.0, 2.0], [9.0, 1.0, 4.0, 2.0], [1.0, 1.0, 5.0, 5.0]])
def test_medians(values: list[float]) -> None:
    found = bootstrap([(2 * v, 2.0) for v in values], range(len(values)), median=True)
    assert found.value == statistics.median(values)
    assert min(values) <= found.low <= found.value <= found.high <= max(values)


def test_medians_of_weighted_draws() -> None:
    """Groups of several prompts: every draw's median is one of the prompts drawn."""
    values, groups = [1.0, 2.0, 10.0, 20.0, 3.0], ["a", "a", "b", "b", "c"]
    found = bootstrap([(v, 1.0) for v in values], groups, median=True)
    low, high = resampled([(v, 1.0) for v in values], None, groups, median=True)
    assert (found.value, found.low, found.high) == (3.0, low, high)


def test_one_example_and_none() -> None:
    found = bootstrap([(3.0, 2.0)], ["a"])
    assert found.value == 1.5 and math.isnan(found.low) and math.isnan(found.high)
    assert all(math.isnan(x) for x in bootstrap([], []))


def test_prompts_without_a_block_are_left_out() -> None:
    """They count for nothing, and a draw of nothing else does not spoil the interval."""
    found = bootstrap([(0.0, 0.0), (6.0, 2.0), (0.0, 0.0), (4.0, 2.0)], range(4))
    assert found.value == 2.5 and (found.low, found.high) == (2.0, 3.0)


def test_the_same_data_give_the_same_interval() -> None:
    parts = data(15, seed=10)
    assert bootstrap(parts, range(15)) == bootstrap(parts, range(15))
    assert bootstrap(parts, range(15)) != bootstrap(parts, range(15), seed=1)


@pytest.mark.parametrize(
    "found, resolved",
    [((0.2, 0.1, 0.3), True), ((-0.2, -0.3, -0.1), True), ((0.2, -0.1, 0.3), False), ((0, 0, 0), False)],
)
def test_zero_in_the_interval(found: tuple[float, float, float], resolved: bool) -> None:
    assert Interval(*found).excludes_zero == resolved


def test_one_example_has_no_interval() -> None:
    found = difference([(4.0, 1.0), (6.0, 2.0)], [(3.0, 1.0), (5.0, 2.0)], ["a", "a"])
    assert found.value == pytest.approx(2 / 3) and math.isnan(found.low) and not found.excludes_zero
    assert (
        sentence("tau", "opd", "sft", found)
        == "tau of opd minus that of sft: +0.667, from too few examples for an interval."
    )


def test_sentences() -> None:
    assert sentence("tau", "opd", "sft", Interval(0.25, 0.1, 0.4)) == (
        "tau of opd is 0.250 higher than that of sft: resolved, 95 % interval +0.100 to +0.400."
    )
    assert sentence("tau", "opd", "sft", Interval(-0.25, -0.4, -0.1)) == (
        "tau of opd is 0.250 lower than that of sft: resolved, 95 % interval -0.400 to -0.100."
    )
    assert sentence("speedup", "opd", "sft", Interval(0.02, -0.1, 0.14)) == (
        "speedup of opd and of sft are not resolved: difference +0.020, 95 % interval -0.100 to +0.140."
    )
