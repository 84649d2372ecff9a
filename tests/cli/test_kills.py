"""A small part of ``benchmarks/faults/kills.py``: killed runs end as a run does that nobody killed."""

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
        [sys.executable, "-m", "benchmarks.faults.kills", "--kills", "2", "--per-run", "2",
         "--kinds", "decode_free", "--phases", "buffer", "step", "checkpoint", "--results", str(results)],
        cwd=ROOT, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(results.read_text())
    assert found["survived"] == found["kills"] == 2 and sum(found["steps_taken_again"]) <= 2
