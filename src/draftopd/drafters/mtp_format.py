"""An MTP head by itself, in vLLM's ``speculators`` layout: ``config.json`` and ``model.safetensors``.

Tensor names are the drafter's own parameter names; embedding and LM head are the target's. The layer's config is the
target's, so its ``num_hidden_layers`` is the target's depth.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers import Qwen3Config

from draftopd.drafters.checkpoint import architecture_of, layer_fields, parse_layers
from draftopd.errors import DrafterError
from draftopd.io.json_text import shown, whole

if TYPE_CHECKING:
    from draftopd.drafters.mtp import MTPDrafter

ARCHITECTURE = "MTPDraftModel"

#: Tensors that are the target's, not the drafter's.
OF_THE_TARGET = ("embed_tokens.weight", "lm_head.weight", "verifier_lm_head.weight")


def parse_config(raw: dict[str, Any], where: str) -> tuple[Qwen3Config, dict[str, Any]]:
    """Layer config and the drafter's other arguments from an MTP ``config.json``.

    Raises:
        DrafterError: if a field is missing or garbled, or the head is of another family; ``where`` names it.
    """
    if raw.get("speculators_model_type") != "mtp":
        raise DrafterError(
            f"{where} holds a {architecture_of(raw)}, expected an {ARCHITECTURE}: use another drafter= group."
        )
    layers = raw.get("transformer_layer_config")
    if not isinstance(layers, dict) or layers.get("model_type") != "qwen3":
        kind = layers.get("model_type") if isinstance(layers, dict) else None
        raise DrafterError(
            f"{where} is an MTP head of {shown(kind or 'unknown', 60)} layers, expected qwen3: name another."
        )
    if raw.get("num_nextn_predict_layers", 1) != 1:
        raise DrafterError(
            f"{where} has {shown(raw['num_nextn_predict_layers'], 40)} layers; an MTP drafter here has one: name "
            "another."
        )
    try:
        proposals = whole(raw["speculators_config"]["proposal_methods"][0]["speculative_tokens"])
        depth = whole(layers["num_hidden_layers"])
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise DrafterError(
            f"config.json of {where} lacks or garbles {shown(str(error))}: expected the MTP fields, copy it again."
        ) from error
    own = {name: value for name, value in layers.items() if name not in ("layer_types", "num_hidden_layers")}
    config = parse_layers(Qwen3Config, own | {"num_hidden_layers": 1}, where)
    return config, {"block_size": proposals + 1, "num_target_layers": depth}


def describe(
    drafter: MTPDrafter, verifier: str | None = None, architectures: list[str] | None = None
) -> dict[str, Any]:
    """The ``config.json`` of a drafter, as plain containers; the tensors' dtype is left out.

    Args:
        verifier: how a server finds the target: a hub name, or a directory.
        architectures: the target's.
    """
    depth = drafter.num_target_layers
    layers = layer_fields(drafter.config) | {"num_hidden_layers": depth, "layer_types": ["full_attention"] * depth}
    return {
        "architectures": [ARCHITECTURE],
        "speculators_model_type": "mtp",
        "speculators_version": "0.9.0",
        "transformer_layer_config": layers,
        "num_nextn_predict_layers": 1,
        "speculators_config": {
            "algorithm": "mtp",
            "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": drafter.num_proposals}],
            "default_proposal_method": "greedy",
            "verifier": {"name_or_path": verifier, "architectures": architectures or []},
        },
        "tie_word_embeddings": False,
    }
