"""Files that are whole or absent."""

from __future__ import annotations

from pathlib import Path

import pytest

from draftopd.files import replaced


def test_success_takes_the_place(tmp_path: Path) -> None:
    path = tmp_path / "figures.json"
    path.write_text("old")
    with replaced(path) as partial:
        partial.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_failure_leaves_what_was(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "figures.json"
    path.write_text("old")
    with pytest.raises(error), replaced(path) as partial:
        partial.write_text("half")
        raise error
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_failure_leaves_nothing_where_nothing_was(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), replaced(tmp_path / "figures.json") as partial:
        partial.write_text("half")
        raise RuntimeError
    assert not list(tmp_path.iterdir())
