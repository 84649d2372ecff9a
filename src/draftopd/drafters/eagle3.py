"""EAGLE-3: autoregressive drafting on fused target features (arXiv 2503.01840).

One Llama-like layer reads the embedding of a token beside the state before it: first the target's low, middle and
high features, fused, then the layer's own output. It has its own LM head, over a part of the target's vocabulary.

A public checkpoint (SafeAILab, SpecForge) is ``config.json`` and ``model.safetensors``. Tensor names are the drafter's
own parameter names; the embedding is stored only if it is not the target's. Engines count tapped layers in two ways:
SGLang names the layer whose output is read (``eagle_config``), vLLM the layer whose input is (the top-level field,
which it reads first). Checkpoints do not name the usual layers.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import PositiveInt
from torch import Tensor, nn
from transformers import LlamaConfig, PreTrainedTokenizerBase
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm, LlamaRotaryEmbedding
from typing_extensions import Self

from draftopd.drafters.attention import DraftAttention
from draftopd.drafters.autoregressive import AutoregressiveDrafter, Entry
from draftopd.drafters.checkpoint import load_as
from draftopd.drafters.config import DrafterConfig, check_architecture, layer_fields, parse_layers, reading
from draftopd.drafters.draft_vocabulary import frequent_tokens
from draftopd.drafters.initial import draw_weights, final_norm_weight, layer_shape
from draftopd.errors import DrafterError
from draftopd.io.json_text import shown, whole
from draftopd.targets.head import LMHead, Vocabulary
from draftopd.targets.shape import TargetShape
from draftopd.targets.target import Target

#: Anchor plus proposals of a fresh drafter, and of a checkpoint without a block size: 7 steps of training-time test.
USUAL_BLOCK_SIZE = 8

#: Options, and parts of tensor names, that identify variants of EAGLE-3.
_VARIANT_OPTIONS = ("fc_norm", "norm_before_fc", "norm_output")
_VARIANT_TENSORS = ("fc_norm", "input_norm", "qkv_proj", "_norm.bias")


def usual_layers(target_layers: int) -> tuple[int, ...]:
    """The layers that engines tap if a checkpoint names none."""
    return (1, target_layers // 2 - 1, target_layers - 4)


def default_target_layers(target_layers: int) -> tuple[int, ...]:
    """:func:`usual_layers`, or the first, the middle and the last layer of a target too shallow for these."""
    usual = usual_layers(target_layers)
    if usual[0] < usual[1] < usual[2]:
        return usual
    return tuple(dict.fromkeys((0, target_layers // 2, target_layers - 1)))


@dataclass(frozen=True)
class Eagle3Config(DrafterConfig):
    """An EAGLE-3 ``config.json``.

    Args:
        layers: Llama fields of its layer; ``vocab_size`` is the target's, ``hidden_size`` the drafter's own.
        draft_vocab_size: tokens that its LM head can propose.
        own_embedding: whether it has its own token embeddings instead of the target's.
        norm_before_residual: whether the residual is the normalised state instead of the state itself.
    """

    layers: LlamaConfig
    draft_vocab_size: int
    own_embedding: bool = False
    norm_before_residual: bool = False

    # The second is vLLM's name.
    architectures = ("LlamaForCausalLMEagle3", "Eagle3LlamaForCausalLM")

    @classmethod
    def from_json(
        cls, raw: dict[str, Any], where: str, tensors: Collection[str] = (), num_target_layers: int | None = None
    ) -> Self:
        check_architecture(cls, raw, where)
        options = [name for name in _VARIANT_OPTIONS if raw.get(name)]
        unusual = sorted(name for name in tensors if any(part in name for part in _VARIANT_TENSORS))
        if options or unusual:
            raise DrafterError(
                f"{where} is an EAGLE-3 variant with {options + unusual[:4]}, which is not supported: name another."
            )
        if raw.get("num_hidden_layers", 1) != 1:
            raise DrafterError(
                f"{where} has {shown(raw['num_hidden_layers'], 40)} layers; an EAGLE-3 drafter has one: name another."
            )
        with reading("EAGLE-3", where):
            depth = raw.get("num_target_layers", num_target_layers)
            if depth is None:
                raise DrafterError(f"{where} does not say how deep its target is: name the target.")
            taps = (raw.get("eagle_config") or {}).get("eagle_aux_hidden_state_layer_ids")
            if raw.get("eagle_aux_hidden_state_layer_ids"):
                taps = [whole(i) - 1 for i in raw["eagle_aux_hidden_state_layer_ids"]]
            block_size = whole(raw.get("block_size", USUAL_BLOCK_SIZE))
            taps = tuple(whole(i) for i in taps) if taps else None
            sizes = {
                "num_target_layers": whole(depth),
                "draft_vocab_size": whole(raw.get("draft_vocab_size") or raw["vocab_size"]),
                "target_hidden_size": whole(raw.get("target_hidden_size") or raw["hidden_size"]),
            }
            for name, size in sizes.items():
                if size < 1:
                    raise ValueError(f"{name}, which is {size}")
        depth, draft_vocab_size, width = sizes.values()
        layers = parse_layers(LlamaConfig, raw, where)
        return cls(
            TargetShape(width, layers.vocab_size, depth),
            block_size,
            default_target_layers(depth) if taps is None else taps,
            layers,
            draft_vocab_size,
            own_embedding="embed_tokens.weight" in tensors,
            norm_before_residual=bool(raw.get("norm_before_residual", False)),
        )

    def to_json(self) -> dict[str, Any]:
        raw = {
            "architectures": [self.architectures[0]],
            **layer_fields(self.layers),
            "draft_vocab_size": self.draft_vocab_size,
            "norm_before_residual": self.norm_before_residual,
            "block_size": self.block_size,
            "num_target_layers": self.target.num_layers,
        }
        if self.target.hidden_size != self.layers.hidden_size:
            raw["target_hidden_size"] = self.target.hidden_size
        if self.target_layer_ids != usual_layers(self.target.num_layers):
            taps = list(self.target_layer_ids)
            raw["eagle_aux_hidden_state_layer_ids"] = [i + 1 for i in taps]
            raw["eagle_config"] = {"use_aux_hidden_state": True, "eagle_aux_hidden_state_layer_ids": taps}
        return raw

    @property
    def own_head(self) -> int:
        return self.draft_vocab_size

    @property
    def reduced(self) -> bool:
        """Whether it proposes only a part of the target's vocabulary."""
        return self.draft_vocab_size != self.target.vocab_size

    @property
    def ignored_tensors(self) -> tuple[str, ...]:
        # A whole vocabulary needs no tables, but some checkpoints have them.
        return () if self.reduced else ("t2d", "d2t")


class Eagle3Layer(nn.Module):
    """The layer, whose attention reads a token's embedding and the state before it, concatenated."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        size, eps = config.hidden_size, config.rms_norm_eps
        self.self_attn = DraftAttention(config, input_size=2 * size, qk_norm=False)
        self.mlp = LlamaMLP(config)
        self.hidden_norm = LlamaRMSNorm(size, eps)
        self.input_layernorm = LlamaRMSNorm(size, eps)
        self.post_attention_layernorm = LlamaRMSNorm(size, eps)


class Eagle3Drafter(AutoregressiveDrafter):
    """The EAGLE-3 draft model.

    Raises:
        DrafterError: if its width is not the target's and it has no own embedding.
    """

    kind = "eagle3"
    config_class = Eagle3Config
    config: Eagle3Config

    def __init__(self, config: Eagle3Config) -> None:
        super().__init__(config)
        layers, size, width = config.layers, config.layers.hidden_size, config.target.hidden_size
        if width != size and not config.own_embedding:
            raise DrafterError(
                f"An EAGLE-3 drafter of hidden size {size} for a target of {width} needs embed_tokens.weight of its "
                "own, which is missing: copy it again, or name another."
            )
        vocabulary, proposed = config.target.vocab_size, config.draft_vocab_size
        self.embed_tokens = nn.Embedding(vocabulary, size).requires_grad_(False) if config.own_embedding else None
        self.fc = nn.Linear(len(config.target_layer_ids) * width, size, bias=False)
        self.midlayer = Eagle3Layer(layers)
        self.norm = LlamaRMSNorm(size, layers.rms_norm_eps)
        self.lm_head = nn.Linear(size, proposed, bias=False)
        self.rotary_emb = LlamaRotaryEmbedding(layers)
        self.t2d: Tensor | None
        self.d2t: Tensor | None
        self.register_buffer("t2d", torch.zeros(vocabulary, dtype=torch.bool) if config.reduced else None)
        self.register_buffer("d2t", torch.zeros(proposed, dtype=torch.long) if config.reduced else None)

    @classmethod
    def build(
        cls,
        target: Target,
        tokenizer: PreTrainedTokenizerBase,
        texts: Callable[[], Iterable[list[int]]] | None = None,
        checkpoint: str | None = None,
        block_size: int | None = None,
        draft_vocab_size: PositiveInt | None = None,
        target_layer_ids: list[int] | None = None,
        intermediate_size: PositiveInt | None = None,
        num_heads: PositiveInt | None = None,
        norm_before_residual: bool = False,
        activation_checkpointing: bool = False,
    ) -> Self:
        """The drafter of a checkpoint, or a fresh one, checked against the target.

        A fresh one has normally distributed weights, the target's final norm and rows of its LM head.

        Args:
            texts: the target's responses as token ids, from which the draft vocabulary is chosen.
            checkpoint: directory in the public EAGLE-3 layout; None starts fresh with the other arguments.
            block_size: with a checkpoint, replaces the one it was trained with; default :data:`USUAL_BLOCK_SIZE`.
            draft_vocab_size: this many of the tokens that are most frequent in the texts; None: the whole vocabulary.
            target_layer_ids: default :func:`default_target_layers`.
            intermediate_size, num_heads: see :func:`~draftopd.drafters.initial.layer_shape`.
        """
        if checkpoint is not None:
            drafter = load_as(cls, target, checkpoint, block_size)
        else:
            layers = LlamaConfig(**layer_shape(target, 1, intermediate_size, num_heads))
            ids = torch.arange(target.vocab_size)
            if draft_vocab_size is not None and draft_vocab_size != target.vocab_size:
                ids = frequent_tokens(texts() if texts else [], draft_vocab_size, target.vocab_size)
            size = USUAL_BLOCK_SIZE if block_size is None else block_size
            taps = tuple(target_layer_ids or default_target_layers(target.num_layers))
            config = Eagle3Config(target.shape, size, taps, layers, len(ids), norm_before_residual=norm_before_residual)
            drafter = cls(config)
            draw_weights(drafter, layers.initializer_range)
            drafter.take_from(target, ids)
            config.check_fits(target.shape)
        drafter.activation_checkpointing = activation_checkpointing
        return drafter

    @torch.no_grad()
    def take_from(self, target: Target, ids: Tensor) -> None:
        """Copy the target's final norm and the rows ``ids``, ascending, of its LM head."""
        self.norm.weight.copy_(final_norm_weight(target))
        self.lm_head.weight.copy_(target.head.weight[ids.to(target.device)])
        if self.t2d is not None and self.d2t is not None:
            self.t2d[ids] = True
            self.d2t.copy_(ids - torch.arange(len(ids)))

    def check_weights(self, where: str) -> None:
        if self.t2d is None or self.d2t is None:
            return
        if not torch.equal(torch.arange(len(self.d2t)) + self.d2t, self.t2d.nonzero()[:, 0]):
            raise DrafterError(
                f"The tables t2d and d2t of {where} do not name the same tokens in ascending order: copy it again."
            )

    def head(self, target: Target) -> LMHead:
        return LMHead(self.lm_head, vocabulary=None if self.t2d is None else Vocabulary(self.t2d))

    @property
    def layer(self) -> Eagle3Layer:
        return self.midlayer

    def fuse(self, features: Tensor) -> Tensor:
        return self.fc(features.to(self.fc.weight.dtype))

    def entry(self, target: Target, tokens: Tensor, states: Tensor) -> Entry:
        embedded = target.embed(tokens) if self.embed_tokens is None else self.embed_tokens(tokens)
        embedded = self.midlayer.input_layernorm(embedded.to(states.dtype))
        normed = self.midlayer.hidden_norm(states)
        return Entry(torch.cat([embedded, normed], -1), normed if self.config.norm_before_residual else states)

    def leave(self, output: Tensor) -> tuple[Tensor, Tensor]:
        return self.norm(output), output
