"""vLLM's ``speculators`` format: a drafter together with the target's tensors that it reads.

The drafter's public format is translated to and from it: ``config.json``, and the few tensor names that differ. This
format counts tapped layers from the embedding's output, so that the output of layer ``i`` has the id ``i + 1``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from draftopd.drafters.base import Drafter
from draftopd.drafters.checkpoint import read_checkpoint, write_checkpoint
from draftopd.drafters.config import DrafterConfig, layer_fields
from draftopd.drafters.dflash import DFlashConfig
from draftopd.drafters.eagle3 import Eagle3Config
from draftopd.drafters.load import assemble
from draftopd.drafters.mtp import MTPConfig
from draftopd.errors import DrafterError
from draftopd.interop.target_files import TargetFiles
from draftopd.io.json_text import shown, whole

#: Tensors of a DFlash speculator that are the target's.
_OF_THE_TARGET = ("embed_tokens.weight", "lm_head.weight", "verifier_norm.weight", "verifier_lm_head.weight")


def write_speculators(
    drafter: Drafter, directory: Path, target: TargetFiles, name: str, dtype: torch.dtype = torch.bfloat16
) -> None:
    """Write a checkpoint that vLLM and speculators load without further files.

    Args:
        target: the model the drafter was trained for.
        name: hub name or directory from which the server loads that model.

    Raises:
        DrafterError: if the drafter does not fit this target, or the format does not support its kind, a tapped last
            layer, or a target that scales its embeddings.
    """
    drafter.config.check_fits(target.shape)
    if str(target.config.get("model_type", "")).startswith("gemma"):
        raise DrafterError(
            f"{target.path} scales its embeddings, which the speculators format does not support: export the drafter "
            "in its public format."
        )
    tensors, config = dict(drafter.state_dict()), drafter.config
    if isinstance(config, DFlashConfig):
        raw = _dflash_json(config, target, name)
        tensors["embed_tokens.weight"] = target.embedding()
        tensors["lm_head.weight"] = target.lm_head().clone()
    elif isinstance(config, Eagle3Config):
        raw = _eagle3_json(config, target, name)
        tensors = {n.replace("midlayer.", "layers.0."): t for n, t in tensors.items()}
        tensors.setdefault("embed_tokens.weight", target.embedding())
    elif isinstance(config, MTPConfig):
        raw = config.to_json(name, target.architectures)
    else:
        raise DrafterError(f"The speculators format does not support {type(drafter).__name__}: use the public format.")
    write_checkpoint(directory, raw, tensors, dtype)


def read_speculators(directory: Path, target: TargetFiles) -> Drafter:
    """Read a drafter in the speculators format.

    Args:
        target: the model it was trained for, whose number of layers the format does not give.

    Raises:
        DrafterError: if something is missing, garbled or not supported.
    """
    raw, tensors = read_checkpoint(directory)
    kind = raw.get("speculators_model_type")
    if not isinstance(raw.get("transformer_layer_config"), dict):
        raise DrafterError(f"config.json of {directory} has no transformer_layer_config: copy it again.")
    try:
        if kind == "dflash":
            raw = _from_dflash(raw, tensors, target, directory)
            tensors = {name: tensor for name, tensor in tensors.items() if name not in _OF_THE_TARGET}
        elif kind == "eagle3":
            raw, tensors = _from_eagle3(raw, tensors, target)
        elif kind != "mtp":
            raise DrafterError(
                f"{directory} holds a speculator of type {shown(kind, 40)}, expected dflash, eagle3 or mtp: name "
                "another."
            )
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise DrafterError(
            f"config.json of {directory} lacks or garbles {shown(str(error))}: copy or export it again."
        ) from error
    drafter = assemble(raw, tensors, str(directory), target.shape.num_layers)
    drafter.config.check_fits(target.shape)
    return drafter


def _common(config: DrafterConfig, algorithm: str, target: TargetFiles, name: str) -> dict[str, Any]:
    return {
        "speculators_model_type": algorithm,
        "speculators_version": "0.9.0",
        "speculators_config": {
            "algorithm": algorithm,
            "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": config.block_size - 1}],
            "default_proposal_method": "greedy",
            "verifier": {"name_or_path": name, "architectures": target.architectures},
        },
        "tie_word_embeddings": False,
    }


def _dflash_json(config: DFlashConfig, target: TargetFiles, name: str) -> dict[str, Any]:
    last = target.shape.num_layers - 1
    if last in config.target_layer_ids:
        raise DrafterError(
            f"The drafter taps the target's last layer ({last}), which the speculators format does not support: export "
            "it in its public format."
        )
    return {
        "architectures": ["DFlashSpeculator"],
        **_common(config, "dflash", target, name),
        "transformer_layer_config": layer_fields(config.layers),
        "draft_vocab_size": target.shape.vocab_size,
        "block_size": config.block_size,
        "mask_token_id": config.mask_token_id,
        "aux_hidden_state_layer_ids": [i + 1 for i in config.target_layer_ids],
        "sample_from_anchor": False,
    }


def _from_dflash(
    raw: dict[str, Any], tensors: dict[str, Tensor], target: TargetFiles, directory: Path
) -> dict[str, Any]:
    layers = raw["transformer_layer_config"]
    vocabulary = whole(raw.get("draft_vocab_size") or layers["vocab_size"])
    if vocabulary != layers["vocab_size"] or "d2t" in tensors or "t2d" in tensors:
        raise DrafterError(f"{directory} drafts over a reduced vocabulary of {vocabulary}, which DFlash here does not.")
    if raw.get("sample_from_anchor"):
        raise DrafterError(
            f"{directory} also drafts at the anchor's slot (sample_from_anchor), which DFlash here does not."
        )
    taps = [whole(i) - 1 for i in raw["aux_hidden_state_layer_ids"]]
    if min(taps, default=-1) < 0:
        raise DrafterError(f"{directory} reads the target's embedding (layer id 0), which is not a layer's output.")
    return {
        **layers,
        "architectures": [DFlashConfig.architectures[0]],
        "block_size": raw["block_size"],
        "num_target_layers": target.shape.num_layers,
        "dflash_config": {"mask_token_id": raw["mask_token_id"], "target_layer_ids": taps},
    }


def _eagle3_json(config: Eagle3Config, target: TargetFiles, name: str) -> dict[str, Any]:
    return {
        "architectures": ["Eagle3Speculator"],
        **_common(config, "eagle3", target, name),
        "transformer_layer_config": layer_fields(config.layers),
        "draft_vocab_size": config.draft_vocab_size,
        "target_hidden_size": config.target.hidden_size,
        "norm_before_residual": config.norm_before_residual,
        "eagle_aux_hidden_state_layer_ids": [i + 1 for i in config.target_layer_ids],
    }


def _from_eagle3(
    raw: dict[str, Any], tensors: dict[str, Tensor], target: TargetFiles
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    own = ("draft_vocab_size", "target_hidden_size", "norm_before_residual", "eagle_aux_hidden_state_layer_ids")
    variants = ("fc_norm", "norm_before_fc", "norm_output")
    proposals = whole(raw["speculators_config"]["proposal_methods"][0]["speculative_tokens"])
    config = {
        **raw["transformer_layer_config"],
        **{name: raw[name] for name in (*own, *variants) if raw.get(name) is not None},
        "architectures": [Eagle3Config.architectures[0]],
        "block_size": proposals + 1,
        "num_target_layers": target.shape.num_layers,
    }
    tensors = {n.replace("layers.0.", "midlayer."): t for n, t in tensors.items() if not n.startswith("verifier_")}
    embedding = tensors.get("embed_tokens.weight")
    if embedding is not None:
        theirs = target.embedding().to(embedding.dtype)
        if embedding.shape == theirs.shape and torch.equal(embedding, theirs):
            del tensors["embed_tokens.weight"]  # a copy of the target's
    return config, tensors
