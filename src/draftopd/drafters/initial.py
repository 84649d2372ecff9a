"""Fresh drafters of a target's shape."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from draftopd.targets.target import Target


def layer_shape(
    target: Target, num_layers: int, intermediate_size: int | None = None, num_heads: int | None = None
) -> dict[str, Any]:
    """Config fields of layers as wide as the target's.

    Args:
        intermediate_size: width of the MLP; default the target's.
        num_heads: attention heads; default the target's. Key/value heads are the target's, but at most this many.
    """
    shape = target.config
    target_heads = shape.num_attention_heads
    heads = num_heads or target_heads
    return {
        "vocab_size": target.vocab_size,
        "hidden_size": shape.hidden_size,
        "num_hidden_layers": num_layers,
        "num_attention_heads": heads,
        "num_key_value_heads": min(shape.num_key_value_heads, heads),
        "head_dim": getattr(shape, "head_dim", None) or shape.hidden_size // target_heads,
        "intermediate_size": intermediate_size or shape.intermediate_size,
        "rms_norm_eps": shape.rms_norm_eps,
        "max_position_embeddings": shape.max_position_embeddings,
        "rope_theta": _rope_theta(shape),
        "tie_word_embeddings": False,
    }


@torch.no_grad()
def draw_weights(drafter: nn.Module, std: float) -> None:
    """Draw normally distributed weights for all linear maps."""
    for module in drafter.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=std)


@torch.no_grad()
def final_norm_weight(target: Target) -> Tensor:
    """``[hidden]``: the scales of the target's final norm, which its LM head expects.

    For an RMSNorm they are its output for ones, because some families store the weight less 1.
    """
    if isinstance(target.body.norm, nn.LayerNorm):
        return target.body.norm.weight.clone()
    ones = torch.ones(target.hidden_size, dtype=target.dtype, device=target.device)
    return target.body.norm(ones)


def _rope_theta(shape: PreTrainedConfig) -> float:
    """The target's rotary base, that of its full-attention layers if there are several."""
    rope = getattr(shape, "rope_parameters", None) or {}
    return float((rope.get("full_attention") or rope).get("rope_theta", 10_000.0))
