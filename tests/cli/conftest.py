"""Small random targets with a tokenizer, and the scripts run as their user would."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from tests.support.models import KINDS, small_model
from tests.support.paths import ROOT
from tests.support.runs import Script
from transformers import PreTrainedTokenizerFast


@pytest.fixture(scope="session")
def chat_targets(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> dict[str, str]:
    """Random targets with the tokenizer's vocabulary, in the hub's layout."""
    directories = {}
    for kind in KINDS:
        directory = tmp_path_factory.mktemp("chat") / kind
        small_model(kind, vocab_size=512, num_hidden_layers=5).save_pretrained(directory)
        tokenizer.save_pretrained(directory)
        directories[kind] = str(directory)
    return directories


@pytest.fixture(scope="session")
def script() -> Script:
    """Runs ``train.py`` or ``eval.py`` in a process of its own, without network."""

    def run(name: str, *overrides: str, timeout: float = 240, **options) -> subprocess.CompletedProcess[str]:
        env = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
        command = [sys.executable, str(ROOT / name), *overrides]
        return subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=env, check=False, **options)

    return run
