"""Shared fixtures: small random targets in the hub's layout, drafters for them, a chi-square test."""

from __future__ import annotations

import os
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

from tests.support.models import KINDS, MakeTarget, randomize, small_model

# Before transformers is imported: no test may wait for a network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from scipy import stats
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from draftopd.bundled.tokenizer import build_tokenizer
from draftopd.data.prompts import PromptEncoder, ReasoningPrompts
from draftopd.drafters.base import Drafter
from draftopd.drafters.dflash import DFlashDrafter
from draftopd.drafters.eagle3 import Eagle3Drafter
from draftopd.drafters.load import load_for
from draftopd.drafters.mtp import MTPDrafter
from draftopd.targets.load import load_target, load_tokenizer, stop_tokens
from draftopd.targets.target import Target

# Small tensors gain nothing from threads, and parallel test processes would slow one another down.
torch.set_num_threads(1)


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


@pytest.fixture(scope="session")
def make_target(target_dirs: dict[str, Path]) -> MakeTarget:
    """``(kind, **options of load_target) -> Target``, in float32 by default: a copy, with neither taps nor hooks.

    Each is read from its files once in a session: that takes five times as long as a copy.
    """
    models: dict[tuple[object, ...], PreTrainedModel] = {}

    def make(kind: str = "qwen3", **options: object) -> Target:
        options = {"dtype": "float32"} | options
        key = (kind, *sorted(options.items()))
        if key not in models:
            models[key] = load_target(str(target_dirs[kind]), **options).model
        return Target(deepcopy(models[key]))

    return make


@pytest.fixture
def target(make_target: MakeTarget) -> Target:
    """A small Qwen3 target in float32."""
    return make_target("qwen3")


@pytest.fixture
def small_vocabulary_target(make_target: MakeTarget) -> Target:
    """A target of six tokens, whose laws can be written out in full."""
    return make_target("vocab_6")


@pytest.fixture(scope="session")
def bundled_pair() -> tuple[Target, DFlashDrafter, list[list[int]], frozenset[int]]:
    """The bundled target and drafter, a few held-out prompts, the stop tokens."""
    target = load_target("bundled:tiny_target", dtype="float32")
    tokenizer = load_tokenizer("bundled:tiny_target")
    drafter = load_for(target, "bundled:tiny_dflash")
    target.tap(drafter.target_layer_ids)
    encoder = PromptEncoder(tokenizer)
    prompts = encoder.take(ReasoningPrompts("validation"), range(6))
    return target, drafter, prompts, stop_tokens(target, tokenizer)


@pytest.fixture(scope="session")
def make_drafter() -> Callable[..., DFlashDrafter]:
    """Builds a DFlash drafter with random weights, norms included."""

    def make(target: Target, num_layers: int = 2, block_size: int = 4, seed: int = 0, **options) -> DFlashDrafter:
        options = {"mask_token_id": target.vocab_size - 1, "target_layer_ids": (0, target.num_layers // 2)} | options
        drafter = DFlashDrafter.build(target, None, num_layers=num_layers, block_size=block_size, **options)
        randomize(drafter, seed)
        return drafter.eval()

    return make


@pytest.fixture(scope="session")
def make_any(make_drafter: Callable[..., DFlashDrafter]) -> Callable[..., Drafter]:
    """``(kind, target, block_size) -> drafter`` of one of :data:`DRAFTERS`, with random weights, norms included."""

    def make(kind: str, target: Target, block_size: int = 4, seed: int = 0, **options) -> Drafter:
        if kind == "dflash":
            return make_drafter(target, block_size=block_size, seed=seed, **options)
        if kind == "mtp":
            drafter: Drafter = MTPDrafter.build(target, None, block_size=block_size, **options)
        else:
            vocabulary = [i for i in range(target.vocab_size) if kind == "eagle3" or i % 3 != 1]
            drafter = Eagle3Drafter.build(
                target, None, lambda: [vocabulary], block_size=block_size, draft_vocab_size=len(vocabulary), **options
            )
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
