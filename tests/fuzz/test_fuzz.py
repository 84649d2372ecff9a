"""A mutated file or answer is read or refused: never another error, a hang, or a lot of memory.

A few mutations here; ``python -m tests.fuzz --seconds 600`` tries many.
"""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fuzz.mutations import mutate, mutated
from tests.fuzz.running import Hang, outcome
from tests.fuzz.subjects import Subject, subjects


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Subject]:
    return subjects(tmp_path_factory.mktemp("fuzz"))


@settings(max_examples=300, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_mutations(fuzzed: dict[str, Subject], data: st.DataObject) -> None:
    subject = fuzzed[data.draw(st.sampled_from(sorted(fuzzed)), "subject")]
    outcome(subject, data.draw(mutated(subject.seeds), "mutation"))


def test_the_seeds_are_read(fuzzed: dict[str, Subject]) -> None:
    """Mutations of files that are refused as they stand would try nothing."""
    refused = {name for name, s in fuzzed.items() if [outcome(s, seed) for seed in s.seeds] != ["read"] * len(s.seeds)}
    assert not refused


def test_findings_are_found() -> None:
    def faulty(data: bytes) -> None:
        if b"5" in data:
            raise KeyError("5")
        if b"6" in data:
            while True:
                pass

    subject = Subject([b"1"], faulty)
    assert outcome(subject, b"1") == "read"
    with pytest.raises(KeyError):
        outcome(subject, b"5")
    from tests.fuzz import running

    running.SECONDS, before = 1, running.SECONDS
    try:
        with pytest.raises(Hang):
            outcome(subject, b"6")
    finally:
        running.SECONDS = before


def test_mutations_repeat_by_their_seed() -> None:
    import random

    seeds = [b'{"a": [1, 2, {"b": null}]}', b"text\nlines"]
    first, second = ([mutate(random.Random(i), seeds) for i in range(200)] for _ in range(2))
    assert first == second and len(set(first)) > 150
