"""The public EAGLE-3 checkpoint (SafeAILab, SpecForge): ``config.json`` and ``model.safetensors``.

Tensor names are the drafter's own parameter names; the embedding is the target's and is stored only where the
drafter has one of its own. Engines count tapped layers in two ways: SGLang names the layer whose output is read
(``eagle_config``), vLLM the layer whose input is (the top-level field, which it looks at first). Where the layers
are the usual ones no checkpoint names them.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from transformers import LlamaConfig

from draftopd.drafters.checkpoint import architecture_of, layer_fields, parse_layers
from draftopd.errors import DrafterError
from draftopd.io.json_text import shown, whole

if TYPE_CHECKING:
    from draftopd.drafters.eagle3 import Eagle3Drafter

#: What the public checkpoints call themselves; the second is vLLM's name.
ARCHITECTURES = ("LlamaForCausalLMEagle3", "Eagle3LlamaForCausalLM")

#: Training-time test of 7 steps, where a checkpoint does not say how many it was trained for.
_USUAL_BLOCK_SIZE = 8


def refuse_others(raw: dict[str, Any], tensors: Iterable[str], where: str) -> None:
    """Refuse other drafters and variants of EAGLE-3, naming what tells.

    Raises:
        DrafterError: if it is any.
    """
    architecture = architecture_of(raw)
    if architecture not in ARCHITECTURES:
        raise DrafterError(
            f"{where} holds a {architecture}, expected a {ARCHITECTURES[0]}: use another drafter= group, or bring it "
            "into this format (python -m draftopd.interop import)."
        )
    options = [name for name in ("fc_norm", "norm_before_fc", "norm_output") if raw.get(name)]
    unusual = sorted(n for n in tensors if "fc_norm" in n or "input_norm" in n or "qkv_proj" in n or "_norm.bias" in n)
    if options or unusual:
        raise DrafterError(
            f"{where} is an EAGLE-3 variant with {options + unusual[:4]}, which this drafter has not: name another."
        )
    if raw.get("num_hidden_layers", 1) != 1:
        raise DrafterError(
            f"{where} has {shown(raw['num_hidden_layers'], 40)} layers; an EAGLE-3 drafter has one: name another."
        )


def parse_config(
    raw: dict[str, Any], where: str, num_target_layers: int | None = None
) -> tuple[LlamaConfig, dict[str, Any]]:
    """Layer config and the drafter's other arguments from an EAGLE-3 ``config.json``.

    ``target_layer_ids`` is None where the checkpoint names no layers.

    Raises:
        DrafterError: if a field is missing or garbled; ``where`` names the checkpoint.
    """
    try:
        depth = raw.get("num_target_layers", num_target_layers)
        if depth is None:
            raise DrafterError(f"{where} does not say how deep its target is: name the target.")
        taps = (raw.get("eagle_config") or {}).get("eagle_aux_hidden_state_layer_ids")
        if raw.get("eagle_aux_hidden_state_layer_ids"):
            taps = [whole(i) - 1 for i in raw["eagle_aux_hidden_state_layer_ids"]]
        extras: dict[str, Any] = {
            "block_size": whole(raw.get("block_size", _USUAL_BLOCK_SIZE)),
            "target_layer_ids": tuple(whole(i) for i in taps) if taps else None,
            "num_target_layers": whole(depth),
            "draft_vocab_size": whole(raw.get("draft_vocab_size") or raw["vocab_size"]),
            "target_hidden_size": whole(raw.get("target_hidden_size") or raw["hidden_size"]),
            "norm_before_residual": bool(raw.get("norm_before_residual", False)),
        }
        for name in ("num_target_layers", "draft_vocab_size", "target_hidden_size"):
            if extras[name] < 1:
                raise ValueError(f"{name}, which is {extras[name]}")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DrafterError(
            f"config.json of {where} lacks or garbles {shown(str(error))}: expected the EAGLE-3 fields, copy it again."
        ) from error
    return parse_layers(LlamaConfig, raw, where), extras


def usual_layers(target_layers: int) -> tuple[int, ...]:
    """The layers that engines tap where a checkpoint names none."""
    return (1, target_layers // 2 - 1, target_layers - 4)


def describe(drafter: Eagle3Drafter) -> dict[str, Any]:
    """The ``config.json`` of a drafter, as plain containers; the tensors' dtype is left out."""
    raw = {
        "architectures": [ARCHITECTURES[0]],
        **layer_fields(drafter.config),
        "draft_vocab_size": drafter.draft_vocab_size,
        "norm_before_residual": drafter.norm_before_residual,
        "block_size": drafter.block_size,
        "num_target_layers": drafter.num_target_layers,
    }
    if drafter.target_hidden_size != drafter.config.hidden_size:
        raw["target_hidden_size"] = drafter.target_hidden_size
    if drafter.target_layer_ids != usual_layers(drafter.num_target_layers):
        taps = list(drafter.target_layer_ids)
        raw["eagle_aux_hidden_state_layer_ids"] = [i + 1 for i in taps]
        raw["eagle_config"] = {"use_aux_hidden_state": True, "eagle_aux_hidden_state_layer_ids": taps}
    return raw
