"""Which process is the first of its run."""

from __future__ import annotations

import pytest
from lightning.fabric.utilities.rank_zero import rank_zero_only

from draftopd.distributed.ranks import is_first


@pytest.mark.parametrize(
    "rank, environment, first",
    [
        (0, {}, True),
        (1, {"LOCAL_RANK": "1"}, False),
        (0, {"NODE_RANK": "1"}, False),  # another machine's first process, which Lightning numbers later
        (0, {"GROUP_RANK": "1"}, False),
        (0, {"NODE_RANK": "0", "LOCAL_RANK": "0"}, True),
    ],
)
def test_by_environment(rank: int, environment: dict[str, str], first: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NODE_RANK", "GROUP_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(rank_zero_only, "rank", rank)
    assert is_first() is first
