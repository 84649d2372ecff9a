"""Confidence intervals by resampling whole examples, whose turns and tokens are drawn together."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

#: Resamples of a bootstrap.
RESAMPLES = 10_000

#: ``weights [draws, prompts] -> [draws]``.
_Figure = Callable[[NDArray[np.float64]], NDArray[np.float64]]


class Interval(NamedTuple):
    """A figure and its 95 % interval; the ends are NaN for a single example."""

    value: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        return self.low > 0 or self.high < 0


def bootstrap(
    parts: Sequence[tuple[float, float]], groups: Sequence[Hashable], median: bool = False, seed: int = 0
) -> Interval:
    """A figure's percentile interval over examples drawn with replacement.

    Args:
        parts: ``(numerator, denominator)`` per prompt; the figure is the ratio of their sums.
        groups: the example of each prompt; an example's prompts are drawn together.
        median: the figure is the median of the prompts' own ratios instead.
        seed: of the draws.

    Example:
        >>> bootstrap([(2.0, 1.0), (2.0, 1.0)], ["a", "b"])
        Interval(value=2.0, low=2.0, high=2.0)
    """
    return difference(parts, None, groups, median, seed)


def difference(
    first: Sequence[tuple[float, float]],
    second: Sequence[tuple[float, float]] | None,
    groups: Sequence[Hashable],
    median: bool = False,
    seed: int = 0,
) -> Interval:
    """The first figure minus the second, with the same examples drawn for both; see :func:`bootstrap`."""
    names = {name: i for i, name in enumerate(dict.fromkeys(groups))}
    members = np.array([names[g] for g in groups])
    count = len(names)
    if not count:
        return Interval(float("nan"), float("nan"), float("nan"))
    a = _figure(np.asarray(first, float), median)
    b = None if second is None else _figure(np.asarray(second, float), median)
    draws = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), RESAMPLES).astype(float)

    def values(weights: NDArray[np.float64]) -> NDArray[np.float64]:
        each = weights[:, members]
        return a(each) if b is None else a(each) - b(each)

    found = values(draws)
    if np.isnan(found).all():
        return Interval(float("nan"), float("nan"), float("nan"))
    low, high = np.nanpercentile(found, [2.5, 97.5]) if count > 1 else (np.nan, np.nan)
    return Interval(float(values(np.ones((1, count)))[0]), float(low), float(high))


def _figure(parts: NDArray[np.float64], median: bool) -> _Figure:
    numerators, denominators = parts[:, 0], parts[:, 1]
    if not median:

        def ratio(weights: NDArray[np.float64]) -> NDArray[np.float64]:
            with np.errstate(invalid="ignore", divide="ignore"):
                return (weights @ numerators) / (weights @ denominators)

        return ratio
    ratios = numerators / denominators
    order = np.argsort(ratios)
    ordered = ratios[order]

    def weighted_median(weights: NDArray[np.float64]) -> NDArray[np.float64]:
        mass = weights[:, order].cumsum(1)
        half = mass[:, -1:] / 2
        # The median of an even number of prompts is the mean of the middle two.
        low, high = (mass >= half).argmax(1), (mass > half).argmax(1)
        return (ordered[low] + ordered[high]) / 2

    return weighted_median


def sentence(name: str, first: str, second: str, found: Interval) -> str:
    """A sentence on the size of a difference, and whether its interval excludes zero."""
    if np.isnan(found.low):
        return f"{name} of {first} minus that of {second}: {found.value:+.3f}, from too few examples for an interval."
    between = f"95 % interval {found.low:+.3f} to {found.high:+.3f}"
    if not found.excludes_zero:
        return f"{name} of {first} and of {second} are not resolved: difference {found.value:+.3f}, {between}."
    higher = "higher" if found.value > 0 else "lower"
    return f"{name} of {first} is {abs(found.value):.3f} {higher} than that of {second}: resolved, {between}."
