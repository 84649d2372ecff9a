"""Files that are complete or absent: written under a temporary name, synced, renamed and verified by checksums."""

from __future__ import annotations

import json
import os
import shutil
import socket
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from draftopd.errors import FileError
from draftopd.io.json_text import parse_json, shown


@contextmanager
def writing(what: Path | str) -> Iterator[None]:
    """Turn the operating system's errors into one message.

    Raises:
        FileError: with what could not be written and the reason.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise FileError(
            f"{what} cannot be written: {error}. Free space or choose another directory (hydra.run.dir=DIR); what was "
            "written before is untouched."
        ) from error


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write to, which replaces ``path`` on success and is removed on any error.

    Raises:
        FileError: if the file cannot be written; a former file at ``path`` is then unchanged.
    """
    # The process id keeps apart processes that write the same file at the same moment.
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with writing(path):
            yield partial
            os.chmod(partial, 0o644)  # safetensors writes files that only their owner can read
            with partial.open("rb") as file:
                os.fsync(file.fileno())
            os.replace(partial, path)
            sync(path.parent)
    finally:
        with suppress(OSError):
            partial.unlink()


def sync(directory: Path) -> None:
    """Write a directory's entries to the disk, so that a power cut does not lose files renamed into it."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def checksum(path: Path) -> int:
    """CRC-32 of a file."""
    value = 0
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            value = zlib.crc32(block, value)
    return value


def write_json(path: Path, content: Mapping[str, Any], number: int) -> None:
    """Write a JSON object together with its format number and a checksum.

    Values that JSON cannot represent are written as text.

    Raises:
        FileError: if the file cannot be written.
    """
    sealed = json.loads(json.dumps({"format": number, **content}, default=str))
    with replaced(path) as partial:
        written = json.dumps(sealed | {"checksum": seal(sealed)}, indent=2)
        partial.write_text(f"{written}\n", encoding="utf-8")


def read_json(path: Path, number: int) -> dict[str, Any]:
    """The object that :func:`write_json` wrote, without format number and checksum.

    Raises:
        FileError: if the file is absent, damaged, from another program or of another format. The message gives the
            reason; the caller adds what to do.
    """
    try:
        content = parse_json(path.read_bytes())
    except OSError as error:
        raise FileError(f"{path} cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise FileError(f"{path} is damaged: it is not JSON ({shown(str(error))}).") from error
    if not isinstance(content, dict) or not {"format", "checksum"} <= content.keys():
        raise FileError(f"{path} has no format number and checksum: another program or version wrote it.")
    if content["format"] != number:
        raise FileError(f"{path} has format {shown(content['format'], 40)}, this version reads {number}.")
    if content.pop("checksum") != seal(content):
        raise FileError(f"{path} is damaged: its checksum differs.")
    del content["format"]
    return content


def seal(content: Mapping[str, Any]) -> int:
    """CRC-32 of a JSON object, independent of white space and key order."""
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())


def inside(directory: Path, name: Any) -> Path:
    """``directory / name``, for a name that was read from a file.

    Raises:
        FileError: if it is not a file name or leads out of the directory.
    """
    if not isinstance(name, str) or not name.strip("./") or "\0" in name:
        raise FileError(f"{directory} lists {name!r}, which names no file.")
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise FileError(f"{directory} lists {name!r}, which lies outside of it.")
    return directory / name


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Lock a run's directory and remove the partial files of a killed run.

    The operating system releases the lock when the process ends, even if it is killed.

    Raises:
        FileError: if another process holds the lock, or the directory cannot be written.
    """
    owner = directory / ".lock.owner"
    with writing(directory):
        directory.mkdir(parents=True, exist_ok=True)
        lock = FileLock(directory / ".lock")
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
            who = owner.read_text(encoding="utf-8").strip() if owner.exists() else "unknown"
            raise FileError(
                f"{directory} is in use by another run ({who}): wait until it ends, or choose another directory "
                "(hydra.run.dir=DIR)."
            ) from error
    try:
        with writing(directory):
            owner.write_text(f"process {os.getpid()} on {socket.gethostname()}\n", encoding="utf-8")
            for left in [*directory.glob(".*.partial"), *directory.glob("*/.*.partial")]:
                if left.is_dir():
                    shutil.rmtree(left)
                else:
                    left.unlink()
        yield
    finally:
        lock.release()
