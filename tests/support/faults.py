"""A disk that is full at the n-th write, and bits that flip."""

from __future__ import annotations

import errno
import os
import zipfile
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from draftopd.drafters import checkpoint
from draftopd.errors import DraftOPDError


class FullDisk:
    """Fails the ``fails_at``-th of all writes, syncs, renames and new directories; a write that fails leaves half."""

    def __init__(self, patch: pytest.MonkeyPatch, fails_at: int) -> None:
        self.calls, self.fails_at = 0, fails_at
        self.inside = 0  # `write_text` calls `open`: one write, not two
        for name in ("fsync", "replace", "rename", "mkdir"):
            patch.setattr(os, name, self._failing(getattr(os, name)))
        for name in ("write_text", "write_bytes"):
            patch.setattr(Path, name, self._failing(getattr(Path, name), halved=True))
        patch.setattr(checkpoint, "save_file", self._failing(checkpoint.save_file))
        opened = Path.open

        def open_file(path: Path, mode: str = "r", *args: Any, **options: Any) -> Any:
            file = opened(path, mode, *args, **options)
            return _File(file, self) if mode[0] in "wa" and not self.inside else file

        patch.setattr(Path, "open", open_file)

    def step(self) -> bool:
        """Whether the disk is full for this call."""
        self.calls += 1
        return self.calls == self.fails_at

    def _failing(self, real: Callable[..., Any], halved: bool = False) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            self.inside += 1
            try:
                if self.inside > 1 or not self.step():
                    return real(*args, **options)
            finally:
                self.inside -= 1
            if halved:
                path, content = args
                with open(path, "wb") as file:
                    file.write((content.encode() if isinstance(content, str) else content)[: len(content) // 2])
            raise OSError(errno.ENOSPC, "No space left on device")

        return call


class _File:
    """A file open for writing on a :class:`FullDisk`."""

    def __init__(self, file: Any, disk: FullDisk) -> None:
        self.file, self.disk = file, disk

    def write(self, content: Any) -> int:
        if self.disk.step():
            self.file.write(content[: len(content) // 2])
            raise OSError(errno.ENOSPC, "No space left on device")
        return self.file.write(content)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)

    def __enter__(self) -> _File:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()


def every_fault(write: Callable[[int], None], check: Callable[[int, bool], None]) -> int:
    """Calls ``write(n)`` with a disk full at the n-th call, and ``check(n, failed)`` after each, until none fails.

    Every failure must be one clear error. Returns how many there were.
    """
    for n in count(1):
        with pytest.MonkeyPatch.context() as patch:
            disk = FullDisk(patch, n)
            try:
                write(n)
                failed = False
            except DraftOPDError as error:
                assert "cannot be written" in str(error) and "No space left" in str(error), error
                failed = True
        check(n, failed)
        if disk.calls < n:
            assert not failed
            return n - 1
    raise AssertionError


def flip(path: Path, place: int | None = None) -> None:
    """Flip a bit: at a place, or in the middle."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2 if place is None else place] ^= 1
    path.write_bytes(content)


def flip_weights(path: Path) -> None:
    """Flip a bit in the largest entry of a checkpoint."""
    with zipfile.ZipFile(path) as archive:
        largest = archive.read(max(archive.infolist(), key=lambda entry: entry.file_size))
    flip(path, path.read_bytes().index(largest) + len(largest) // 2)
