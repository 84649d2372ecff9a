"""MTP: a multi-token-prediction head that reads the target's last states (DeepSeek-V3, arXiv 2412.19437; FastMTP,
arXiv 2509.18362).

The layout is the next-token block of Qwen3-Next, Qwen3.5 and MiMo: the token's embedding and the state before it are
normalised, joined by one linear map, and pass through one Qwen3 decoder layer. Its normalised output is the input of
the target's LM head and the state of the next step. Embedding and LM head are the target's, shared and frozen.

The public format is vLLM's ``speculators`` layout: ``config.json`` and ``model.safetensors``, whose tensor names are
the drafter's own parameter names.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import PositiveInt
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import Qwen3MLP, Qwen3RMSNorm, Qwen3RotaryEmbedding
from typing_extensions import Self

from draftopd.drafters.attention import DraftAttention
from draftopd.drafters.autoregressive import AutoregressiveDrafter, Entry
from draftopd.drafters.checkpoint import load_as
from draftopd.drafters.config import DrafterConfig, architecture_of, layer_fields, parse_layers, reading
from draftopd.drafters.initial import draw_weights, final_norm_weight, layer_shape
from draftopd.errors import DrafterError
from draftopd.io.json_text import shown, whole
from draftopd.targets.shape import TargetShape
from draftopd.targets.target import Target

#: Anchor plus proposals of a fresh drafter: 3 steps.
USUAL_BLOCK_SIZE = 4


@dataclass(frozen=True)
class MTPConfig(DrafterConfig):
    """The ``config.json`` of an MTP head.

    Args:
        layers: Qwen3 fields of its layer; ``hidden_size`` and ``vocab_size`` are the target's.
    """

    layers: Qwen3Config

    architectures = ("MTPDraftModel",)
    reads_final_norm = True

    @classmethod
    def from_json(
        cls, raw: dict[str, Any], where: str, tensors: Collection[str] = (), num_target_layers: int | None = None
    ) -> Self:
        if raw.get("speculators_model_type") != "mtp":
            raise DrafterError(
                f"{where} holds a {architecture_of(raw)}, expected an {cls.architectures[0]}: use another drafter= "
                "group."
            )
        fields = raw.get("transformer_layer_config")
        if not isinstance(fields, dict) or fields.get("model_type") != "qwen3":
            kind = fields.get("model_type") if isinstance(fields, dict) else None
            raise DrafterError(
                f"{where} is an MTP head of {shown(kind or 'unknown', 60)} layers, expected qwen3: name another."
            )
        if raw.get("num_nextn_predict_layers", 1) != 1:
            raise DrafterError(
                f"{where} has {shown(raw['num_nextn_predict_layers'], 40)} layers; an MTP drafter here has one: name "
                "another."
            )
        with reading("MTP", where):
            proposals = whole(raw["speculators_config"]["proposal_methods"][0]["speculative_tokens"])
            # The file describes the target's layers.
            depth = whole(fields["num_hidden_layers"])
        own = {name: value for name, value in fields.items() if name not in ("layer_types", "num_hidden_layers")}
        layers = parse_layers(Qwen3Config, own | {"num_hidden_layers": 1}, where)
        return cls(TargetShape(layers.hidden_size, layers.vocab_size, depth), proposals + 1, (depth,), layers)

    def to_json(self, verifier: str | None = None, architectures: list[str] | None = None) -> dict[str, Any]:
        """The ``config.json`` as plain containers; the tensors' dtype is left out.

        Args:
            verifier: how a server finds the target: a hub name, or a directory.
            architectures: the target's.
        """
        depth = self.target.num_layers
        layers = layer_fields(self.layers) | {"num_hidden_layers": depth, "layer_types": ["full_attention"] * depth}
        return {
            "architectures": [self.architectures[0]],
            "speculators_model_type": "mtp",
            "speculators_version": "0.9.0",
            "transformer_layer_config": layers,
            "num_nextn_predict_layers": 1,
            "speculators_config": {
                "algorithm": "mtp",
                "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": self.block_size - 1}],
                "default_proposal_method": "greedy",
                "verifier": {"name_or_path": verifier, "architectures": architectures or []},
            },
            "tie_word_embeddings": False,
        }

    @property
    def ignored_tensors(self) -> tuple[str, ...]:
        return ("embed_tokens.weight", "lm_head.weight", "verifier_lm_head.weight")  # the target's


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
    """The MTP draft model."""

    kind = "mtp"
    config_class = MTPConfig

    def __init__(self, config: MTPConfig) -> None:
        super().__init__(config)
        self.mtp_layers = nn.ModuleList([MTPLayer(config.layers)])
        self.rotary_emb = Qwen3RotaryEmbedding(config.layers)

    @classmethod
    def build(
        cls,
        target: Target,
        tokenizer: PreTrainedTokenizerBase,
        texts: object = None,
        checkpoint: str | None = None,
        block_size: int | None = None,
        intermediate_size: PositiveInt | None = None,
        num_heads: PositiveInt | None = None,
        from_last_layer: bool = True,
        activation_checkpointing: bool = False,
    ) -> Self:
        """The drafter of a checkpoint, or a fresh one, checked against the target.

        A fresh one has normally distributed weights and the target's final norm.

        Args:
            checkpoint: directory as training writes it; None starts fresh with the other arguments.
            block_size: with a checkpoint, replaces the one it was trained with; default :data:`USUAL_BLOCK_SIZE`.
            intermediate_size, num_heads: see :func:`~draftopd.drafters.initial.layer_shape`.
            from_last_layer: begin with the weights of the target's last layer, if its kind and shape are the same.
        """
        if checkpoint is not None:
            drafter = load_as(cls, target, checkpoint, block_size)
        else:
            layers = Qwen3Config(**layer_shape(target, 1, intermediate_size, num_heads))
            size = USUAL_BLOCK_SIZE if block_size is None else block_size
            drafter = cls(MTPConfig(target.shape, size, (target.num_layers,), layers))
            draw_weights(drafter, layers.initializer_range)
            drafter.layer.final_layernorm.weight.data.copy_(final_norm_weight(target))
            if from_last_layer:
                _copy_layer(target.body.layers[-1], drafter.layer)
            drafter.config.check_fits(target.shape)
        drafter.activation_checkpointing = activation_checkpointing
        return drafter

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
    """Copy a decoder layer's weights, if it has the same parts in the same shapes."""
    own = {n: p for n, p in layer.named_parameters() if n.startswith(("self_attn", "mlp", "input_l", "post_"))}
    found = dict(source.named_parameters())
    if {n: p.shape for n, p in own.items()} == {n: p.shape for n, p in found.items()}:
        for name, parameter in own.items():
            parameter.copy_(found[name])
