"""Training checkpoints are read whole or named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests.support.faults import flip_weights

from draftopd.errors import FileError
from draftopd.training import checkpoints


def save(path: Path, step: int, **more: object) -> None:
    content = {"drafter": {}, "state_dict": {"x": torch.full((500,), step)}, **more}
    checkpoints.CheckpointFiles().save_checkpoint(content, path)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A run's checkpoints after its third step."""
    for step in (1, 2, 3):
        save(tmp_path / "last.ckpt", step)
    save(tmp_path / "best.ckpt", 2)
    return tmp_path


def step_of(path: Path) -> int:
    return int(checkpoints.read(path)["state_dict"]["x"][0])


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-200])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def foreign(path: Path) -> None:
    torch.save({"state_dict": {}}, path)


def newer(path: Path) -> None:
    torch.save({"drafter": {}, "state_dict": {}, "draftopd_format": 7}, path)


DAMAGES: dict[Callable[[Path], None], str] = {
    flip_weights: "is damaged: the checksum of .* differs",
    cut: "or is damaged",
    empty: "or is damaged",
    foreign: "it holds no drafter",
    newer: "has format 7, this version reads 1",
}


def test_the_one_before_is_kept(directory: Path) -> None:
    assert sorted(path.name for path in directory.iterdir()) == ["best.ckpt", "last.ckpt", "previous.ckpt"]
    assert [step_of(directory / f"{name}.ckpt") for name in ("previous", "last", "best")] == [2, 3, 2]
    assert checkpoints.newest_whole(directory) == directory / "last.ckpt"
    # They are torch's files.
    assert torch.load(directory / "last.ckpt", weights_only=True)["state_dict"]["x"][0] == 3


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_one_is_named_and_the_one_before_taken(
    damage: Callable[[Path], None], directory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    damage(directory / "last.ckpt")
    with pytest.raises(FileError, match=f"last.ckpt.*{DAMAGES[damage]}"):
        checkpoints.read(directory / "last.ckpt")
    assert checkpoints.newest_whole(directory) == directory / "previous.ckpt"
    assert "last.ckpt" in caplog.text and "repeats the steps after it" in caplog.text
    damage(directory / "previous.ckpt")
    with pytest.raises(FileError, match="last.ckpt and previous.ckpt.*Delete the directory"):
        checkpoints.newest_whole(directory)


def test_a_missing_last_one(directory: Path) -> None:
    (directory / "last.ckpt").unlink()
    assert checkpoints.newest_whole(directory) == directory / "previous.ckpt"


def test_a_directory_without_checkpoints(tmp_path: Path) -> None:
    assert checkpoints.newest_whole(tmp_path / "nowhere") is None


def test_a_file_system_without_links(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(checkpoints.os, "link", refuse)
    save(directory / "last.ckpt", 4)
    assert [step_of(directory / f"{name}.ckpt") for name in ("previous", "last")] == [3, 4]
