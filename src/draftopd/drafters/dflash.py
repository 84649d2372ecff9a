"""DFlash: block-diffusion drafting (arXiv 2602.06036).

The block ``[anchor, mask, ..., mask]`` passes once through a few Qwen3-like layers, which gives K proposals. Attention
inside the block is bidirectional; the target's tapped hidden states are extra keys and values of every layer. Embedding
and LM head are the target's, shared, frozen, and not stored. A public checkpoint is ``config.json`` and
``model.safetensors``, whose tensor names are the drafter's own parameter names.
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

from draftopd.drafters.attention import DraftAttention, Kernel, KeysValues, Rotary, View, uses_flex
from draftopd.drafters.base import Chooser, Draft, Drafter
from draftopd.drafters.checkpoint import load_as
from draftopd.drafters.config import DrafterConfig, check_architecture, layer_fields, parse_layers, reading
from draftopd.drafters.initial import draw_weights, final_norm_weight, layer_shape
from draftopd.drafters.recompute import run_layer
from draftopd.errors import DrafterError
from draftopd.io.json_text import whole
from draftopd.targets.cache import PositionStore
from draftopd.targets.shape import TargetShape
from draftopd.targets.target import Target

#: Parts of tensor names that identify third-party variants of DFlash.
_VARIANTS = ("qkv_proj", "g_proj", "aux_hidden_norms")


@dataclass(frozen=True)
class DFlashConfig(DrafterConfig):
    """A DFlash ``config.json``.

    Args:
        layers: Qwen3 fields of the drafter's own layers; ``hidden_size`` and ``vocab_size`` are the target's.
        mask_token_id: token in the slots to be proposed; its embedding is the target's row.
    """

    layers: Qwen3Config
    mask_token_id: int

    architectures = ("DFlashDraftModel",)

    @classmethod
    def from_json(
        cls, raw: dict[str, Any], where: str, tensors: Collection[str] = (), num_target_layers: int | None = None
    ) -> Self:
        check_architecture(cls, raw, where)
        unusual = sorted(name for name in tensors if any(part in name for part in _VARIANTS))
        if unusual:
            raise DrafterError(
                f"{where} is a DFlash variant with {unusual[:4]}, which this drafter does not have: name another."
            )
        with reading("DFlash", where):
            dflash = raw.get("dflash_config") or {}
            # Newer releases have the block size among DFlash's own fields.
            block_size = whole(raw["block_size"] if "block_size" in raw else dflash["block_size"])
            taps = tuple(whole(i) for i in dflash["target_layer_ids"])
            mask_token_id, depth = whole(dflash["mask_token_id"]), whole(raw["num_target_layers"])
            if not taps:
                raise ValueError("target_layer_ids, which is empty")
        layers = parse_layers(Qwen3Config, raw, where)
        target = TargetShape(layers.hidden_size, layers.vocab_size, depth)
        return cls(target, block_size, taps, layers, mask_token_id)

    def to_json(self) -> dict[str, Any]:
        return {
            "architectures": [self.architectures[0]],
            "auto_map": {"AutoModel": "dflash.DFlashDraftModel"},
            **layer_fields(self.layers),
            "block_size": self.block_size,
            "num_target_layers": self.target.num_layers,
            "dflash_config": {"mask_token_id": self.mask_token_id, "target_layer_ids": list(self.target_layer_ids)},
        }

    @property
    def num_layers(self) -> int:
        return self.layers.num_hidden_layers

    def check_fits(self, target: TargetShape) -> None:
        super().check_fits(target)
        if not 0 <= self.mask_token_id < target.vocab_size:
            raise DrafterError(
                f"mask_token_id {self.mask_token_id} lies outside the target's vocabulary of {target.vocab_size}: "
                "choose an unused id inside it (drafter.mask_token_id)."
            )


def usual_block_size(target_layers: int) -> int:
    """Anchor plus proposals of a fresh drafter: 16 as in the DFlash release, 8 for targets of fewer than 12 layers."""
    return 16 if target_layers >= 12 else 8


def default_target_layers(drafter_layers: int, target_layers: int) -> tuple[int, ...]:
    """The target layers to tap: the middle one, or distinct ones spread evenly from 1 to N - 3."""
    if drafter_layers == 1 or target_layers < 5:
        return (target_layers // 2,)
    last = target_layers - 3
    spread = (round(1 + i * (last - 1) / (drafter_layers - 1)) for i in range(drafter_layers))
    return tuple(dict.fromkeys(spread))


def unused_token(target: Target, tokenizer: PreTrainedTokenizerBase) -> int:
    """A token for the slots to be proposed: the tokenizer's mask token, else its first unused id, else padding.

    For Qwen3 that is 151669, as in the public DFlash checkpoints.
    """
    if tokenizer.mask_token_id is not None:
        return int(tokenizer.mask_token_id)
    if len(tokenizer) < target.vocab_size:
        return len(tokenizer)
    return int(tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id)


class DFlashLayer(nn.Module):
    def __init__(self, config: Qwen3Config) -> None:
        super().__init__()
        self.self_attn = DraftAttention(config)
        self.mlp = Qwen3MLP(config)
        self.input_layernorm = Qwen3RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = Qwen3RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, block: Tensor, context: KeysValues | None, view: View, rotary: Rotary) -> Tensor:
        """``block [batch, A * B, hidden]``; see :func:`~draftopd.drafters.attention.block_attention`."""
        normed = self.input_layernorm(block)
        keys, values = (t.unflatten(2, (view.ends.shape[1], -1)) for t in self.self_attn.keys_values(normed, rotary))
        block = block + self.self_attn(normed, context, (keys, values), view, rotary)
        return block + self.mlp(self.post_attention_layernorm(block))


class DFlashDrafter(Drafter):
    """The DFlash draft model."""

    kind = "dflash"
    config_class = DFlashConfig
    config: DFlashConfig
    #: The kernel that attends in ``replay``.
    attention: Kernel = "auto"
    #: See :func:`~draftopd.drafters.recompute.run_layer`.
    activation_checkpointing = False

    def __init__(self, config: DFlashConfig) -> None:
        super().__init__(config)
        layers, size = config.layers, config.target.hidden_size
        self.layers = nn.ModuleList(DFlashLayer(layers) for _ in range(layers.num_hidden_layers))
        self.fc = nn.Linear(len(config.target_layer_ids) * size, size, bias=False)
        self.hidden_norm = Qwen3RMSNorm(size, layers.rms_norm_eps)
        self.norm = Qwen3RMSNorm(size, layers.rms_norm_eps)
        self.rotary_emb = Qwen3RotaryEmbedding(layers)

    @classmethod
    def build(
        cls,
        target: Target,
        tokenizer: PreTrainedTokenizerBase,
        texts: object = None,
        checkpoint: str | None = None,
        block_size: int | None = None,
        num_layers: PositiveInt = 5,
        mask_token_id: int | None = None,
        target_layer_ids: list[int] | None = None,
        intermediate_size: PositiveInt | None = None,
        num_heads: PositiveInt | None = None,
        attention: Kernel = "auto",
        activation_checkpointing: bool = False,
    ) -> Self:
        """The drafter of a checkpoint, or a fresh one, checked against the target.

        A fresh one is as wide as the target. Its weights are normally distributed; its last norm is the target's.

        Args:
            checkpoint: directory in the public DFlash layout; None starts fresh with the arguments up to ``num_heads``.
            block_size: with a checkpoint, replaces the one it was trained with; default :func:`usual_block_size`.
            num_layers: depth of the drafter.
            mask_token_id: default :func:`unused_token`, which alone needs the tokenizer.
            target_layer_ids: default :func:`default_target_layers`.
            intermediate_size, num_heads: see :func:`~draftopd.drafters.initial.layer_shape`.
        """
        if checkpoint is not None:
            drafter = load_as(cls, target, checkpoint, block_size)
        else:
            layers = Qwen3Config(**layer_shape(target, num_layers, intermediate_size, num_heads))
            size = usual_block_size(target.num_layers) if block_size is None else block_size
            taps = tuple(target_layer_ids or default_target_layers(num_layers, target.num_layers))
            mask = unused_token(target, tokenizer) if mask_token_id is None else mask_token_id
            drafter = cls(DFlashConfig(target.shape, size, taps, layers, mask))
            draw_weights(drafter, layers.initializer_range)
            drafter.norm.weight.data.copy_(final_norm_weight(target))
            drafter.config.check_fits(target.shape)
        drafter.attention, drafter.activation_checkpointing = attention, activation_checkpointing
        return drafter

    def context(self, features: Tensor, positions: Tensor) -> list[KeysValues]:
        """Every layer's context keys and values, ``[batch, kv_heads, n, head_dim]`` each."""
        states = self.hidden_norm(self.fc(features.to(self.fc.weight.dtype)))
        rotary = self.rotary_emb(states, positions)
        return [layer.self_attn.keys_values(states, rotary) for layer in self.layers if isinstance(layer, DFlashLayer)]

    def replay(
        self, target: Target, features: Tensor, ids: Tensor, anchors: Tensor, choose: Chooser,
        begins: Tensor | None = None,
    ) -> Draft:  # fmt: skip
        positions, first = torch.arange(features.shape[1], device=features.device)[None], None
        if begins is not None:
            positions, first = positions - begins, begins.gather(1, anchors)
        if uses_flex(self.attention, ids.device):
            view = View.by_flex(anchors, first, self.block_size, ids.shape[1])
        else:
            view = View.in_chunks(anchors, first, self.block_size)
        return self._blocks(target, self.context(features, positions), view, ids.gather(1, anchors), choose)

    def start(self, capacity: int) -> list[PositionStore]:
        return [PositionStore(capacity) for _ in self.layers]

    def stores(self, state: list[PositionStore]) -> list[PositionStore]:
        return state

    def select(self, state: list[PositionStore], rows: Tensor) -> None:
        for store in state:
            store.select(rows)

    def observe(
        self, target: Target, state: list[PositionStore], features: Tensor, ids: Tensor, positions: Tensor
    ) -> None:
        for store, (keys, values) in zip(state, self.context(features, positions), strict=True):
            store.write(keys, values, positions)

    def draft(
        self, target: Target, state: list[PositionStore], anchors: Tensor, anchor_tokens: Tensor, visible: int,
        choose: Chooser,
    ) -> Draft:  # fmt: skip
        context = [store.read(visible) for store in state]
        return self._blocks(target, context, View(anchors[:, None]), anchor_tokens[:, None], choose)

    def _blocks(
        self, target: Target, context: list[KeysValues], view: View, anchor_tokens: Tensor, choose: Chooser
    ) -> Draft:
        """Blocks at the anchors, which are the ends of their views."""
        tokens = anchor_tokens.new_full((*anchor_tokens.shape, self.block_size), self.config.mask_token_id)
        tokens[..., 0] = anchor_tokens
        block = target.embed(tokens).to(self.fc.weight.dtype).flatten(1, 2)
        slots = torch.arange(self.block_size, device=anchor_tokens.device)
        positions = (view.positions[..., None] + slots).flatten(1)
        rotary = self.rotary_emb(block, positions)
        for layer, keys_values in zip(self.layers, context, strict=True):
            block = run_layer(layer, block, keys_values, view, rotary, recompute=self.activation_checkpointing)
        hidden = self.norm(block.unflatten(1, (-1, self.block_size))[:, :, 1:])
        return Draft(hidden, choose(hidden))
