"""Training runs that are killed at random moments, started again, and compared with runs that nobody killed.

    python -m benchmarks.faults.kills                 # 60 kills of all kinds of run, about twenty minutes on two cores
    python -m benchmarks.faults.kills --kills 4 --kinds greedy
    python -m benchmarks.faults.kills --ranks 2 --kills 12 --results benchmarks/results/kills_ranks.json

A run is started with one command and killed (SIGKILL) at a random moment of a random phase: start-up, rollout, writing
the anchor buffer, a training step, validation, writing a checkpoint, writing the drafter. The same command starts it
again, until it has been killed often enough and ends by itself. It must then have the same weights and optimizer state
as a run that nobody killed, bit for bit, and the same report. The steps taken again are those that a killed run had
taken and its successor repeats. Results go to benchmarks/results/kills.json.

With --ranks 2 one of two processes, drawn at random, is killed or (not during start-up) stopped for good (SIGSTOP). The
other must end by itself with a message soon after `ranks.lost_after` (10 seconds here), and no process may be left.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import keep, parser
from benchmarks.faults import traced
from benchmarks.faults.traced import Trace

SHORT = (
    "data.prompts_per_refresh=16", "data.batch_size=4", "data.batches_per_epoch=null", "data.validation_count=4",
    "max_new_tokens=48", "trainer.max_epochs=2", "trainer.log_every_n_steps=1", "trainer.enable_progress_bar=false",
    "trainer.accelerator=cpu",
)  # fmt: skip
KINDS: dict[str, tuple[str, ...]] = {
    "greedy": (),
    "sampled": ("temperature=1.0",),
    "decode_free": ("rollout=decode_free",),
    "fresh": ("rollout=fresh",),
    "random_anchors": ("data.anchors=random", "loss=cross_entropy", "trainer.accumulate_grad_batches=2"),
}
LOST_AFTER = 10
RANKS = ("trainer=ddp", "trainer.devices=2", "data.batch_size=2", f"ranks.lost_after={LOST_AFTER}")
#: By phase, the method whose call it is.
PHASES = {
    "rollout": "draftopd.training.refresh:RefreshAnchors.refresh",
    "buffer": "draftopd.rollout.buffer:BufferWriter.__exit__",
    "step": "draftopd.training.module:DraftModule.training_step",
    "validation": "draftopd.training.module:DraftModule.validation_step",
    "checkpoint": "draftopd.training.checkpoints:LastCheckpoint._save",
    "drafter": "draftopd.cli.training:save_drafter",
}


def watch(trace: Trace) -> None:
    """Tell when each phase begins and ends, and which steps are taken."""
    for phase, method in PHASES.items():
        trace.watch(
            method, lambda *_, phase=phase: trace.tell("begin", phase), lambda *_, phase=phase: trace.tell("end", phase)
        )
    callback = "draftopd.training.checkpoints:LastCheckpoint"
    trace.watch(f"{callback}.on_train_start", lambda _, trainer, *__: trace.tell("from", trainer.global_step))
    trace.watch(f"{callback}.on_train_batch_end", lambda _, trainer, *__: trace.tell("step", trainer.global_step))


class Run:
    """One run directory, and the overrides that begin and continue the run."""

    def __init__(self, directory: Path, overrides: tuple[str, ...]) -> None:
        self.directory, self.trace = directory, directory.with_suffix(".trace")
        self.overrides = [*SHORT, *overrides, f"hydra.run.dir={directory}"]
        #: One row per loss of one of two ranks: which, how, and the seconds until the other had ended.
        self.ended: list[dict[str, Any]] = []

    def start(self) -> subprocess.Popen[str]:
        return traced.start("benchmarks.faults.kills", self.trace, self.overrides, subprocess.PIPE)

    def begun(self, phase: str) -> int:
        """How many times the phase has begun."""
        return traced.events(self.trace).count(["begin", phase])

    def finish(self) -> None:
        process = self.start()
        output, _ = process.communicate(timeout=600)
        if process.returncode:
            raise SystemExit(f"A run ended by itself with status {process.returncode}:\n{output[-3000:]}")

    def kill(self, phase: str, occurrence: int, delay: float, victim: tuple[int, signal.Signals]) -> bool:
        """Start the run and kill it; False if it ended by itself before.

        Args:
            phase, occurrence, delay: seconds after the phase has begun this many times.
            victim: rank and signal; with one process, rank 0 and SIGKILL.
        """
        process, began = self.start(), time.monotonic()
        while process.poll() is None:
            if phase == "start-up" or self.begun(phase) >= occurrence:
                break
            if time.monotonic() - began > 600:
                process.kill()
                raise SystemExit("A run hangs.")
            time.sleep(0.002)
        time.sleep(delay)
        others = children(process.pid)
        if others and process.poll() is None:
            return self._lose(phase, process, [process.pid, *others], *victim)
        process.send_signal(signal.SIGKILL)
        output, _ = process.communicate()
        if process.returncode not in (0, -signal.SIGKILL):
            raise SystemExit(f"A run ended by itself with status {process.returncode}:\n{output[-3000:]}")
        return process.returncode != 0

    def _lose(
        self, phase: str, process: subprocess.Popen[str], ranks: list[int], rank: int, how: signal.Signals
    ) -> bool:
        """Kill or stop one of several processes, and check that the others end with a message."""
        os.kill(ranks[rank], how)
        began = time.monotonic()
        # The pipe stays open as long as any process lives.
        output, _ = process.communicate(timeout=120)
        seconds = time.monotonic() - began
        time.sleep(1)  # a killed orphan exists until the system's first process collects it
        left = [pid for pid in ranks if lives(pid)]
        if left or (process.returncode and "continues." not in output):
            raise SystemExit(f"Rank {rank}, {how.name}: {left} left, status {process.returncode}:\n{output[-3000:]}")
        if process.returncode:
            self.ended.append({"phase": phase, "rank": rank, "signal": how.name, "seconds": round(seconds, 1)})
        return process.returncode != 0

    def outcome(self) -> dict[str, Any]:
        """What must be equal in two runs."""
        checkpoint = torch.load(self.directory / "checkpoints" / "last.ckpt", weights_only=True)
        report = json.loads((self.directory / "report.json").read_text())
        return {
            "weights": checkpoint["state_dict"],
            "optimizer": [state["state"] for state in checkpoint["optimizer_states"]],
            "schedule": [s["last_epoch"] for s in checkpoint["lr_schedulers"]],
            "drafter": (self.directory / "drafter" / "model.safetensors").read_bytes(),
            "report": [report[name] for name in ("tau_before", "tau_after", "steps", "tokens")],
        }


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


def lives(process: int) -> bool:
    """Whether a process exists and is not a zombie."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def children(process: int) -> list[int]:
    """The processes that a process started and that still exist."""
    try:
        return [int(pid) for pid in Path(f"/proc/{process}/task/{process}/children").read_text().split()]
    except FileNotFoundError:
        return []


def durations(seconds: float) -> dict[str, float]:
    """Maximum seconds between a phase's begin and the kill, by phase: about as long as the phase takes."""
    return {"start-up": seconds / 3} | {p: 0.5 if p in ("rollout", "validation") else 0.05 for p in PHASES}


def parse() -> argparse.Namespace:
    made = parser(__doc__, "kills.json")
    made.add_argument("--kills", type=int, default=60)
    made.add_argument("--per-run", type=int, default=8, help="maximum kills of one run before it may end")
    made.add_argument("--kinds", nargs="+", default=list(KINDS), choices=list(KINDS))
    made.add_argument("--phases", nargs="+", default=["start-up", *PHASES], choices=["start-up", *PHASES])
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--ranks", type=int, default=1, choices=(1, 2))
    return made.parse_args()


def endure(
    run: Run, reference: Run, seconds: float, kills: int, dice: random.Random, options: argparse.Namespace
) -> dict[str, Any]:
    """Kill a run up to ``kills`` times, let it end, and compare it with the reference: one row of the results.

    Args:
        seconds: what the reference took.
    """
    killed, lost, waits = Counter[str](), [], durations(seconds)
    victims = [(r, s) for r in range(options.ranks) for s in (signal.SIGKILL, signal.SIGSTOP)[: options.ranks]]
    while sum(killed.values()) < kills:
        phase = dice.choice(options.phases)
        before = traced.events(run.trace)
        times = max(1, reference.begun(phase) // 2)
        victim = dice.choice(victims) if options.ranks > 1 else victims[0]
        if phase == "start-up":
            victim = victim[0], signal.SIGKILL  # ranks that have not met wait for the group's own timeout
        if not run.kill(phase, dice.randint(1, times), dice.uniform(0, waits[phase]), victim):
            break  # it ended, or the phase did not come any more
        killed[phase] += 1
        lost.append(taken_again(before, traced.events(run.trace)))
    before = traced.events(run.trace)
    run.finish()
    lost.append(taken_again(before, traced.events(run.trace)))
    expected = reference.outcome()
    differs = [name for name, value in run.outcome().items() if not same(value, expected[name])]
    return {
        "kills": sum(killed.values()), "by_phase": dict(killed), "equal": not differs, "differs": differs,
        "steps_taken_again": [n for n in lost if n],
    } | ({"others_ended": run.ended} if options.ranks > 1 else {})  # fmt: skip


def main() -> None:
    options = parse()
    dice, began = random.Random(options.seed), time.monotonic()
    shared = RANKS if options.ranks == 2 else ()
    rows: list[dict[str, Any]] = []
    kills = 0
    with tempfile.TemporaryDirectory() as folder:
        whole: dict[str, tuple[Run, float]] = {}
        while kills < options.kills:
            kind = options.kinds[len(rows) % len(options.kinds)]
            if kind not in whole:
                reference, start = Run(Path(folder) / kind, KINDS[kind] + shared), time.monotonic()
                reference.finish()
                whole[kind] = reference, time.monotonic() - start
            run = Run(Path(folder) / f"{kind}-{len(rows)}", KINDS[kind] + shared)
            row = {"kind": kind} | endure(run, *whole[kind], min(options.per_run, options.kills - kills), dice, options)
            kills += row["kills"]
            rows.append(row)
            print(row, flush=True)
    survived = sum(row["kills"] for row in rows if row["equal"])
    again = [n for row in rows for n in row["steps_taken_again"]]
    print(f"{survived} of {kills} kills survived with equal weights; steps taken again: {sum(again)}")
    by_phase = dict(sum((Counter(row["by_phase"]) for row in rows), Counter()))
    content = {
        "kills": kills, "survived": survived, "steps_taken_again": again, "by_phase": by_phase,
        "minutes": round((time.monotonic() - began) / 60, 1), "rows": rows,
    }  # fmt: skip
    keep(options.results, options, content)
    if survived < kills:
        raise SystemExit(1)


def taken_again(before: list[list[str]], after: list[list[str]]) -> int:
    """Steps that a killed run had taken, and its successor took again."""
    taken = [int(event[1]) for event in before if event[0] in ("from", "step")]
    resumed = [int(event[1]) for event in after if event[0] == "from"]
    return max(0, taken[-1] - resumed[0]) if taken and resumed else 0


if __name__ == "__main__":
    main()
