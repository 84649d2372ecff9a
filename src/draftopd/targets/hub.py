"""Model paths: local directories, directories of the package, names on the model hub."""

from __future__ import annotations

import socket
from functools import cache
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies

from huggingface_hub.constants import ENDPOINT

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


def unavailable(path: str, error: Exception) -> str:
    """What to say when a target cannot be loaded."""
    if Path(path).exists() or not isinstance(error, OSError):
        lines = [line for line in str(error).splitlines() if line.strip()]
        return f"The target {path} could not be loaded: {lines[0].strip() if lines else type(error).__name__}"
    return (
        f"The target {path} could not be had: it is no local directory, and the model hub did not give it "
        f"({type(error).__name__}). Pass target.path=DIR to use a local copy."
    )
