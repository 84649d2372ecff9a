"""DFlash: block-diffusion drafting (arXiv 2602.06036).

The block ``[anchor, mask, ..., mask]`` passes once through a few Qwen3-like layers and comes out as
K proposals. Attention inside the block is bidirectional; the target's tapped hidden states enter as
extra keys and values of every layer. Embedding and LM head are the target's, shared and frozen.
"""

from __future__ import annotations

from typing import Any

import torch
from pydantic import PositiveInt
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import Qwen3MLP, Qwen3RMSNorm, Qwen3RotaryEmbedding
from typing_extensions import Self

from draftopd.drafters.attention import DraftAttention, KeysValues, Rotary, View, uses_flex
from draftopd.drafters.base import Chooser, Draft, Drafter, HasShape, TargetShape
from draftopd.drafters.checkpoint import filled
from draftopd.drafters.dflash_format import describe, parse_config, refuse_others
from draftopd.drafters.initial import draw_weights, final_norm_weight, layer_shape
from draftopd.errors import DrafterError
from draftopd.targets.cache import PositionStore
from draftopd.targets.target import Target


def default_target_layers(drafter_layers: int, target_layers: int) -> tuple[int, ...]:
    """Which target layers to tap: the middle one, or points spread evenly from 1 to N - 3.

    Targets too shallow for distinct points are tapped at fewer.
    """
    if drafter_layers == 1 or target_layers < 5:
        return (target_layers // 2,)
    last = target_layers - 3
    spread = (round(1 + i * (last - 1) / (drafter_layers - 1)) for i in range(drafter_layers))
    return tuple(dict.fromkeys(spread))


def unused_token(target: Target, tokenizer: PreTrainedTokenizerBase) -> int:
    """A token for the slots to be proposed: the tokenizer's mask token, else the first id it does not use.

    For Qwen3 that is 151669, as in the public DFlash checkpoints. Where the tokenizer uses every id,
    padding serves.
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
    """The DFlash draft model.

    Args:
        config: Qwen3 fields of the drafter's own layers; ``hidden_size`` is the target's.
        block_size: anchor plus proposals.
        target_layer_ids: target layers whose outputs are tapped.
        mask_token_id: stands in the slots to be proposed; its embedding is the target's row.
        num_target_layers: depth of the target this drafter was made for.
    """

    def __init__(
        self,
        config: Qwen3Config,
        block_size: int,
        target_layer_ids: tuple[int, ...],
        mask_token_id: int,
        num_target_layers: int,
    ) -> None:
        super().__init__()
        self.config = config
        self.block_size = block_size
        self.target_layer_ids = tuple(target_layer_ids)
        self.mask_token_id = mask_token_id
        self.num_target_layers = num_target_layers
        self.layers = nn.ModuleList(DFlashLayer(config) for _ in range(config.num_hidden_layers))
        self.fc = nn.Linear(len(self.target_layer_ids) * config.hidden_size, config.hidden_size, bias=False)
        self.hidden_norm = Qwen3RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.norm = Qwen3RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = Qwen3RotaryEmbedding(config)

    @classmethod
    def for_target(
        cls,
        target: Target,
        num_layers: int,
        block_size: int,
        mask_token_id: int,
        target_layer_ids: tuple[int, ...] | None = None,
        intermediate_size: int | None = None,
        num_heads: int | None = None,
    ) -> Self:
        """A fresh drafter of the target's width: normally distributed weights, the target's final norm.

        Args:
            num_layers: depth of the drafter.
            target_layer_ids: default as in the DFlash release, see :func:`default_target_layers`.
            intermediate_size: width of the MLP; default the target's.
            num_heads: attention heads; default the target's. Key/value heads are the target's, at most as many.
        """
        config = Qwen3Config(**layer_shape(target, num_layers, intermediate_size, num_heads))
        taps = target_layer_ids or default_target_layers(num_layers, target.num_layers)
        drafter = cls(config, block_size, tuple(taps), mask_token_id, target.num_layers)
        draw_weights(drafter, config.initializer_range)
        drafter.norm.weight.data.copy_(final_norm_weight(target))
        drafter.check_fits(target)
        return drafter

    @classmethod
    def build(
        cls,
        target: Target,
        tokenizer: PreTrainedTokenizerBase,
        texts: object = None,
        checkpoint: str | None = None,
        num_layers: PositiveInt = 5,
        block_size: int | None = None,
        default_block_size: int = 16,
        mask_token_id: int | None = None,
        target_layer_ids: list[int] | None = None,
        intermediate_size: PositiveInt | None = None,
        num_heads: PositiveInt | None = None,
    ) -> Self:
        """The drafter of a checkpoint, or a fresh one, checked against the target.

        Args:
            checkpoint: directory in the public DFlash layout; None starts fresh with the other arguments.
            block_size: with a checkpoint, replaces the one it was trained with.
            default_block_size: of a fresh drafter, where ``block_size`` is None.
        """
        if checkpoint is not None:
            return cls.load_for(target, checkpoint, block_size)
        taps = tuple(target_layer_ids) if target_layer_ids else None
        mask = unused_token(target, tokenizer) if mask_token_id is None else mask_token_id
        size = default_block_size if block_size is None else block_size
        return cls.for_target(target, num_layers, size, mask, taps, intermediate_size, num_heads)

    @classmethod
    def assemble(
        cls, raw: dict[str, Any], tensors: dict[str, Tensor], where: str, num_target_layers: int | None = None
    ) -> Self:
        refuse_others(raw, tensors, where)
        config, extras = parse_config(raw, where)
        return filled(lambda: cls(config, **extras), tensors, config.num_hidden_layers, where)

    def describe(self) -> dict[str, Any]:
        return describe(self)

    def made_for(self) -> TargetShape:
        return TargetShape(self.config.hidden_size, self.config.vocab_size, self.num_target_layers)

    def check_fits(self, target: HasShape) -> None:
        super().check_fits(target)
        if not 0 <= self.mask_token_id < target.vocab_size:
            raise DrafterError(
                f"mask_token_id {self.mask_token_id} lies outside the target's vocabulary of {target.vocab_size}: "
                "choose an unused id inside it (drafter.mask_token_id)."
            )

    def context(self, features: Tensor, positions: Tensor) -> list[KeysValues]:
        """Every layer's context keys and values, ``[batch, kv_heads, n, head_dim]`` each."""
        states = self.hidden_norm(self.fc(features.to(self.fc.weight.dtype)))
        rotary = self.rotary_emb(states, positions)
        layers = (layer for layer in self.layers if isinstance(layer, DFlashLayer))
        return [layer.self_attn.keys_values(states, rotary) for layer in layers]

    def replay(
        self,
        target: Target,
        features: Tensor,
        ids: Tensor,
        anchors: Tensor,
        choose: Chooser,
        begins: Tensor | None = None,
    ) -> Draft:
        positions, first = torch.arange(features.shape[1], device=features.device)[None], None
        if begins is not None:
            positions, first = positions - begins, begins.gather(1, anchors)
        entries = ids.shape[1] if uses_flex(self.attention, ids.device) else None
        view = View.of_many(anchors, first, self.block_size, entries)
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
        self,
        target: Target,
        state: list[PositionStore],
        anchors: Tensor,
        anchor_tokens: Tensor,
        visible: int,
        choose: Chooser,
    ) -> Draft:
        context = [store.read(visible) for store in state]
        return self._blocks(target, context, View(anchors[:, None]), anchor_tokens[:, None], choose)

    def _blocks(
        self, target: Target, context: list[KeysValues], view: View, anchor_tokens: Tensor, choose: Chooser
    ) -> Draft:
        """Blocks at the anchors where their view ends."""
        tokens = anchor_tokens.new_full((*anchor_tokens.shape, self.block_size), self.mask_token_id)
        tokens[..., 0] = anchor_tokens
        block = target.embed(tokens).to(self.fc.weight.dtype).flatten(1, 2)
        places = view.ends if view.begins is None else view.ends - view.begins
        positions = (places[..., None] + torch.arange(self.block_size, device=places.device)).flatten(1)
        rotary = self.rotary_emb(block, positions)
        for layer, keys_values in zip(self.layers, context, strict=True):
            block = self.through(layer, block, keys_values, view, rotary)
        hidden = self.norm(block.unflatten(1, (-1, self.block_size))[:, :, 1:])
        return Draft(hidden, choose(hidden))
