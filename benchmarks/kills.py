"""Kills training runs at random moments, starts them again, and compares what they come to with runs left alone.

    python benchmarks/kills.py                 # 60 kills over all kinds of run, about twenty minutes on two cores
    python benchmarks/kills.py --kills 4 --kinds greedy
    python benchmarks/kills.py --ranks 2 --kills 12 --results benchmarks/results/kills_ranks.json

A run is started with one command and killed (SIGKILL) at a random moment of a random phase: start-up, rollout, writing
the anchor buffer, a training step, validation, writing a checkpoint, writing the drafter. The same command starts it
again, until it ends by itself after its share of kills. It must then have the same weights and optimizer state, bit
for bit, as a run that nobody killed, and the same report. A killed run's lost steps are those it had taken and
takes again. Results go to a JSON file.

With --ranks 2 one of two processes, drawn at random, is killed or (not in start-up) stopped for good (SIGSTOP). The
other must end by itself with a message within `ranks.lost_after` (10 seconds here) and some more; none may be left.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from machine import keep

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results" / "kills.json"
SHORT = (
    "data.prompts_per_refresh=16", "data.batch_size=4", "data.batches_per_epoch=null", "data.validation_count=4",
    "max_new_tokens=48", "trainer.max_epochs=2", "trainer.log_every_n_steps=1", "trainer.enable_progress_bar=false",
    "trainer.accelerator=cpu",
)  # fmt: skip
KINDS: dict[str, tuple[str, ...]] = {
    "greedy": (),
    "sampled": ("rollout.temperature=1.0",),
    "decode_free": ("rollout=decode_free", "refresh.every_n_steps=2"),
    "random_anchors": ("data.anchors=random", "loss=cross_entropy", "trainer.accumulate_grad_batches=2"),
}
LOST_AFTER = 10
RANKS = ("trainer=ddp", "trainer.devices=2", "data.batch_size=2", f"ranks.lost_after={LOST_AFTER}")
#: What each phase is a call of.
PHASES = {
    "rollout": "draftopd.training.refresh:RefreshAnchors.refresh",
    "buffer": "draftopd.rollout.buffer:BufferWriter.__exit__",
    "step": "draftopd.training.module:DraftModule.training_step",
    "validation": "draftopd.training.module:DraftModule.validation_step",
    "checkpoint": "draftopd.training.checkpoints:LastCheckpoint._keep",
    "drafter": "draftopd.drafters.base:Drafter.save",
}


def child(trace: Path, overrides: list[str]) -> None:
    """``train.py`` that tells when each phase begins and ends and which steps are taken."""
    import importlib

    from draftopd.training.checkpoints import LastCheckpoint

    out = os.open(trace, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def tell(*words: Any) -> None:
        os.write(out, (" ".join(map(str, words)) + "\n").encode())

    def told(phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            tell("begin", phase)
            try:
                return function(*args, **kwargs)
            finally:
                tell("end", phase)

        return call

    for phase, place in PHASES.items():
        module, _, name = place.partition(":")
        owner, _, method = name.partition(".")
        kind = getattr(importlib.import_module(module), owner)
        setattr(kind, method, told(phase, getattr(kind, method)))
    started, stepped = LastCheckpoint.on_train_start, LastCheckpoint.on_train_batch_end

    def on_train_start(self: LastCheckpoint, trainer: Any, module: Any) -> None:
        tell("from", trainer.global_step)
        started(self, trainer, module)

    def on_train_batch_end(self: LastCheckpoint, trainer: Any, module: Any, *step: Any) -> None:
        tell("step", trainer.global_step)
        stepped(self, trainer, module, *step)

    LastCheckpoint.on_train_start = on_train_start  # type: ignore[method-assign]
    LastCheckpoint.on_train_batch_end = on_train_batch_end  # type: ignore[method-assign]
    sys.path.insert(0, str(ROOT))
    sys.argv = [str(ROOT / "train.py"), *overrides]
    import train

    train.main()


class Run:
    """One run directory and the command that begins and continues it."""

    def __init__(self, directory: Path, overrides: tuple[str, ...]) -> None:
        self.directory, self.trace = directory, directory.with_suffix(".trace")
        #: Of kills of one of two ranks: which, how, and the seconds until the other had ended.
        self.ended: list[dict[str, Any]] = []
        self.command = [
            sys.executable, __file__, "--child", str(self.trace), *SHORT, *overrides, f"hydra.run.dir={directory}",
        ]  # fmt: skip

    def start(self) -> subprocess.Popen[str]:
        self.trace.write_text("")
        env = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        return subprocess.Popen(self.command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def events(self) -> list[list[str]]:
        return [line.split() for line in self.trace.read_text().splitlines()]

    def finish(self) -> None:
        process = self.start()
        output, _ = process.communicate(timeout=600)
        if process.returncode:
            raise SystemExit(f"A run ended by itself with status {process.returncode}:\n{output[-3000:]}")

    def kill(self, phase: str, occurrence: int, delay: float, victim: tuple[int, signal.Signals]) -> bool:
        """Start it and kill it so long after a phase began for the n-th time; False if it ended before.

        Args:
            victim: rank and signal; with one process, rank 0 and SIGKILL.
        """
        process, began = self.start(), time.monotonic()
        while process.poll() is None:
            if phase == "start-up":
                break
            if sum(event == ["begin", phase] for event in self.events()) >= occurrence:
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
        """Kill or stop one of several processes, and see that the others end with a message."""
        os.kill(ranks[rank], how)
        began = time.monotonic()
        # The pipe is open as long as any of them is there.
        output, _ = process.communicate(timeout=120)
        seconds = time.monotonic() - began
        time.sleep(1)  # an orphan that was killed is there until the system's first process takes note
        left = [pid for pid in ranks if lives(pid)]
        if left or (process.returncode and "continues." not in output):
            raise SystemExit(f"Rank {rank}, {how.name}: {left} left, status {process.returncode}:\n{output[-3000:]}")
        if process.returncode:
            self.ended.append({"phase": phase, "rank": rank, "signal": how.name, "seconds": round(seconds, 1)})
        return process.returncode != 0

    def outcome(self) -> dict[str, Any]:
        """What two runs must agree in."""
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
    """Whether a process is there and no zombie."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def children(process: int) -> list[int]:
    """The processes that a process started and that are still there."""
    try:
        return [int(pid) for pid in Path(f"/proc/{process}/task/{process}/children").read_text().split()]
    except FileNotFoundError:
        return []


def durations(seconds: float) -> dict[str, float]:
    """How long a kill may wait after a phase began: about as long as the phase takes."""
    return {"start-up": seconds / 3} | {p: 0.5 if p in ("rollout", "validation") else 0.05 for p in PHASES}


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        child(Path(sys.argv[2]), sys.argv[3:])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--per-run", type=int, default=8, help="kills of one run before it may end")
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--phases", nargs="+", default=["start-up", *PHASES], choices=["start-up", *PHASES])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ranks", type=int, default=1, choices=(1, 2))
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    dice = random.Random(options.seed)
    began, rows, kills = time.monotonic(), [], 0
    shared = RANKS if options.ranks == 2 else ()
    victims = [(r, s) for r in range(options.ranks) for s in (signal.SIGKILL, signal.SIGSTOP)[: options.ranks]]
    with tempfile.TemporaryDirectory() as folder:
        whole = {}
        while kills < options.kills:
            kind = options.kinds[len(rows) % len(options.kinds)]
            if kind not in whole:
                reference, start = Run(Path(folder) / kind, KINDS[kind] + shared), time.monotonic()
                reference.finish()
                whole[kind] = reference, time.monotonic() - start
            reference, seconds = whole[kind]
            run, killed, lost = Run(Path(folder) / f"{kind}-{len(rows)}", KINDS[kind] + shared), Counter[str](), []
            waits = durations(seconds)
            while sum(killed.values()) < min(options.per_run, options.kills - kills):
                phase = dice.choice(options.phases)
                stood = run.events() if run.trace.exists() else []
                times = max(1, sum(event == ["begin", phase] for event in reference.events()) // 2)
                victim = dice.choice(victims) if shared else victims[0]
                if phase == "start-up":
                    victim = victim[0], signal.SIGKILL  # ranks that have not met wait for the group's own timeout
                if not run.kill(phase, dice.randint(1, times), dice.uniform(0, waits[phase]), victim):
                    break  # it ended, or the phase did not come any more
                killed[phase] += 1
                lost.append(taken_again(stood, run.events()))
            stood = run.events()
            run.finish()
            lost.append(taken_again(stood, run.events()))
            kills += sum(killed.values())
            expected = reference.outcome()
            differs = [name for name, value in run.outcome().items() if not same(value, expected[name])]
            row = {
                "kind": kind, "kills": sum(killed.values()), "by_phase": dict(killed), "equal": not differs,
                "differs": differs, "steps_taken_again": [n for n in lost if n],
            } | ({"others_ended": run.ended} if shared else {})  # fmt: skip
            rows.append(row)
            print(row, flush=True)
    survived = sum(row["kills"] for row in rows if row["equal"])
    again = [n for row in rows for n in row["steps_taken_again"]]
    print(f"{survived} of {kills} kills survived with equal weights; steps taken again: {sum(again)}")
    content = {
        "kills": kills, "survived": survived, "steps_taken_again": again,
        "by_phase": dict(sum((Counter(row["by_phase"]) for row in rows), Counter())),
        "minutes": round((time.monotonic() - began) / 60, 1), "runs": rows,
    }  # fmt: skip
    keep(options, content)
    if survived < kills:
        raise SystemExit(1)


def taken_again(before: list[list[str]], after: list[list[str]]) -> int:
    """Steps that a killed run had taken, and its successor took again."""
    taken = [int(event[1]) for event in before if event[0] in ("from", "step")]
    resumed = [int(event[1]) for event in after if event[0] == "from"]
    return max(0, taken[-1] - resumed[0]) if taken and resumed else 0


if __name__ == "__main__":
    main()
