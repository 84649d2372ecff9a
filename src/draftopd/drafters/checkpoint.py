"""What drafter checkpoints have in common: ``config.json`` and ``model.safetensors`` in one directory."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedConfig

from draftopd.errors import DrafterError, FileError
from draftopd.io.files import checksum, read_json, replaced, write_json, writing
from draftopd.io.json_text import listed, parse_json, shown, whole

log = logging.getLogger(__name__)

_CONFIG, _WEIGHTS = "config.json", "model.safetensors"

#: Beside the two files of the public format, which have no room for it: their checksums, and its own format.
_CHECKSUMS, FORMAT = "checksums.json", 1

Config = TypeVar("Config", bound=PreTrainedConfig)
Built = TypeVar("Built", bound=nn.Module)

#: Fields that describe a drafter's own layers.
_LAYER_FIELDS = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "intermediate_size", "rms_norm_eps", "max_position_embeddings", "vocab_size", "hidden_act",
    "attention_bias", "mlp_bias", "attention_dropout", "initializer_range", "layer_types", "sliding_window",
    "use_sliding_window", "max_window_layers",
)  # fmt: skip

#: No drafter has more layers, or is larger in any other measure.
MOST_LAYERS, MOST = 1024, 2**31 - 1

#: Fields among them that count something.
_SIZES = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "intermediate_size",
    "max_position_embeddings", "vocab_size",
)  # fmt: skip


def read_checkpoint(directory: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The JSON object of ``config.json`` and the tensors of ``model.safetensors``.

    Raises:
        DrafterError: if one is missing or damaged.
    """
    try:
        raw = parse_json((directory / _CONFIG).read_bytes())
        tensors = load_file(directory / _WEIGHTS)
        _check_written(directory)
    except FileNotFoundError as error:
        raise DrafterError(
            f"No drafter in {directory}: {Path(error.filename or 'model.safetensors').name} is missing. "
            "Name a directory with config.json and model.safetensors."
        ) from error
    except (ValueError, SafetensorError, OSError) as error:
        raise DrafterError(
            f"The drafter in {directory} cannot be read: {shown(str(error))}. Copy or train it again."
        ) from error
    if not isinstance(raw, dict):
        raise DrafterError(
            f"config.json of {directory} is no JSON object: name a directory with a drafter's config.json."
        )
    return raw, tensors


def architecture_of(raw: dict[str, Any]) -> str:
    """The architecture that a ``config.json`` names; ``?`` where it names none."""
    named = raw.get("architectures")
    return shown(named[0], 60) if isinstance(named, list) and named and isinstance(named[0], str) else "?"


def _check_written(directory: Path) -> None:
    """Refuse weights that are not those written; a drafter that came from elsewhere has nothing to compare with."""
    place = directory / _CHECKSUMS
    if not place.exists():
        return
    try:
        written = read_json(place, FORMAT)
    except FileError as error:
        log.warning("%s The drafter beside it is read unchecked.", error)
        return
    weights, config = directory / _WEIGHTS, directory / _CONFIG
    if checksum(weights) != written.get(_WEIGHTS):
        raise DrafterError(
            f"{weights} is damaged: its checksum differs. Copy it again, or export it from the run's checkpoint "
            f"(python -m draftopd.interop export). If it was changed on purpose, delete {_CHECKSUMS} beside it."
        )
    if checksum(config) != written.get(_CONFIG):
        # It may be edited for a serving engine.
        log.warning("%s was changed, or damaged, since the drafter was written.", config)


def parse_layers(kind: type[Config], raw: dict[str, Any], where: str) -> Config:
    """The fields of the drafter's own layers.

    Args:
        kind: config class of the family whose layers it has.

    Raises:
        DrafterError: if they describe no layers that this drafter has.
    """
    try:
        for name in _SIZES:
            if raw.get(name) is not None and not 1 <= whole(raw[name]) <= MOST:
                raise ValueError(f"{name} is {raw[name]}, expected 1 to {MOST}")
        # The config class writes a list of this length.
        if raw.get("num_hidden_layers", 1) > MOST_LAYERS:
            raise ValueError(f"num_hidden_layers is {raw['num_hidden_layers']}, expected at most {MOST_LAYERS}")
        rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
        rope = {"rope_type": rope.get("type", "default"), **rope}
        rope["rope_theta"] = raw.get("rope_theta") or rope.get("rope_theta", 10_000.0)
        config = kind(
            **{name: raw[name] for name in _LAYER_FIELDS if raw.get(name) is not None},
            rope_parameters=rope,
            tie_word_embeddings=False,
        )
        if config.num_attention_heads % config.num_key_value_heads or config.head_dim % 2:
            raise ValueError(
                f"{config.num_attention_heads} heads of {config.head_dim} do not go with {config.num_key_value_heads} "
                "key/value heads"
            )
        if not 0 < float(config.rms_norm_eps) < 1 or not 0 < float(rope["rope_theta"]) < math.inf:
            raise ValueError(f"rms_norm_eps {config.rms_norm_eps} or rope_theta {rope['rope_theta']} is none")
        kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    except (TypeError, ValueError, AttributeError, KeyError, OverflowError, StrictDataclassError) as error:
        raise DrafterError(
            f"config.json of {where} describes no {kind.model_type} layers: {shown(str(error))}. Copy it again, or "
            "name another drafter."
        ) from error
    if kinds != {"full_attention"}:
        raise DrafterError(
            f"{where} has sliding-window layers, which this drafter does not have: name another drafter."
        )
    return config


def layer_fields(config: PreTrainedConfig) -> dict[str, Any]:
    """The fields of the drafter's own layers, as its ``config.json`` has them."""
    rope = dict(config.rope_parameters)
    theta = rope.pop("rope_theta")
    return {
        "model_type": config.model_type,
        **{name: getattr(config, name) for name in _LAYER_FIELDS if hasattr(config, name)},
        "rope_theta": theta,
        "rope_scaling": None if rope.get("rope_type", "default") == "default" else rope,
        "tie_word_embeddings": False,
    }


def filled(build: Callable[[], Built], tensors: Mapping[str, Tensor], layers: int, where: str) -> Built:
    """The drafter that ``build`` makes, with a checkpoint's tensors, weights in float32.

    It is made without memory first: nothing is allocated before the tensors are known to be its own.

    Args:
        layers: how many it has by its ``config.json``.

    Raises:
        DrafterError: if it cannot be made, or a tensor is missing, extra, misshapen, of another kind of number or not
            finite; ``where`` names the checkpoint.
    """
    if layers > len(tensors):
        raise DrafterError(
            f"config.json of {where} describes {layers} layers, but there are {len(tensors)} tensors: copy it again."
        )
    try:
        with torch.device("meta"):
            own = build().state_dict()
        _compare(own, tensors, where)
        drafter = build()
    except (TypeError, ValueError, AttributeError, KeyError, ArithmeticError, RuntimeError, MemoryError) as error:
        raise DrafterError(
            f"config.json of {where} describes no drafter that can be built ({shown(str(error))}): copy it again, or "
            "name another."
        ) from error
    drafter.load_state_dict({name: t.float() if t.is_floating_point() else t for name, t in tensors.items()})
    return drafter


def _compare(own: Mapping[str, Tensor], tensors: Mapping[str, Tensor], where: str) -> None:
    """Refuse tensors that are not the drafter's ``own``."""
    _compare_shapes(
        {name: tuple(t.shape) for name, t in own.items()}, {name: tuple(t.shape) for name, t in tensors.items()}, where
    )
    other = [f"{n} {t.dtype}" for n, t in tensors.items() if t.is_floating_point() != own[n].is_floating_point()]
    if other:
        raise DrafterError(
            f"The tensors of {where} have other kinds of number than a drafter's: {listed(sorted(other))}. Quantized "
            "checkpoints are not read: use one in bfloat16, float16 or float32."
        )
    broken = [n for n, t in tensors.items() if t.is_floating_point() and not bool(torch.isfinite(t.float()).all())]
    if broken:
        raise DrafterError(
            f"The tensors {listed(sorted(broken))} of {where} hold NaN or infinity: use an earlier checkpoint, or "
            "train again with a lower learning rate."
        )


def _compare_shapes(own: dict[str, tuple[int, ...]], found: dict[str, tuple[int, ...]], where: str) -> None:
    if own != found:
        missing, extra = sorted(own.keys() - found.keys()), sorted(found.keys() - own.keys())
        shapes = [
            f"{n} {found[n]} instead of {own[n]}" for n in sorted(own.keys() & found.keys()) if own[n] != found[n]
        ]
        raise DrafterError(
            f"The tensors of {where} are not those of its config.json: copy both again. "
            f"Missing: {_few(missing)}; extra: {_few(extra)}; misshapen: {_few(shapes)}."
        )


def _few(names: list[str], most: int = 6) -> str:
    """The first of them, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{[shown(name, 100) for name in names[:most]]}{more}" if names else "none"


def cast(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Weights in another precision, on the CPU; tables stay as they are."""
    return {n: t.detach().to("cpu", dtype if t.is_floating_point() else t.dtype) for n, t in tensors.items()}


def write_checkpoint(directory: Path, raw: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Write ``model.safetensors`` and ``config.json``, each whole or not at all.

    ``checksums.json`` beside them is for :func:`read_checkpoint`; other readers pass over it.

    Raises:
        FileError: if they cannot be written; what was there before stays.
    """
    with writing(directory):
        directory.mkdir(parents=True, exist_ok=True)
        # Until both files are new, nothing is said of either.
        (directory / _CHECKSUMS).unlink(missing_ok=True)
    with replaced(directory / _WEIGHTS) as partial:
        save_file({name: t.contiguous() for name, t in tensors.items()}, partial, metadata={"format": "pt"})
    with replaced(directory / _CONFIG) as partial:
        partial.write_text(json.dumps(raw, indent=2) + "\n", encoding="utf-8")
    write_json(directory / _CHECKSUMS, {name: checksum(directory / name) for name in (_WEIGHTS, _CONFIG)}, FORMAT)
