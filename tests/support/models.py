"""Small targets and drafters with random weights."""

from __future__ import annotations

import os
from collections.abc import Callable

from draftopd.rollout.request import Request

# Before transformers is imported: no test may wait for a network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from torch import nn
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from draftopd.drafters.base import Drafter
from draftopd.targets.target import Target

SHAPE = {
    "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 48, "max_position_embeddings": 256, "initializer_range": 0.3,
    "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip


#: Full attention, mixtures of experts, a window in every layer or in every other one.
KINDS = ("qwen3", "qwen3_moe", "llama", "mistral", "gemma3", "gpt_oss")


def randomize(module: nn.Module, seed: int, std: float = 0.3) -> None:
    """Weights large enough that every part of the network shows in its output, norms included."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim == 1:
                parameter.uniform_(0.5, 1.5, generator=generator)
            else:
                parameter.normal_(0, std, generator=generator)


def small_model(kind: str, **changes: object) -> PreTrainedModel:
    """A causal LM with random weights, of one of :data:`KINDS`; windows are shorter than the tests' sequences."""
    shape = SHAPE | changes
    if kind == "qwen3":
        model = Qwen3ForCausalLM(Qwen3Config(**shape, head_dim=16, rope_theta=1_000.0, tie_word_embeddings=True))
    elif kind == "qwen3_moe":
        experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "norm_topk_prob": True}
        model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**shape, **experts, head_dim=16))
    elif kind == "llama":
        model = LlamaForCausalLM(LlamaConfig(**shape))
    elif kind == "mistral":
        model = MistralForCausalLM(MistralConfig(**shape, head_dim=8, sliding_window=7))
    elif kind == "gemma3":
        layers = ["sliding_attention", "full_attention"] * shape["num_hidden_layers"]
        options = {"head_dim": 16, "sliding_window": 7, "query_pre_attn_scalar": 16}
        options["layer_types"] = layers[: shape["num_hidden_layers"]]
        model = Gemma3ForCausalLM(Gemma3TextConfig(**shape, **options))
    else:
        experts = {"num_local_experts": 4, "num_experts_per_tok": 2}
        rope = {"rope_type": "default", "rope_theta": 10_000.0}
        model = GptOssForCausalLM(GptOssConfig(**shape, **experts, head_dim=8, sliding_window=7, rope_parameters=rope))
    randomize(model, seed=len(kind))
    return model.eval()


#: Kinds of drafter; ``eagle3_reduced`` proposes only part of the vocabulary.
DRAFTERS = ("dflash", "eagle3", "eagle3_reduced", "mtp")


#: A fixture that hands out copies of small targets.
MakeTarget = Callable[..., Target]

#: A fixture that builds drafters with random weights.
MakeDrafter = Callable[..., Drafter]

#: A fixture that builds requests for texts.
MakeRequest = Callable[..., Request]
