"""What drafter checkpoints have in common: ``config.json`` and ``model.safetensors`` in one directory."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedConfig

from draftopd.errors import DrafterError, FileError
from draftopd.files import checksum, read_json, replaced, write_json, writing

log = logging.getLogger(__name__)

_CONFIG, _WEIGHTS = "config.json", "model.safetensors"

#: Beside the two files of the public format, which have no room for it: their checksums, and its own format.
_CHECKSUMS, FORMAT = "checksums.json", 1

Config = TypeVar("Config", bound=PreTrainedConfig)

#: Fields that describe a drafter's own layers.
_LAYER_FIELDS = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "intermediate_size", "rms_norm_eps", "max_position_embeddings", "vocab_size", "hidden_act",
    "attention_bias", "mlp_bias", "attention_dropout", "initializer_range", "layer_types", "sliding_window",
    "use_sliding_window", "max_window_layers",
)  # fmt: skip


def read_checkpoint(directory: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The JSON object of ``config.json`` and the tensors of ``model.safetensors``.

    Raises:
        DrafterError: if one is missing or damaged.
    """
    try:
        raw = json.loads((directory / _CONFIG).read_text(encoding="utf-8"))
        tensors = load_file(directory / _WEIGHTS)
        _compare(directory)
    except FileNotFoundError as error:
        raise DrafterError(
            f"No drafter in {directory}: {Path(error.filename or 'model.safetensors').name} is missing. "
            "Name a directory with config.json and model.safetensors."
        ) from error
    except (json.JSONDecodeError, UnicodeDecodeError, SafetensorError, OSError) as error:
        raise DrafterError(f"The drafter in {directory} cannot be read: {error}. Copy or train it again.") from error
    if not isinstance(raw, dict):
        raise DrafterError(f"config.json of {directory} is no JSON object: expected a drafter's fields.")
    return raw, tensors


def _compare(directory: Path) -> None:
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
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    rope = {"rope_type": rope.get("type", "default"), **rope}
    rope["rope_theta"] = raw.get("rope_theta") or rope.get("rope_theta", 10_000.0)
    try:
        config = kind(
            **{name: raw[name] for name in _LAYER_FIELDS if raw.get(name) is not None},
            rope_parameters=rope,
            tie_word_embeddings=False,
        )
    except (TypeError, ValueError, StrictDataclassError) as error:
        raise DrafterError(f"config.json of {where} describes no {kind.model_type} layers: {error}") from error
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"}:
        raise DrafterError(f"{where} has sliding-window layers, which this drafter does not have.")
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


def fill(drafter: nn.Module, tensors: Mapping[str, Tensor], where: str) -> None:
    """Load a drafter's tensors, weights in float32.

    Raises:
        DrafterError: if a tensor is missing, extra or misshapen; ``where`` names the checkpoint.
    """
    own = {name: tuple(p.shape) for name, p in drafter.state_dict().items()}
    found = {name: tuple(t.shape) for name, t in tensors.items()}
    if own != found:
        missing, extra = sorted(own.keys() - found.keys()), sorted(found.keys() - own.keys())
        shapes = [
            f"{n} {found[n]} instead of {own[n]}" for n in sorted(own.keys() & found.keys()) if own[n] != found[n]
        ]
        raise DrafterError(
            f"The tensors of {where} are not those of its config.json. "
            f"Missing: {missing or 'none'}; extra: {extra or 'none'}; misshapen: {shapes or 'none'}."
        )
    drafter.load_state_dict({name: t.float() if t.is_floating_point() else t for name, t in tensors.items()})


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
