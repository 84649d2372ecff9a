"""One of two ranks is killed, or stopped for good, in a step: the other ends with a message, and none is left."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

SCRIPT = """
import os, signal, sys

import lightning as L
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.strategies import DDPStrategy

from draftopd.distributed import ranks
from draftopd.distributed.watch import watched
from draftopd.errors import DraftOPDError

victim, number = int(sys.argv[1]), int(sys.argv[2])


class Faulty(BoringModel):
    def training_step(self, batch, index):
        if index == 1:
            os.write(1, f"rank {self.global_rank} is {os.getpid()}\\n".encode())
            self.trainer.strategy.barrier()
            if self.global_rank == victim:
                os.kill(os.getpid(), number)
        return super().training_step(batch, index)


trainer = L.Trainer(
    accelerator="cpu", devices=2, strategy=DDPStrategy(timeout=ranks.wait(minutes=10)), max_steps=4, logger=False,
    enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0,
)
try:
    with watched(trainer, lost_after=3):
        trainer.fit(Faulty())
except DraftOPDError as error:
    sys.exit(f"Error: {error}")
"""


def lives(process: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").exists(), reason="looks for processes in /proc")
@pytest.mark.parametrize("rank, number", [(1, signal.SIGKILL), (0, signal.SIGSTOP)])
def test_the_other_rank_ends_too(rank: int, number: signal.Signals, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    run = subprocess.Popen(
        [sys.executable, str(script), str(rank), str(int(number))],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    # Until the last process has closed it.
    output, _ = run.communicate(timeout=120)
    processes = [int(pid) for pid in re.findall(r"^rank \d is (\d+)$", output, re.MULTILINE)]
    assert len(processes) == 2, output
    until = time.monotonic() + 10
    while any(map(lives, processes)) and time.monotonic() < until:
        time.sleep(0.05)
    assert not any(map(lives, processes))
    assert run.returncode == (1 if rank else -signal.SIGKILL)
    stopped = number == signal.SIGSTOP
    said = f"Rank {rank} has given no sign of life for 3 seconds" if stopped else "was killed by SIGKILL"
    assert said in output and "the same command with the same hydra.run.dir continues" in output, output
