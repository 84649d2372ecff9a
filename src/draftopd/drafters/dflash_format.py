"""The public DFlash checkpoint: ``config.json`` and ``model.safetensors``.

Tensor names are the drafter's own parameter names; embedding and LM head are the target's and are
not stored. Newer releases keep ``block_size`` inside ``dflash_config``: both places are read.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Qwen3Config

from draftopd.errors import DrafterError
from draftopd.files import replaced
from draftopd.targets.hub import resolve

if TYPE_CHECKING:
    from draftopd.drafters.dflash import DFlashDrafter

#: Qwen3 fields that describe the drafter's own layers.
_LAYER_FIELDS = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "intermediate_size", "rms_norm_eps", "max_position_embeddings", "vocab_size", "hidden_act",
    "attention_bias", "attention_dropout", "initializer_range", "layer_types", "sliding_window",
    "use_sliding_window", "max_window_layers",
)  # fmt: skip


def read_dflash(directory: Path) -> tuple[Qwen3Config, dict[str, Any], dict[str, Tensor]]:
    """Layer config, the drafter's other arguments, and the tensors as stored.

    Raises:
        DrafterError: if the directory is no DFlash checkpoint that can be read.
    """
    directory = Path(resolve(str(directory)))
    raw, tensors = read_checkpoint(directory)
    architecture = (raw.get("architectures") or ["?"])[0]
    if architecture != "DFlashDraftModel":
        raise DrafterError(
            f"{directory} holds a {architecture}, expected a DFlashDraftModel: use another drafter= group, or bring it "
            "into this format (python -m draftopd.interop import)."
        )
    refuse_variants(tensors, directory)
    return *parse_config(raw, str(directory)), tensors


def read_checkpoint(directory: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The JSON object of ``config.json`` and the tensors of ``model.safetensors``.

    Raises:
        DrafterError: if one is missing or damaged.
    """
    try:
        raw = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        tensors = load_file(directory / "model.safetensors")
    except FileNotFoundError as error:
        raise DrafterError(
            f"No drafter in {directory}: {Path(error.filename or 'model.safetensors').name} is missing. "
            "Name a directory with config.json and model.safetensors."
        ) from error
    except (json.JSONDecodeError, UnicodeDecodeError, SafetensorError, OSError) as error:
        raise DrafterError(f"The drafter in {directory} cannot be read: {error}. Copy or train it again.") from error
    if not isinstance(raw, dict):
        raise DrafterError(f"config.json of {directory} is no JSON object: expected the DFlash fields.")
    return raw, tensors


def refuse_variants(tensors: Iterable[str], where: object) -> None:
    """Refuse third-party variants of DFlash, naming the tensors that tell.

    Raises:
        DrafterError: if there are any.
    """
    unusual = sorted(n for n in tensors if "qkv_proj" in n or "g_proj" in n or "aux_hidden_norms" in n)
    if unusual:
        raise DrafterError(f"{where} is a DFlash variant with {unusual[:4]}, which this drafter does not have.")


def parse_config(raw: dict[str, Any], where: str) -> tuple[Qwen3Config, dict[str, Any]]:
    """Layer config and the drafter's other arguments from a DFlash ``config.json``.

    Raises:
        DrafterError: if a field is missing or garbled; ``where`` names the checkpoint.
    """
    dflash = raw.get("dflash_config") or {}
    try:
        extras = {
            "block_size": int(raw["block_size"] if "block_size" in raw else dflash["block_size"]),
            "target_layer_ids": tuple(int(i) for i in dflash["target_layer_ids"]),
            "mask_token_id": int(dflash["mask_token_id"]),
            "num_target_layers": int(raw["num_target_layers"]),
        }
    except (KeyError, TypeError, ValueError) as error:
        raise DrafterError(f"config.json of {where} lacks or garbles {error}: expected the DFlash fields.") from error
    return parse_layers(raw, where), extras


def parse_layers(raw: dict[str, Any], where: str) -> Qwen3Config:
    """The Qwen3 fields of the drafter's own layers.

    Raises:
        DrafterError: if they describe no layers that this drafter has.
    """
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    rope = {"rope_type": rope.get("type", "default"), **rope}
    rope["rope_theta"] = raw.get("rope_theta") or rope.get("rope_theta", 10_000.0)
    try:
        config = Qwen3Config(
            **{name: raw[name] for name in _LAYER_FIELDS if raw.get(name) is not None},
            rope_parameters=rope,
            tie_word_embeddings=False,
        )
    except (TypeError, ValueError, StrictDataclassError) as error:
        raise DrafterError(f"config.json of {where} describes no Qwen3 layers: {error}") from error
    if set(config.layer_types) != {"full_attention"}:
        raise DrafterError(f"{where} has sliding-window layers, which this drafter does not have.")
    return config


def layer_fields(config: Qwen3Config) -> dict[str, Any]:
    """The Qwen3 fields of the drafter's own layers, as its ``config.json`` has them."""
    rope = dict(config.rope_parameters)
    theta = rope.pop("rope_theta")
    return {
        "model_type": "qwen3",
        **{name: getattr(config, name) for name in _LAYER_FIELDS},
        "rope_theta": theta,
        "rope_scaling": None if rope.get("rope_type", "default") == "default" else rope,
        "tie_word_embeddings": False,
    }


def describe(drafter: DFlashDrafter) -> dict[str, Any]:
    """The ``config.json`` of a drafter, as plain containers; the tensors' dtype is left out."""
    return {
        "architectures": ["DFlashDraftModel"],
        "auto_map": {"AutoModel": "dflash.DFlashDraftModel"},
        **layer_fields(drafter.config),
        "block_size": drafter.block_size,
        "num_target_layers": drafter.num_target_layers,
        "dflash_config": {
            "mask_token_id": drafter.mask_token_id,
            "target_layer_ids": list(drafter.target_layer_ids),
        },
    }


def write_dflash(drafter: DFlashDrafter, directory: Path, dtype: torch.dtype) -> None:
    """Write the checkpoint; the directory's former files stay whole until the new ones are."""
    raw = describe(drafter) | {"torch_dtype": str(dtype).removeprefix("torch.")}
    tensors = {name: t.detach().to("cpu", dtype) for name, t in drafter.state_dict().items()}
    write_checkpoint(directory, raw, tensors)


def write_checkpoint(directory: Path, raw: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Write ``model.safetensors`` and ``config.json``, each whole or not at all."""
    directory.mkdir(parents=True, exist_ok=True)
    with replaced(directory / "model.safetensors") as partial:
        save_file({name: t.contiguous() for name, t in tensors.items()}, partial, metadata={"format": "pt"})
    with replaced(directory / "config.json") as partial:
        partial.write_text(json.dumps(raw, indent=2) + "\n", encoding="utf-8")
