"""vLLM's ``speculators`` format: a DFlash drafter with its target's embedding and LM head filled in.

The drafter's own tensors keep their names. Layer ids count from the embedding's output, so that layer ``i``'s
output, DFlash's ``i``, is ``i + 1`` here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from draftopd.drafters.dflash import DFlashDrafter
from draftopd.drafters.dflash_format import (
    layer_fields,
    parse_layers,
    read_checkpoint,
    refuse_variants,
    write_checkpoint,
)
from draftopd.errors import DrafterError
from draftopd.interop.target_files import TargetFiles

#: Tensors that are the target's, not the drafter's.
_OF_THE_TARGET = ("embed_tokens.weight", "lm_head.weight", "verifier_norm.weight", "verifier_lm_head.weight")


def write_speculators(
    drafter: DFlashDrafter, directory: Path, target: TargetFiles, name: str, dtype: torch.dtype = torch.bfloat16
) -> None:
    """Write a checkpoint that vLLM and speculators load by itself.

    Args:
        target: the model the drafter was trained for.
        name: how the server finds that model: a hub name, or a directory.

    Raises:
        DrafterError: if the drafter was not made for this target, or taps its last layer.
    """
    _check_pair(drafter, target)
    if target.num_layers - 1 in drafter.target_layer_ids:
        raise DrafterError(
            f"The drafter taps the target's last layer ({target.num_layers - 1}), which the speculators format cannot "
            "say: export it as dflash."
        )
    config = {
        "architectures": ["DFlashSpeculator"],
        "speculators_model_type": "dflash",
        "speculators_version": "0.9.0",
        "transformer_layer_config": layer_fields(drafter.config),
        "draft_vocab_size": target.vocab_size,
        "block_size": drafter.block_size,
        "mask_token_id": drafter.mask_token_id,
        "aux_hidden_state_layer_ids": [i + 1 for i in drafter.target_layer_ids],
        "sample_from_anchor": False,
        "speculators_config": {
            "algorithm": "dflash",
            "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": drafter.num_proposals}],
            "default_proposal_method": "greedy",
            "verifier": {"name_or_path": name, "architectures": target.architectures},
        },
        "tie_word_embeddings": False,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }
    tensors = {n: t.detach().to("cpu", dtype) for n, t in drafter.state_dict().items()}
    tensors["embed_tokens.weight"] = target.embedding().to(dtype)
    tensors["lm_head.weight"] = target.lm_head().to(dtype).clone()
    write_checkpoint(directory, config, tensors)


def read_speculators(directory: Path, target: TargetFiles) -> DFlashDrafter:
    """Read a DFlash drafter in the speculators format.

    Args:
        target: the model it was trained for; the format does not say how deep that is.

    Raises:
        DrafterError: naming what is missing, garbled or not supported.
    """
    raw, tensors = read_checkpoint(directory)
    kind = raw.get("speculators_model_type")
    if kind != "dflash":
        raise DrafterError(f"{directory} holds a speculator of type {kind}, expected dflash.")
    layers = raw.get("transformer_layer_config")
    if not isinstance(layers, dict):
        raise DrafterError(f"config.json of {directory} has no transformer_layer_config.")
    config = parse_layers(layers, str(directory))
    try:
        taps = [int(i) - 1 for i in raw["aux_hidden_state_layer_ids"]]
        extras: dict[str, Any] = {
            "block_size": int(raw["block_size"]),
            "target_layer_ids": tuple(taps),
            "mask_token_id": int(raw["mask_token_id"]),
            "num_target_layers": target.num_layers,
        }
        vocabulary = int(raw.get("draft_vocab_size") or config.vocab_size)
    except (KeyError, TypeError, ValueError) as error:
        raise DrafterError(f"config.json of {directory} lacks or garbles {error}.") from error
    if vocabulary != config.vocab_size or "d2t" in tensors or "t2d" in tensors:
        raise DrafterError(f"{directory} drafts over a reduced vocabulary of {vocabulary}, which DFlash here does not.")
    if raw.get("sample_from_anchor"):
        raise DrafterError(
            f"{directory} also drafts at the anchor's slot (sample_from_anchor), which DFlash here does not."
        )
    if min(taps, default=-1) < 0:
        raise DrafterError(f"{directory} reads the target's embedding (layer id 0), which is no layer's output.")
    refuse_variants(tensors, directory)
    own = {name: tensor for name, tensor in tensors.items() if name not in _OF_THE_TARGET}
    drafter = DFlashDrafter.assemble(config, extras, own, str(directory))
    _check_pair(drafter, target)
    return drafter


def _check_pair(drafter: DFlashDrafter, target: TargetFiles) -> None:
    pairs = (
        ("hidden size", drafter.config.hidden_size, target.hidden_size),
        ("vocabulary", drafter.config.vocab_size, target.vocab_size),
        ("number of target layers", drafter.num_target_layers, target.num_layers),
    )
    for what, mine, its in pairs:
        if mine != its:
            raise DrafterError(
                f"The drafter was made for a target whose {what} is {mine}, but that of {target.path} is {its}: name "
                "the target it was trained with."
            )
    last = max(drafter.target_layer_ids)
    if last >= target.num_layers:
        raise DrafterError(f"The drafter reads target layer {last}, but {target.path} has {target.num_layers} layers.")
