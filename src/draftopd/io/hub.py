"""Model paths: local directories, directories of the package and names on the model hub; checks of local models."""

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

# transformers would otherwise request a conversion on the hub for a model without safetensors.
os.environ.setdefault("DISABLE_SAFETENSORS_CONVERSION", "1")

BUNDLED = "bundled:"

#: Maximum number of layers of a target; a config that names more is damaged.
MAX_LAYERS = 4096

#: Time-out of a request to the hub, in seconds.
HUB_TIMEOUT = 60.0

_EMBEDDINGS = {"model.embed_tokens.weight", "model.language_model.embed_tokens.weight"}


def resolve(path: str) -> str:
    """The path to pass to transformers; ``bundled:NAME`` stands for a directory inside the package."""
    if path.startswith(BUNDLED):
        return str(Path(__file__).parents[1] / "bundled" / "assets" / path.removeprefix(BUNDLED))
    return path


def local_only(path: str) -> bool:
    """Whether to read local files only: for a directory, and where the hub cannot be reached.

    The hub's client retries many times before it fails, so one attempt to connect saves time without a network.
    """
    if Path(path).is_dir():
        return True
    limit_waiting()
    return not _hub_reachable()


def limit_waiting() -> None:
    """Give requests to the hub that have no time-out of their own the time-out :data:`HUB_TIMEOUT`.

    Without it the client that transformers and datasets share waits for ever on some requests, such as lists of files.
    """
    client = get_session()
    hooks = client.event_hooks
    if _limit not in hooks["request"]:
        client.event_hooks = hooks | {"request": [*hooks["request"], _limit]}


def _limit(request: Any) -> None:
    given = request.extensions.get("timeout") or {}
    limits = {phase: given.get(phase) for phase in ("connect", "read", "write", "pool")}
    request.extensions["timeout"] = {phase: HUB_TIMEOUT if s is None else s for phase, s in limits.items()}


@cache
def _hub_reachable(timeout: float = 5.0) -> bool:
    if getproxies():
        return True  # only the client can find out, through the proxy
    address = urlsplit(ENDPOINT)
    try:
        socket.create_connection((address.hostname or "", address.port or 443), timeout).close()
    except OSError:
        return False
    return True


def check_index(directory: str, name: str = "model.safetensors.index.json") -> None:
    """Refuse a local target whose index names anything but safetensors files in its own directory.

    Raises:
        TargetError: if the index names other files or cannot be read.
    """
    index = Path(directory) / name
    if not index.is_file():
        return
    try:
        files = dict(parse_json(index.read_bytes())["weight_map"]).values()
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TargetError(f"{index} cannot be read ({shown(str(error))}): copy or download it again.") from error
    check_places(files, directory)


def check_weights(path: str, config: PreTrainedConfig) -> None:
    """Refuse a target whose config names weights other than safetensors files in its directory, or an index of such.

    Raises:
        TargetError: if it does.
    """
    named = getattr(config, "transformers_weights", None)
    if named is None:
        return
    if isinstance(named, str) and Path(named).name == named and named.endswith(".safetensors.index.json"):
        check_index(path, named)
    else:
        check_places([named], path, "config.json")


def check_width(directory: str, config: PreTrainedConfig) -> None:
    """Refuse a local target whose config has another width than its embedding, or an impossible depth.

    transformers allocates the memory that the config describes before it reads the tensors.

    Raises:
        TargetError: with both widths, or the depth.
    """
    layers, width = getattr(config, "num_hidden_layers", 1), getattr(config, "hidden_size", None)
    if type(layers) is int and layers > MAX_LAYERS:
        raise TargetError(f"config.json of {directory} describes {layers} layers: copy or download it again.")
    for file in sorted(Path(directory).glob("*.safetensors")) if Path(directory).is_dir() else ():
        try:
            with safe_open(file, framework="pt") as tensors:
                shapes = [tensors.get_slice(name).get_shape() for name in set(tensors.keys()) & _EMBEDDINGS]
        except (OSError, SafetensorError):
            continue  # the loader reports the error
        if shapes and (len(shapes[0]) != 2 or shapes[0][1] != width):
            raise TargetError(
                f"config.json of {directory} describes a hidden_size of {shown(width, 40)}, but its embedding is "
                f"{shapes[0]}: copy or download both again."
            )


def check_size(directory: str, numbers: int) -> None:
    """Refuse a local target whose config describes a far larger model than its safetensors files can hold.

    transformers allocates tensors that the files lack in the size that the config describes.

    Args:
        numbers: the number of parameters by the config.

    Raises:
        TargetError: with both sizes.
    """
    files = list(Path(directory).glob("*.safetensors"))
    held = sum(file.stat().st_size for file in files)
    # The tightest quantization, one bit per weight, has 8 numbers per byte.
    if files and numbers > 16 * held + 2**20:
        raise TargetError(
            f"config.json of {directory} describes {numbers} parameters, but its safetensors files hold {held} bytes: "
            "copy or download both again."
        )


def check_places(names: Iterable[object], path: str, what: str = "index") -> None:
    """Refuse file names, from an index or a config, that are not safetensors files in the directory itself.

    Raises:
        TargetError: with the names.
    """
    others = [n for n in names if not isinstance(n, str) or Path(n).name != n or not n.endswith(".safetensors")]
    if others:
        raise TargetError(
            f"The {what} of {path} names {listed(dict.fromkeys(map(str, others)))}: only safetensors files beside it "
            "are read. Download the target again, from a source you trust."
        )


def unavailable(path: str, error: Exception) -> str:
    """The message for a target that cannot be loaded."""
    if Path(path).exists() or not isinstance(error, OSError):
        lines = [line for line in str(error).splitlines() if line.strip()]
        reason = shown(lines[0]).rstrip(".") if lines else type(error).__name__
        return f"The target {path} could not be loaded: {reason}. Copy or download it again, or name another."
    return (
        f"The target {path} could not be found: it is not a local directory, and the model hub did not return it "
        f"({type(error).__name__}). Pass target.path=DIR to use a local copy."
    )
