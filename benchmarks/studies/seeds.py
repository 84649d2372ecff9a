"""tau of training runs with several seeds, and intervals over prompts and seeds together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from draftopd.evaluation.statistics import RESAMPLES, Interval

#: One run's test: by prompt, the emitted tokens of each of its blocks.
Tested = Mapping[str, Sequence[int]]


def tau(runs: Sequence[Tested], seed: int = 0) -> Interval:
    """The mean over runs of micro tau, and its 95 % interval.

    Prompts and runs are both drawn with replacement, every run with the same prompts: what prompts have in common
    between runs, and runs between prompts, stays together. Few runs give too narrow an interval: of three drawn with
    replacement the variance is two thirds of what three new ones would show.

    Args:
        runs: of one recipe, by seed, all tested on the same prompts.
        seed: of the draws.

    Raises:
        ValueError: if a run is missing a prompt that another has, or there is none.
    """
    values = _drawn([runs], seed)[0]
    return _interval(_whole(runs), values)


def gain(runs: Sequence[Tested], control: Sequence[Tested], seed: int = 0) -> Interval:
    """How much more tau than the control's, as a share of it: ``tau(runs) / tau(control) - 1``, with its interval.

    Drawn as in :func:`tau`, both with the same prompts, their runs apart from one another.
    """
    values, others = _drawn([runs, control], seed)
    return _interval(_whole(runs) / _whole(control) - 1, values / others - 1)


def _whole(runs: Sequence[Tested]) -> float:
    emitted, blocks = _table(runs, list(runs[0]))
    return float((emitted.sum(1) / blocks.sum(1)).mean())


def _drawn(recipes: Sequence[Sequence[Tested]], seed: int) -> list[NDArray[np.float64]]:
    """``[RESAMPLES]`` for each recipe: the mean of the drawn runs' micro tau on the drawn prompts."""
    if not all(recipes):
        raise ValueError("An interval needs at least one run.")
    prompts = list(recipes[0][0])
    tables = [_table(runs, prompts) for runs in recipes]
    draws = np.random.default_rng(seed)
    weights = draws.multinomial(len(prompts), np.full(len(prompts), 1 / len(prompts)), RESAMPLES).astype(float)
    means = []
    for emitted, blocks in tables:
        of_runs = (weights @ emitted.T) / (weights @ blocks.T)
        chosen = draws.integers(len(emitted), size=(RESAMPLES, len(emitted)))
        means.append(np.take_along_axis(of_runs, chosen, 1).mean(1))
    return means


def _table(runs: Sequence[Tested], prompts: Sequence[str]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """``[runs, prompts]`` each: emitted tokens, and blocks."""
    for run in runs:
        if not prompts:
            raise ValueError("A run without a test has no tau: train with data.test_count=N.")
        if run.keys() != set(prompts):
            raise ValueError("The runs were not tested on the same prompts: give all the same data.test_count.")
    emitted = np.array([[sum(run[p]) for p in prompts] for run in runs], float)
    return emitted, np.array([[len(run[p]) for p in prompts] for run in runs], float)


def _interval(value: float, drawn: NDArray[np.float64]) -> Interval:
    low, high = np.percentile(drawn, [2.5, 97.5])
    return Interval(value, float(low), float(high))
