"""Settings refuse what no decoder can do."""

from __future__ import annotations

import pytest

from draftopd.decoding.sampling import Sampling
from draftopd.errors import ConfigError
from draftopd.evaluation.settings import Settings


@pytest.mark.parametrize(
    "values, message",
    [
        ({"temperature": -1.0}, "temperature must be 0"),
        ({"top_k": -1}, "top_k must be 0"),
        ({"top_p": 0.0}, "top_p must lie"),
        ({"batch_size": 0}, "batch_size must be 1 or more, found 0"),
        ({"max_new_tokens": 0}, "max_new_tokens must be 1"),
        ({"limit": 0}, "limit must be 1"),
        ({"seed": -1}, "seed must lie"),
        ({"seed": 2**32}, "seed must lie"),
    ],
)
def test_values_out_of_range_are_refused(values: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Settings(**values)


def test_sampling() -> None:
    assert Settings(temperature=0.7, top_k=3, top_p=0.9).sampling == Sampling(0.7, 3, 0.9)
    assert Settings().sampling.greedy
