"""DFlash: block-diffusion drafting (arXiv 2602.06036).

The block ``[anchor, mask, ..., mask]`` passes once through a few Qwen3-like layers and comes out as
K proposals. Attention inside the block is bidirectional; the target's tapped hidden states enter as
extra keys and values of every layer. Embedding and LM head are the target's, shared and frozen.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedTokenizerBase, Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import (
    Qwen3MLP,
    Qwen3RMSNorm,
    Qwen3RotaryEmbedding,
    apply_rotary_pos_emb,
)

from draftopd.decoding.cache import PositionStore
from draftopd.drafters.attention import block_attention
from draftopd.drafters.base import Chooser, Draft, Drafter
from draftopd.drafters.dflash_format import describe, read_dflash, write_dflash
from draftopd.errors import DrafterError
from draftopd.targets.target import Target

Rotary = tuple[Tensor, Tensor]


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


def _rope_theta(shape: PreTrainedConfig) -> float:
    """The target's rotary base; of its full-attention layers where kinds of layers differ."""
    rope = getattr(shape, "rope_parameters", None) or {}
    return float((rope.get("full_attention") or rope).get("rope_theta", 10_000.0))


class DFlashAttention(nn.Module):
    """Queries from the block, keys and values from context and block."""

    def __init__(self, config: Qwen3Config) -> None:
        super().__init__()
        size, heads, kv_heads = config.head_dim, config.num_attention_heads, config.num_key_value_heads
        bias = config.attention_bias
        self.head_dim = size
        self.q_proj = nn.Linear(config.hidden_size, heads * size, bias=bias)
        self.k_proj = nn.Linear(config.hidden_size, kv_heads * size, bias=bias)
        self.v_proj = nn.Linear(config.hidden_size, kv_heads * size, bias=bias)
        self.o_proj = nn.Linear(heads * size, config.hidden_size, bias=bias)
        self.q_norm = Qwen3RMSNorm(size, config.rms_norm_eps)
        self.k_norm = Qwen3RMSNorm(size, config.rms_norm_eps)

    def keys_values(self, states: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor]:
        """``[batch, n, hidden] -> 2 x [batch, kv_heads, n, head_dim]``, keys rotated."""
        keys = self.k_norm(self.k_proj(states).unflatten(-1, (-1, self.head_dim))).transpose(1, 2)
        values = self.v_proj(states).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        return apply_rotary_pos_emb(keys, keys, *rotary)[1], values

    def forward(self, block: Tensor, context: tuple[Tensor, Tensor] | None, anchors: Tensor, rotary: Rotary) -> Tensor:
        """``block [batch, A * B, hidden]`` over ``context`` keys and values; see :func:`block_attention`."""
        count = anchors.shape[1]
        query = self.q_norm(self.q_proj(block).unflatten(-1, (-1, self.head_dim))).transpose(1, 2)
        query = apply_rotary_pos_emb(query, query, *rotary)[0]
        keys, values = self.keys_values(block, rotary)
        query, keys, values = (t.unflatten(2, (count, -1)) for t in (query, keys, values))
        attended = block_attention(query, context, (keys, values), anchors)
        return self.o_proj(attended.flatten(2, 3).transpose(1, 2).flatten(2))


class DFlashLayer(nn.Module):
    def __init__(self, config: Qwen3Config) -> None:
        super().__init__()
        self.self_attn = DFlashAttention(config)
        self.mlp = Qwen3MLP(config)
        self.input_layernorm = Qwen3RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = Qwen3RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, block: Tensor, context: tuple[Tensor, Tensor] | None, anchors: Tensor, rotary: Rotary) -> Tensor:
        block = block + self.self_attn(self.input_layernorm(block), context, anchors, rotary)
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
    ) -> DFlashDrafter:
        """A fresh drafter of the target's width: normally distributed weights, the target's final norm.

        Args:
            num_layers: depth of the drafter.
            target_layer_ids: default as in the DFlash release, see :func:`default_target_layers`.
            intermediate_size: width of the MLP; default the target's.
            num_heads: attention heads; default the target's. Key/value heads are the target's, at most as many.
        """
        shape = target.config
        target_heads = shape.num_attention_heads
        heads = num_heads or target_heads
        config = Qwen3Config(
            vocab_size=target.vocab_size,
            hidden_size=shape.hidden_size,
            num_hidden_layers=num_layers,
            num_attention_heads=heads,
            num_key_value_heads=min(shape.num_key_value_heads, heads),
            head_dim=getattr(shape, "head_dim", None) or shape.hidden_size // target_heads,
            intermediate_size=intermediate_size or shape.intermediate_size,
            rms_norm_eps=shape.rms_norm_eps,
            max_position_embeddings=shape.max_position_embeddings,
            rope_theta=_rope_theta(shape),
            tie_word_embeddings=False,
        )
        taps = target_layer_ids or default_target_layers(num_layers, target.num_layers)
        drafter = cls(config, block_size, tuple(taps), mask_token_id, target.num_layers)
        for module in drafter.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=config.initializer_range)
        # The LM head expects states of the scale that the target's final norm gives.
        # Read off its output: some families store this weight less 1.
        with torch.no_grad():
            ones = torch.ones(shape.hidden_size, dtype=target.dtype, device=target.device)
            drafter.norm.weight.copy_(target.body.norm(ones))
        drafter.check_fits(target)
        return drafter

    @classmethod
    def build(
        cls,
        target: Target,
        tokenizer: PreTrainedTokenizerBase,
        checkpoint: str | None = None,
        num_layers: int = 5,
        block_size: int | None = None,
        default_block_size: int = 16,
        mask_token_id: int | None = None,
        target_layer_ids: list[int] | None = None,
        intermediate_size: int | None = None,
        num_heads: int | None = None,
    ) -> DFlashDrafter:
        """The drafter of a checkpoint, or a fresh one, checked against the target.

        Args:
            checkpoint: directory in the public DFlash layout; None starts fresh with the other arguments.
            block_size: with a checkpoint, replaces the one it was trained with.
            default_block_size: of a fresh drafter, where ``block_size`` is None.
        """
        if checkpoint is not None:
            drafter = cls.load(checkpoint)
            if block_size is not None:
                drafter.block_size = block_size
            drafter.check_fits(target)
            return drafter
        taps = tuple(target_layer_ids) if target_layer_ids else None
        mask = unused_token(target, tokenizer) if mask_token_id is None else mask_token_id
        size = default_block_size if block_size is None else block_size
        return cls.for_target(target, num_layers, size, mask, taps, intermediate_size, num_heads)

    @classmethod
    def load(cls, directory: str | Path) -> DFlashDrafter:
        """Read a checkpoint in the public DFlash layout, in float32.

        Raises:
            DrafterError: if it is missing, or a tensor is missing, extra or misshapen.
        """
        config, extras, tensors = read_dflash(Path(directory))
        return cls.assemble(config, extras, tensors, str(directory))

    @classmethod
    def assemble(
        cls, config: Qwen3Config, extras: dict[str, Any], tensors: dict[str, Tensor], where: str
    ) -> DFlashDrafter:
        """The drafter of a parsed config and its tensors, in float32.

        Raises:
            DrafterError: if a tensor is missing, extra or misshapen; ``where`` names the checkpoint.
        """
        drafter = cls(config, **extras)
        own = {name: tuple(p.shape) for name, p in drafter.state_dict().items()}
        found = {name: tuple(t.shape) for name, t in tensors.items()}
        if own != found:
            missing, extra = sorted(own.keys() - found.keys()), sorted(found.keys() - own.keys())
            shapes = [
                f"{n} {found[n]} instead of {own[n]}" for n in sorted(own.keys() & found.keys()) if own[n] != found[n]
            ]
            raise DrafterError(
                f"The tensors of {where} are not those of its config.json. "
                f"Missing: {missing or 'none'}; extra: {extra or 'none'}; misshapen: {shapes or 'none'}."
            )
        drafter.load_state_dict({name: t.float() for name, t in tensors.items()})
        return drafter

    def describe(self) -> dict[str, Any]:
        return describe(self)

    def save(self, directory: Path, dtype: torch.dtype = torch.bfloat16) -> None:
        """Write config.json and model.safetensors in the public DFlash layout."""
        write_dflash(self, Path(directory), dtype)

    def check_fits(self, target: Target) -> None:
        super().check_fits(target)
        pairs = [
            ("hidden size", self.config.hidden_size, target.hidden_size),
            ("vocabulary", self.config.vocab_size, target.vocab_size),
            ("number of target layers", self.num_target_layers, target.num_layers),
        ]
        for what, mine, its in pairs:
            if mine != its:
                raise DrafterError(
                    f"The drafter was made for a target whose {what} is {mine}, but this target's is {its}: "
                    "use the target it was trained with, or train a new drafter (experiment=sft)."
                )
        if not 0 <= self.mask_token_id < target.vocab_size:
            raise DrafterError(
                f"mask_token_id {self.mask_token_id} lies outside the target's vocabulary of {target.vocab_size}: "
                "choose an unused id inside it (drafter.mask_token_id)."
            )

    def context(self, features: Tensor, positions: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Every layer's context keys and values, ``[batch, kv_heads, n, head_dim]`` each."""
        states = self.hidden_norm(self.fc(features.to(self.fc.weight.dtype)))
        rotary = self.rotary_emb(states, positions)
        layers = (layer for layer in self.layers if isinstance(layer, DFlashLayer))
        return [layer.self_attn.keys_values(states, rotary) for layer in layers]

    def replay(
        self, target: Target, features: Tensor, anchors: Tensor, anchor_tokens: Tensor, choose: Chooser
    ) -> Draft:
        positions = torch.arange(features.shape[1], device=features.device)[None]
        return self._blocks(target, self.context(features, positions), anchors, anchor_tokens, choose)

    def start(self, capacity: int) -> list[PositionStore]:
        return [PositionStore(capacity) for _ in self.layers]

    def select(self, state: list[PositionStore], rows: Tensor) -> None:
        for store in state:
            store.select(rows)

    def observe(self, state: list[PositionStore], features: Tensor, positions: Tensor) -> None:
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
        return self._blocks(target, context, anchors[:, None], anchor_tokens[:, None], choose)

    def _blocks(
        self,
        target: Target,
        context: list[tuple[Tensor, Tensor]],
        anchors: Tensor,
        anchor_tokens: Tensor,
        choose: Chooser,
    ) -> Draft:
        tokens = anchor_tokens.new_full((*anchor_tokens.shape, self.block_size), self.mask_token_id)
        tokens[..., 0] = anchor_tokens
        block = target.embed(tokens).to(self.fc.weight.dtype).flatten(1, 2)
        positions = (anchors[..., None] + torch.arange(self.block_size, device=anchors.device)).flatten(1)
        rotary = self.rotary_emb(block, positions)
        for layer, keys_values in zip(self.layers, context, strict=True):
            block = layer(block, keys_values, anchors, rotary)
        hidden = self.norm(block.unflatten(1, (-1, self.block_size))[:, :, 1:])
        return Draft(hidden, choose(hidden))
