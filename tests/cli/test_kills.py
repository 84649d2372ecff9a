"""A small part of ``benchmarks/kills.py``: runs killed at random moments come to what one left alone does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tests.support.paths import ROOT


@pytest.mark.slow
def test_killed_runs_end_with_the_same_weights(tmp_path: Path) -> None:
    results = tmp_path / "kills.json"
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "kills.py"), "--kills", "2", "--per-run", "2",
         "--kinds", "decode_free", "--phases", "buffer", "step", "checkpoint", "--results", str(results)],
        capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(results.read_text())
    assert found["survived"] == found["kills"] == 2 and sum(found["steps_taken_again"]) <= 2
