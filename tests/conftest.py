"""Shared fixtures: small random targets in the hub's layout, drafters for them, a chi-square test."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

# Before transformers is imported: no test may wait for a network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from scipy import stats
from torch import Tensor, nn
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
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from draftopd.data.prompts import PromptEncoder, ReasoningPrompts
from draftopd.drafters.base import Drafter
from draftopd.drafters.dflash import DFlashDrafter
from draftopd.drafters.eagle3 import Eagle3Drafter
from draftopd.drafters.mtp import MTPDrafter
from draftopd.targets.target import Target, load_tokenizer, stop_tokens
from draftopd.targets.tiny_tokenizer import build_tokenizer

# Small tensors gain nothing from threads, and parallel test processes would slow one another down.
torch.set_num_threads(1)

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


@pytest.fixture(scope="session")
def target_dirs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Directories in the hub's layout, by kind of model; ``vocab_6`` has six tokens only."""
    models = {kind: small_model(kind) for kind in KINDS}
    models["vocab_6"] = small_model("qwen3", vocab_size=6, num_hidden_layers=2)
    dirs = {}
    for name, model in models.items():
        dirs[name] = tmp_path_factory.mktemp("targets") / name
        model.save_pretrained(dirs[name])
    return dirs


@pytest.fixture
def target(target_dirs: dict[str, Path]) -> Target:
    """A small Qwen3 target in float32."""
    return Target.load(str(target_dirs["qwen3"]), dtype="float32")


@pytest.fixture
def small_vocabulary_target(target_dirs: dict[str, Path]) -> Target:
    """A target of six tokens, whose laws can be written out in full."""
    return Target.load(str(target_dirs["vocab_6"]), dtype="float32")


@pytest.fixture(scope="session")
def bundled_pair() -> tuple[Target, DFlashDrafter, list[list[int]], frozenset[int]]:
    """The bundled target and drafter, a few held-out prompts, the stop tokens."""
    target = Target.load("bundled:tiny_target", dtype="float32")
    tokenizer = load_tokenizer("bundled:tiny_target")
    drafter = DFlashDrafter.load("bundled:tiny_dflash")
    target.tap(drafter.target_layer_ids)
    encoder = PromptEncoder(tokenizer)
    prompts = encoder.take(ReasoningPrompts("validation"), range(6))
    return target, drafter, prompts, stop_tokens(target, tokenizer)


@pytest.fixture(scope="session")
def make_drafter() -> Callable[..., DFlashDrafter]:
    """Builds a DFlash drafter with random weights, norms included."""

    def make(target: Target, num_layers: int = 2, block_size: int = 4, seed: int = 0, **options) -> DFlashDrafter:
        options = {"mask_token_id": target.vocab_size - 1, "target_layer_ids": (0, target.num_layers // 2)} | options
        drafter = DFlashDrafter.for_target(target, num_layers, block_size, **options)
        randomize(drafter, seed)
        return drafter.eval()

    return make


#: Kinds of drafter; ``eagle3_reduced`` proposes only part of the vocabulary.
DRAFTERS = ("dflash", "eagle3", "eagle3_reduced", "mtp")


@pytest.fixture(scope="session")
def make_any(make_drafter: Callable[..., DFlashDrafter]) -> Callable[..., Drafter]:
    """``(kind, target, block_size) -> drafter`` of one of :data:`DRAFTERS`, with random weights, norms included."""

    def make(kind: str, target: Target, block_size: int = 4, seed: int = 0, **options) -> Drafter:
        if kind == "dflash":
            return make_drafter(target, block_size=block_size, seed=seed, **options)
        if kind == "mtp":
            drafter: Drafter = MTPDrafter.for_target(target, block_size, **options)
        else:
            ids = torch.arange(target.vocab_size)
            vocabulary = ids[(ids % 3 != 1)] if kind == "eagle3_reduced" else None
            drafter = Eagle3Drafter.for_target(target, block_size, vocabulary, **options)
        randomize(drafter, seed)
        return drafter.eval()

    return make


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """The bundled target's tokenizer, trained on a small corpus."""
    return build_tokenizer(vocab_size=400, corpus=200)


@pytest.fixture(scope="session")
def chi_square() -> Callable[[Tensor, Tensor], float]:
    """``(samples, law) -> p``: how likely the samples (outcome numbers) are under the law (one probability each)."""

    def test(samples: Tensor, law: Tensor) -> float:
        law = law.double().flatten()
        counts = torch.bincount(samples.flatten(), minlength=law.numel()).double()
        assert len(counts) == law.numel()
        if counts[law == 0].any():
            return 0.0
        expected = law / law.sum() * counts.sum()
        rare = expected < 5
        counts = torch.cat([counts[~rare], counts[rare].sum()[None]])
        expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
        counts, expected = counts[expected > 0], expected[expected > 0]
        return float(stats.chisquare(counts.numpy(), expected.numpy()).pvalue)

    return test


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """How many of the malformed inputs of ``tests/bad_input`` were refused as they should be."""
    outcomes = [
        outcome
        for outcome in ("passed", "failed")
        for report in terminalreporter.stats.get(outcome, [])
        if report.nodeid.startswith("tests/bad_input/") and "[" in report.nodeid
    ]
    if outcomes:
        terminalreporter.write_line(f"bad input: {outcomes.count('passed')} refused of {len(outcomes)} tried")
