"""Model paths: local directories, directories of the package, names on the model hub."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies

from huggingface_hub.constants import ENDPOINT

from draftopd.errors import TargetError
from draftopd.json_text import listed, read_json, shown

# For a model without safetensors transformers would ask a service on the hub to convert it: nobody asked for that.
os.environ.setdefault("DISABLE_SAFETENSORS_CONVERSION", "1")

BUNDLED = "bundled:"


def resolve(path: str) -> str:
    """A path as transformers takes it; ``bundled:NAME`` names a directory inside the package."""
    if path.startswith(BUNDLED):
        return str(Path(__file__).parent.parent / "assets" / path.removeprefix(BUNDLED))
    return path


def local_only(path: str) -> bool:
    """Whether to look on this machine alone: for a directory, or where the hub cannot be reached.

    The hub's client tries many times before it gives up; one look at the network spares the wait.
    """
    return Path(path).is_dir() or not _hub_reachable()


@cache
def _hub_reachable(timeout: float = 5.0) -> bool:
    if getproxies():
        return True  # a proxy decides; let the client find out
    address = urlsplit(ENDPOINT)
    try:
        socket.create_connection((address.hostname or "", address.port or 443), timeout).close()
    except OSError:
        return False
    return True


def check_index(directory: str) -> None:
    """Refuse a local target whose index leads anywhere but to safetensors files beside it.

    Raises:
        TargetError: naming what it lists, or that it cannot be read.
    """
    index = Path(directory) / "model.safetensors.index.json"
    if not index.is_file():
        return
    try:
        places = dict(read_json(index.read_bytes())["weight_map"]).values()
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TargetError(f"{index} cannot be read ({shown(str(error))}): copy or download it again.") from error
    check_places(places, directory)


def check_places(places: Iterable[object], path: str) -> None:
    """Refuse files of an index that are no safetensors files in its own directory.

    Raises:
        TargetError: naming them.
    """
    others = [p for p in places if not isinstance(p, str) or Path(p).name != p or not p.endswith(".safetensors")]
    if others:
        raise TargetError(
            f"The index of {path} names {listed(dict.fromkeys(map(str, others)))}: only safetensors files beside it "
            "are read. Download the target again, from a place you trust."
        )


def unavailable(path: str, error: Exception) -> str:
    """What to say when a target cannot be loaded."""
    if Path(path).exists() or not isinstance(error, OSError):
        lines = [line for line in str(error).splitlines() if line.strip()]
        reason = shown(lines[0]).rstrip(".") if lines else type(error).__name__
        return f"The target {path} could not be loaded: {reason}. Copy or download it again, or name another."
    return (
        f"The target {path} could not be had: it is no local directory, and the model hub did not give it "
        f"({type(error).__name__}). Pass target.path=DIR to use a local copy."
    )
