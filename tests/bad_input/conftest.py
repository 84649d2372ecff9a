"""One small target and one drafter of each kind, made once."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests.support.models import DRAFTERS, small_model
from tests.support.refusing import Copy
from transformers import PreTrainedTokenizerFast

from draftopd.decoding.rules import Rules
from draftopd.drafters.base import Drafter
from draftopd.drafters.checkpoint import save_drafter
from draftopd.rollout.request import Request
from draftopd.targets.target import Target


@pytest.fixture(scope="session")
def whole_target() -> Target:
    return Target(small_model("qwen3"))


@pytest.fixture(scope="session")
def originals(
    whole_target: Target,
    make_any: Callable[..., Drafter],
    tokenizer: PreTrainedTokenizerFast,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """Checkpoints of every kind of drafter, and of the target with a tokenizer."""
    root = tmp_path_factory.mktemp("originals")
    for kind in DRAFTERS:
        save_drafter(make_any(kind, whole_target), root / kind, torch.float32)
        (root / kind / "checksums.json").unlink()  # as one from elsewhere: what is spoiled is looked at
    small_model("qwen3").save_pretrained(root / "target")
    tokenizer.save_pretrained(root / "target")
    return root


@pytest.fixture
def copy(originals: Path, tmp_path: Path) -> Copy:
    def make(kind: str) -> Path:
        shutil.copytree(originals / kind, tmp_path / kind)
        return tmp_path / kind

    return make


@pytest.fixture
def request_(whole_target: Target, tokenizer: PreTrainedTokenizerFast) -> Request:
    """For one text of at most eight tokens after the prompt ``[5, 6]``."""
    return Request(
        whole_target,
        None,
        tokenizer,
        lambda: [[5, 6]],
        range(1),
        Rules(stop=frozenset({3}), max_new_tokens=8),
        64,
        seed=0,
    )
