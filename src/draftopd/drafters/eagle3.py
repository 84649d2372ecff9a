"""EAGLE-3: autoregressive drafting on fused target features (arXiv 2503.01840).

One Llama-like layer reads the embedding of a token beside the state before it: first the target's low, middle and
high features, fused, then the layer's own output. It has an LM head of its own, over a part of the target's
vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from pydantic import PositiveInt
from torch import Tensor, nn
from transformers import LlamaConfig, PreTrainedTokenizerBase
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm, LlamaRotaryEmbedding
from typing_extensions import Self

from draftopd.drafters.attention import DraftAttention
from draftopd.drafters.autoregressive import AutoregressiveDrafter, Entry
from draftopd.drafters.base import TargetShape
from draftopd.drafters.checkpoint import filled
from draftopd.drafters.draft_vocabulary import frequent_tokens
from draftopd.drafters.eagle3_format import describe, parse_config, refuse_others, usual_layers
from draftopd.drafters.initial import draw_weights, final_norm_weight, layer_shape
from draftopd.errors import DrafterError
from draftopd.targets.head import LMHead, Vocabulary
from draftopd.targets.target import Target


def default_target_layers(target_layers: int) -> tuple[int, ...]:
    """A low, a middle and a high layer, as engines take them where a checkpoint names none.

    Targets too shallow for these three are tapped at the first, the middle and the last layer.
    """
    usual = usual_layers(target_layers)
    if usual[0] < usual[1] < usual[2]:
        return usual
    return tuple(dict.fromkeys((0, target_layers // 2, target_layers - 1)))


class Eagle3Layer(nn.Module):
    """The layer: queries, keys and values see a token's embedding and the state before it, side by side."""

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

    Args:
        config: Llama fields of its layer; ``vocab_size`` is the target's.
        block_size: anchor plus proposals.
        target_layer_ids: target layers whose outputs are fused.
        num_target_layers: depth of the target this drafter was made for.
        draft_vocab_size: tokens that its LM head can propose.
        target_hidden_size: width of the target; None: its own.
        own_embedding: carry token embeddings instead of reading the target's.
        norm_before_residual: add to the normalised state instead of the state itself.

    Raises:
        DrafterError: if its width is not the target's and it has no embedding of its own.
    """

    def __init__(
        self,
        config: LlamaConfig,
        block_size: int,
        target_layer_ids: tuple[int, ...],
        num_target_layers: int,
        draft_vocab_size: int | None = None,
        target_hidden_size: int | None = None,
        own_embedding: bool = False,
        norm_before_residual: bool = False,
    ) -> None:
        super().__init__()
        size = config.hidden_size
        self.config = config
        self.block_size = block_size
        self.target_layer_ids = tuple(target_layer_ids)
        self.num_target_layers = num_target_layers
        self.draft_vocab_size = draft_vocab_size or config.vocab_size
        self.target_hidden_size = target_hidden_size or size
        self.norm_before_residual = norm_before_residual
        if self.target_hidden_size != size and not own_embedding:
            raise DrafterError(
                f"An EAGLE-3 drafter of hidden size {size} for a target of {self.target_hidden_size} needs "
                "embed_tokens.weight of its own, which is missing: copy it again, or name another."
            )
        self.embed_tokens = nn.Embedding(config.vocab_size, size).requires_grad_(False) if own_embedding else None
        self.fc = nn.Linear(len(self.target_layer_ids) * self.target_hidden_size, size, bias=False)
        self.midlayer = Eagle3Layer(config)
        self.norm = LlamaRMSNorm(size, config.rms_norm_eps)
        self.lm_head = nn.Linear(size, self.draft_vocab_size, bias=False)
        self.rotary_emb = LlamaRotaryEmbedding(config)
        self.t2d: Tensor | None
        self.d2t: Tensor | None
        reduced = self.draft_vocab_size != config.vocab_size
        self.register_buffer("t2d", torch.zeros(config.vocab_size, dtype=torch.bool) if reduced else None)
        self.register_buffer("d2t", torch.zeros(self.draft_vocab_size, dtype=torch.long) if reduced else None)

    @classmethod
    def for_target(
        cls,
        target: Target,
        block_size: int,
        vocabulary: Tensor | None = None,
        target_layer_ids: tuple[int, ...] | None = None,
        intermediate_size: int | None = None,
        num_heads: int | None = None,
        norm_before_residual: bool = False,
    ) -> Self:
        """A fresh drafter: normally distributed weights, the target's final norm and rows of its LM head.

        Args:
            vocabulary: target token ids that it can propose; None: all.
            target_layer_ids: default as engines take them, see :func:`default_target_layers`.
            intermediate_size, num_heads: see :func:`~draftopd.drafters.initial.layer_shape`.
        """
        config = LlamaConfig(**layer_shape(target, 1, intermediate_size, num_heads))
        ids = torch.arange(target.vocab_size) if vocabulary is None else vocabulary.cpu().unique()
        taps = target_layer_ids or default_target_layers(target.num_layers)
        drafter = cls(
            config, block_size, tuple(taps), target.num_layers, len(ids), norm_before_residual=norm_before_residual
        )
        draw_weights(drafter, config.initializer_range)
        with torch.no_grad():
            drafter.norm.weight.copy_(final_norm_weight(target))
            drafter.lm_head.weight.copy_(target.head.weight[ids.to(target.device)])
            if drafter.t2d is not None and drafter.d2t is not None:
                drafter.t2d[ids] = True
                drafter.d2t.copy_(ids - torch.arange(len(ids)))
        drafter.check_fits(target)
        return drafter

    @classmethod
    def build(
        cls,
        target: Target,
        tokenizer: PreTrainedTokenizerBase,
        texts: Callable[[], Iterable[list[int]]] | None = None,
        checkpoint: str | None = None,
        block_size: int | None = None,
        default_block_size: int = 8,
        draft_vocab_size: PositiveInt | None = None,
        target_layer_ids: list[int] | None = None,
        intermediate_size: PositiveInt | None = None,
        num_heads: PositiveInt | None = None,
        norm_before_residual: bool = False,
    ) -> Self:
        """As :meth:`for_target`, or from a checkpoint; refuses a target it does not fit.

        Args:
            texts: the target's responses as token ids, from which the draft vocabulary is chosen.
            checkpoint: directory in the public EAGLE-3 layout; None starts fresh with the other arguments.
            block_size: with a checkpoint, replaces the one it was trained with.
            default_block_size: of a fresh drafter, where ``block_size`` is None.
            draft_vocab_size: so many of the tokens that are most frequent in the texts; None: the whole vocabulary.
        """
        if checkpoint is not None:
            return cls.load_for(target, checkpoint, block_size)
        vocabulary = None
        if draft_vocab_size is not None and draft_vocab_size != target.vocab_size:
            vocabulary = frequent_tokens(texts() if texts else [], draft_vocab_size, target.vocab_size)
        return cls.for_target(
            target,
            default_block_size if block_size is None else block_size,
            vocabulary,
            tuple(target_layer_ids) if target_layer_ids else None,
            intermediate_size,
            num_heads,
            norm_before_residual,
        )

    @classmethod
    def assemble(
        cls, raw: dict[str, Any], tensors: dict[str, Tensor], where: str, num_target_layers: int | None = None
    ) -> Self:
        refuse_others(raw, tensors, where)
        config, extras = parse_config(raw, where, num_target_layers)
        if extras["target_layer_ids"] is None:
            extras["target_layer_ids"] = default_target_layers(extras["num_target_layers"])
        own = "embed_tokens.weight" in tensors
        if extras["draft_vocab_size"] == config.vocab_size:
            # A whole vocabulary needs no tables; some checkpoints have them all the same.
            tensors = {n: t for n, t in tensors.items() if n not in ("t2d", "d2t")}
        drafter = filled(lambda: cls(config, **extras, own_embedding=own), tensors, 1, where)
        if drafter.t2d is not None and drafter.d2t is not None:
            ids = torch.arange(drafter.draft_vocab_size) + drafter.d2t
            if not torch.equal(ids, drafter.t2d.nonzero()[:, 0]):
                raise DrafterError(
                    f"The tables t2d and d2t of {where} do not name the same tokens in ascending order: copy it again."
                )
        return drafter

    def describe(self) -> dict[str, Any]:
        return describe(self)

    def made_for(self) -> TargetShape:
        return TargetShape(self.target_hidden_size, self.config.vocab_size, self.num_target_layers)

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
        return Entry(torch.cat([embedded, normed], -1), normed if self.norm_before_residual else states)

    def leave(self, output: Tensor) -> tuple[Tensor, Tensor]:
        return self.norm(output), output
