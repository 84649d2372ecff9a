"""Model paths: local directories, directories of the package, names on the model hub."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

from huggingface_hub import get_session
from huggingface_hub.constants import ENDPOINT
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedConfig

from draftopd.errors import TargetError
from draftopd.io.json_text import listed, parse_json, shown

# For a model without safetensors transformers would ask a service on the hub to convert it: nobody asked for that.
os.environ.setdefault("DISABLE_SAFETENSORS_CONVERSION", "1")

BUNDLED = "bundled:"

#: No target has more.
MOST_LAYERS = 4096

#: Seconds until a request to the hub is given up.
WAITING = 60.0

_EMBEDDINGS = {"model.embed_tokens.weight", "model.language_model.embed_tokens.weight"}


def resolve(path: str) -> str:
    """A path as transformers takes it; ``bundled:NAME`` names a directory inside the package."""
    if path.startswith(BUNDLED):
        return str(Path(__file__).parents[1] / "bundled" / "assets" / path.removeprefix(BUNDLED))
    return path


def local_only(path: str) -> bool:
    """Whether to look on this machine alone: for a directory, or where the hub cannot be reached.

    The hub's client tries many times before it gives up; one look at the network spares the wait.
    """
    if Path(path).is_dir():
        return True
    limit_waiting()
    return not _hub_reachable()


def limit_waiting() -> None:
    """Let requests to the hub that bring no time-out of their own end after :data:`WAITING` without an answer.

    The hub's client, which transformers and datasets share, would wait for ever: for lists of files and the like.
    """
    client = get_session()
    hooks = client.event_hooks
    if _limit not in hooks["request"]:
        client.event_hooks = hooks | {"request": [*hooks["request"], _limit]}


def _limit(request: Any) -> None:
    given = request.extensions.get("timeout") or {}
    limits = {phase: given.get(phase) for phase in ("connect", "read", "write", "pool")}
    request.extensions["timeout"] = {phase: WAITING if s is None else s for phase, s in limits.items()}


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


def check_index(directory: str, name: str = "model.safetensors.index.json") -> None:
    """Refuse a local target whose index leads anywhere but to safetensors files beside it.

    Raises:
        TargetError: naming what it lists, or that it cannot be read.
    """
    index = Path(directory) / name
    if not index.is_file():
        return
    try:
        places = dict(parse_json(index.read_bytes())["weight_map"]).values()
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TargetError(f"{index} cannot be read ({shown(str(error))}): copy or download it again.") from error
    check_places(places, directory)


def check_weights(path: str, config: PreTrainedConfig) -> None:
    """Refuse a target whose config names weights of its own that are no safetensors files beside it, or no such index.

    Raises:
        TargetError: naming them.
    """
    named = getattr(config, "transformers_weights", None)
    if named is None:
        return
    if isinstance(named, str) and Path(named).name == named and named.endswith(".safetensors.index.json"):
        check_index(path, named)
    else:
        check_places([named], path, "config.json")


def check_width(directory: str, config: PreTrainedConfig) -> None:
    """Refuse a local target whose config describes another width, or a depth that none has.

    transformers takes the memory that the config asks for before it looks at the tensors.

    Raises:
        TargetError: naming both widths, or the depth.
    """
    layers, width = getattr(config, "num_hidden_layers", 1), getattr(config, "hidden_size", None)
    if type(layers) is int and layers > MOST_LAYERS:
        raise TargetError(f"config.json of {directory} describes {layers} layers: copy or download it again.")
    for file in sorted(Path(directory).glob("*.safetensors")) if Path(directory).is_dir() else ():
        try:
            with safe_open(file, framework="pt") as tensors:
                found = [tensors.get_slice(name).get_shape() for name in set(tensors.keys()) & _EMBEDDINGS]
        except (OSError, SafetensorError):
            continue  # the loader says what is wrong with it
        if found and (len(found[0]) != 2 or found[0][1] != width):
            raise TargetError(
                f"config.json of {directory} describes a hidden_size of {shown(width, 40)}, but its embedding is "
                f"{found[0]}: copy or download both again."
            )


def check_size(directory: str, numbers: int) -> None:
    """Refuse a local target whose config describes a far larger model than its safetensors files can hold.

    What the files lack, transformers makes itself, as large as the config says; where there are none, it says so.

    Args:
        numbers: parameters by the config.

    Raises:
        TargetError: naming both sizes.
    """
    files = list(Path(directory).glob("*.safetensors"))
    held = sum(file.stat().st_size for file in files)
    # The tightest quantization, one bit a weight, has 8 numbers a byte.
    if files and numbers > 16 * held + 2**20:
        raise TargetError(
            f"config.json of {directory} describes {numbers} parameters, but its safetensors files hold {held} bytes: "
            "copy or download both again."
        )


def check_places(places: Iterable[object], path: str, what: str = "index") -> None:
    """Refuse files, named by an index or else, that are no safetensors files in its own directory.

    Raises:
        TargetError: naming them.
    """
    others = [p for p in places if not isinstance(p, str) or Path(p).name != p or not p.endswith(".safetensors")]
    if others:
        raise TargetError(
            f"The {what} of {path} names {listed(dict.fromkeys(map(str, others)))}: only safetensors files beside it "
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
