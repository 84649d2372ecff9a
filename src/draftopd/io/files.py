"""Files that are whole or absent: written beside, synced, renamed, and known again by their checksums."""

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
def writing(place: Path | str) -> Iterator[None]:
    """Turn the system's errors into one clear message.

    Raises:
        FileError: naming what could not be written, and why.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise FileError(
            f"{place} cannot be written: {error}. Free space or choose another directory (hydra.run.dir=DIR); what was "
            "written before is untouched."
        ) from error


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """A name to write to; on success it takes ``path``'s place for good, on any error it is removed.

    Raises:
        FileError: if it cannot be written; what was there before stays.
    """
    # Other processes may write the same file at the same moment.
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with writing(path):
            yield partial
            os.chmod(partial, 0o644)  # safetensors writes files only their owner can read
            with partial.open("rb") as file:
                os.fsync(file.fileno())
            os.replace(partial, path)
            sync(path.parent)
    finally:
        with suppress(OSError):
            partial.unlink()


def sync(directory: Path) -> None:
    """Bring a directory's names to the disk: a file renamed into it could be lost by a power cut until then."""
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
    """Write a JSON object with the number of its format and a checksum of the rest; what JSON lacks becomes text.

    Raises:
        FileError: if it cannot be written.
    """
    sealed = json.loads(json.dumps({"format": number, **content}, default=str))
    with replaced(path) as partial:
        written = json.dumps(sealed | {"checksum": seal(sealed)}, indent=2)
        partial.write_text(f"{written}\n", encoding="utf-8")


def read_json(path: Path, number: int) -> dict[str, Any]:
    """What :func:`write_json` wrote, without number and checksum.

    Raises:
        FileError: if it is absent, damaged, foreign or of another format; it says which, the caller what to do.
    """
    try:
        content = parse_json(path.read_bytes())
    except OSError as error:
        raise FileError(f"{path} cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise FileError(f"{path} is damaged: it is no JSON ({shown(str(error))}).") from error
    if not isinstance(content, dict) or not {"format", "checksum"} <= content.keys():
        raise FileError(f"{path} has no format number and checksum: another program or version wrote it.")
    if content["format"] != number:
        raise FileError(f"{path} has format {shown(content['format'], 40)}, this version reads {number}.")
    if content.pop("checksum") != seal(content):
        raise FileError(f"{path} is damaged: its checksum differs.")
    del content["format"]
    return content


def seal(content: Mapping[str, Any]) -> int:
    """CRC-32 of a JSON object, however it is laid out."""
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())


def inside(directory: Path, name: Any) -> Path:
    """``directory / name``, for a name that was read from a file.

    Raises:
        FileError: if it is no name or leads out of the directory.
    """
    if not isinstance(name, str) or not name.strip("./") or "\0" in name:
        raise FileError(f"{directory} lists {name!r}, which names no file.")
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise FileError(f"{directory} lists {name!r}, which lies outside of it.")
    return directory / name


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Hold a run's directory; the system releases it when the process ends, however it does.

    What a killed run left half-written is removed.

    Raises:
        FileError: if another process holds it, or it cannot be written.
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
                f"{directory} is in use by another run ({who}): wait for its end, or choose another directory "
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
