"""Targets on the meta device: parameters are counted and not loaded."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from draftopd.errors import TargetError
from draftopd.io.hub import local_only, resolve, unavailable
from draftopd.planning.sizes import TargetSize
from draftopd.targets.target import Target

#: Shapes of the configured targets, used if neither a directory nor the hub gives them.
KNOWN = Path(__file__).parent / "known_shapes"


def shape_of(path: str, revision: str | None = None, trust_remote_code: bool = False) -> tuple[PreTrainedConfig, str]:
    """A target's config, and its source.

    Args:
        path: a directory with ``config.json`` (nothing else is read), ``bundled:NAME``, or a name on the hub.

    Raises:
        TargetError: if none of these has the config.
    """
    found = resolve(path)
    try:
        config = AutoConfig.from_pretrained(
            found, revision=revision, trust_remote_code=trust_remote_code, local_files_only=local_only(found)
        )
    except (OSError, ValueError, KeyError) as error:
        known = KNOWN / f"{path.rsplit('/', 1)[-1]}.json"
        if isinstance(error, OSError) and not Path(found).exists() and known.is_file():
            source = f"{path} as draftopd knows its shape: neither a directory nor the hub gave its config.json"
            return AutoConfig.from_pretrained(known), source
        hint = " A plan needs only its config.json: put it into a directory, and use target.path=DIR."
        raise TargetError(unavailable(path, error) + hint) from error
    return config, path


def target_of(config: PreTrainedConfig, dtype: str = "auto") -> tuple[Target, TargetSize]:
    """A target on the meta device, and its size at the precision it is loaded in.

    Raises:
        TargetError: if it is not a causal LM that draftopd supports.
    """
    own = getattr(config.get_text_config(), "dtype", None) or config.dtype or torch.float32
    precision = own if dtype == "auto" else getattr(torch, dtype, None)
    if not isinstance(precision, torch.dtype):
        raise TargetError(f"target.dtype={dtype} is not a precision of torch: use auto, bfloat16, float16 or float32.")
    try:
        with torch.device("meta"):
            target = Target(AutoModelForCausalLM.from_config(config, dtype=precision))
    except (ValueError, KeyError, AttributeError) as error:
        raise TargetError(f"No causal LM can be built from the target's config.json: {error}") from error
    return target, TargetSize.of(target, precision.itemsize)
