"""The public DFlash checkpoint: ``config.json`` and ``model.safetensors``.

Tensor names are the drafter's own parameter names; embedding and LM head are the target's and are
not stored. Newer releases keep ``block_size`` inside ``dflash_config``: both places are read.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from transformers import Qwen3Config

from draftopd.drafters.checkpoint import architecture_of, layer_fields, parse_layers
from draftopd.errors import DrafterError
from draftopd.io.json_text import shown, whole

if TYPE_CHECKING:
    from draftopd.drafters.dflash import DFlashDrafter

#: What the public checkpoints call themselves.
ARCHITECTURE = "DFlashDraftModel"


def refuse_others(raw: dict[str, Any], tensors: Iterable[str], where: str) -> None:
    """Refuse other drafters and third-party variants of DFlash, naming what tells.

    Raises:
        DrafterError: if it is any.
    """
    architecture = architecture_of(raw)
    if architecture != ARCHITECTURE:
        raise DrafterError(
            f"{where} holds a {architecture}, expected a {ARCHITECTURE}: use another drafter= group, or bring it "
            "into this format (python -m draftopd.interop import)."
        )
    unusual = sorted(n for n in tensors if "qkv_proj" in n or "g_proj" in n or "aux_hidden_norms" in n)
    if unusual:
        raise DrafterError(
            f"{where} is a DFlash variant with {unusual[:4]}, which this drafter does not have: name another."
        )


def parse_config(raw: dict[str, Any], where: str) -> tuple[Qwen3Config, dict[str, Any]]:
    """Layer config and the drafter's other arguments from a DFlash ``config.json``.

    Raises:
        DrafterError: if a field is missing or garbled; ``where`` names the checkpoint.
    """
    dflash = raw.get("dflash_config") or {}
    try:
        extras = {
            "block_size": whole(raw["block_size"] if "block_size" in raw else dflash["block_size"]),
            "target_layer_ids": tuple(whole(i) for i in dflash["target_layer_ids"]),
            "mask_token_id": whole(dflash["mask_token_id"]),
            "num_target_layers": whole(raw["num_target_layers"]),
        }
        if not extras["target_layer_ids"]:
            raise ValueError("target_layer_ids, which is empty")
    except (KeyError, TypeError, ValueError) as error:
        raise DrafterError(
            f"config.json of {where} lacks or garbles {shown(str(error))}: expected the DFlash fields, copy it again."
        ) from error
    return parse_layers(Qwen3Config, raw, where), extras


def describe(drafter: DFlashDrafter) -> dict[str, Any]:
    """The ``config.json`` of a drafter, as plain containers; the tensors' dtype is left out."""
    return {
        "architectures": [ARCHITECTURE],
        "auto_map": {"AutoModel": "dflash.DFlashDraftModel"},
        **layer_fields(drafter.config),
        "block_size": drafter.block_size,
        "num_target_layers": drafter.num_target_layers,
        "dflash_config": {
            "mask_token_id": drafter.mask_token_id,
            "target_layer_ids": list(drafter.target_layer_ids),
        },
    }
