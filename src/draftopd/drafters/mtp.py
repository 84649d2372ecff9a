"""MTP: a multi-token-prediction head that reads the target's last states (DeepSeek-V3, arXiv 2412.19437; FastMTP,
arXiv 2509.18362).

The layout is the next-token block of Qwen3-Next, Qwen3.5 and MiMo: the token's embedding and the state before it are
normalised, joined by one linear map, and pass through one Qwen3 decoder layer; its normalised output
goes to the target's LM head and, as the next step's state, around again. Embedding and LM head are the target's,
shared and frozen.
"""

from __future__ import annotations

from typing import Any

import torch
from pydantic import PositiveInt
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import Qwen3MLP, Qwen3RMSNorm, Qwen3RotaryEmbedding
from typing_extensions import Self

from draftopd.drafters.attention import DraftAttention
from draftopd.drafters.autoregressive import AutoregressiveDrafter, Entry
from draftopd.drafters.base import TargetShape
from draftopd.drafters.checkpoint import filled
from draftopd.drafters.initial import draw_weights, final_norm_weight, layer_shape
from draftopd.drafters.mtp_format import OF_THE_TARGET, describe, parse_config
from draftopd.targets.target import Target


class MTPLayer(nn.Module):
    """A Qwen3 decoder layer with the norms and the linear map before it, and the norm after it."""

    def __init__(self, config: Qwen3Config) -> None:
        super().__init__()
        size, eps = config.hidden_size, config.rms_norm_eps
        self.token_layernorm = Qwen3RMSNorm(size, eps)
        self.hidden_layernorm = Qwen3RMSNorm(size, eps)
        self.input_proj = nn.Linear(2 * size, size, bias=False)
        self.input_layernorm = Qwen3RMSNorm(size, eps)
        self.self_attn = DraftAttention(config)
        self.post_attention_layernorm = Qwen3RMSNorm(size, eps)
        self.mlp = Qwen3MLP(config)
        self.final_layernorm = Qwen3RMSNorm(size, eps)


class MTPDrafter(AutoregressiveDrafter):
    """The MTP draft model.

    Args:
        config: Qwen3 fields of its layer; ``hidden_size`` is the target's.
        block_size: anchor plus proposals.
        num_target_layers: depth of the target this drafter was made for.
    """

    reads_final_norm = True

    def __init__(self, config: Qwen3Config, block_size: int, num_target_layers: int) -> None:
        super().__init__()
        self.config = config
        self.block_size = block_size
        self.num_target_layers = num_target_layers
        self.target_layer_ids = (num_target_layers,)
        self.mtp_layers = nn.ModuleList([MTPLayer(config)])
        self.rotary_emb = Qwen3RotaryEmbedding(config)

    @classmethod
    def for_target(
        cls,
        target: Target,
        block_size: int,
        intermediate_size: int | None = None,
        num_heads: int | None = None,
        from_last_layer: bool = True,
    ) -> Self:
        """A fresh drafter: normally distributed weights, the target's final norm.

        Args:
            intermediate_size, num_heads: see :func:`~draftopd.drafters.initial.layer_shape`.
            from_last_layer: begin with the weights of the target's last layer, where it is of the same kind and shape.
        """
        config = Qwen3Config(**layer_shape(target, 1, intermediate_size, num_heads))
        drafter = cls(config, block_size, target.num_layers)
        draw_weights(drafter, config.initializer_range)
        drafter.layer.final_layernorm.weight.data.copy_(final_norm_weight(target))
        if from_last_layer:
            _copy_layer(target.body.layers[-1], drafter.layer)
        drafter.check_fits(target)
        return drafter

    @classmethod
    def build(
        cls,
        target: Target,
        tokenizer: PreTrainedTokenizerBase,
        texts: object = None,
        checkpoint: str | None = None,
        block_size: int | None = None,
        default_block_size: int = 4,
        intermediate_size: PositiveInt | None = None,
        num_heads: PositiveInt | None = None,
        from_last_layer: bool = True,
    ) -> Self:
        """As :meth:`for_target`, or from a checkpoint; refuses a target it does not fit.

        Args:
            checkpoint: directory as :meth:`save` writes it; None starts fresh with the other arguments.
            block_size: with a checkpoint, replaces the one it was trained with.
            default_block_size: of a fresh drafter, where ``block_size`` is None.
        """
        if checkpoint is not None:
            return cls.load_for(target, checkpoint, block_size)
        size = default_block_size if block_size is None else block_size
        return cls.for_target(target, size, intermediate_size, num_heads, from_last_layer)

    @classmethod
    def assemble(
        cls, raw: dict[str, Any], tensors: dict[str, Tensor], where: str, num_target_layers: int | None = None
    ) -> Self:
        config, extras = parse_config(raw, where)
        own = {n: t for n, t in tensors.items() if n not in OF_THE_TARGET}
        return filled(lambda: cls(config, **extras), own, 1, where)

    def describe(self) -> dict[str, Any]:
        return describe(self)

    def made_for(self) -> TargetShape:
        return TargetShape(self.config.hidden_size, self.config.vocab_size, self.num_target_layers)

    @property
    def layer(self) -> MTPLayer:
        layer = self.mtp_layers[0]
        assert isinstance(layer, MTPLayer)
        return layer

    def fuse(self, features: Tensor) -> Tensor:
        return features.to(self.layer.input_proj.weight.dtype)

    def entry(self, target: Target, tokens: Tensor, states: Tensor) -> Entry:
        layer = self.layer
        embedded = layer.token_layernorm(target.embed(tokens).to(states.dtype))
        joined = layer.input_proj(torch.cat([embedded, layer.hidden_layernorm(states)], -1))
        return Entry(layer.input_layernorm(joined), joined)

    def leave(self, output: Tensor) -> tuple[Tensor, Tensor]:
        normed = self.layer.final_layernorm(output)
        return normed, normed


@torch.no_grad()
def _copy_layer(source: nn.Module, layer: MTPLayer) -> None:
    """Copy a decoder layer's weights, where it has just this layer's parts in this layer's shapes."""
    own = {n: p for n, p in layer.named_parameters() if n.startswith(("self_attn", "mlp", "input_l", "post_"))}
    found = dict(source.named_parameters())
    if {n: p.shape for n, p in own.items()} == {n: p.shape for n, p in found.items()}:
        for name, parameter in own.items():
            parameter.copy_(found[name])
