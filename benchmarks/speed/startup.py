"""Waiting times: for `--help`, for the import, and from the command to the first optimizer step of a run.

    python -m benchmarks.speed.startup

Every command runs in a process of its own, once unmeasured and then several times; medians count. The times at which
validation, rollout and the first step end are read from the run's TensorBoard events. Imports are timed by
`-X importtime`: the modules' own times, summed per package. Results go to benchmarks/results/startup.json.
"""

from __future__ import annotations

import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from benchmarks.common import ROOT, keep, parser, show

COMMANDS = {
    "python train.py --help": ["train.py", "--help"],
    "python eval.py --help": ["eval.py", "--help"],
    "python -c 'import draftopd'": ["-c", "import draftopd"],
}
#: Runs of one step: a user's first run, and the shortest possible one.
SHORT = ["trainer.max_epochs=1", "data.batches_per_epoch=1", "trainer.log_every_n_steps=1"]
RUNS = {
    "as shipped": [],
    "16 prompts, unvalidated": ["validate_first=false", "data.prompts_per_refresh=16", "data.validation_count=16"],
}
#: By section of a run, the last thing that it logs.
MARKS = {"start and validation": "val/tau", "rollout": "rollout/tokens", "first step": "train/loss"}
IMPORTS = {"train.py --help": COMMANDS["python train.py --help"], "a run": ["-c", "import draftopd.cli.training"]}


def timed(command: list[str]) -> float:
    """Seconds that a command takes.

    Raises:
        SystemExit: with the end of its messages, if it fails.
    """
    began = time.perf_counter()
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return time.perf_counter() - began


def first_step(overrides: list[str]) -> dict[str, float]:
    """Seconds from the command to each of :data:`MARKS`, without those that a run does not log."""
    with tempfile.TemporaryDirectory() as directory:
        began = time.time()
        timed(["train.py", *SHORT, *overrides, f"hydra.run.dir={directory}"])
        events = EventAccumulator(str(next(Path(directory).rglob("events.out.tfevents.*")).parent))
        events.Reload()
        firsts = {name: events.Scalars(tag)[0].wall_time - began for name, tag in MARKS.items()}
    # Without validation at the start, the first value of tau comes after the step.
    return {name: seconds for name, seconds in firsts.items() if seconds <= firsts["first step"]}


def heaviest(command: list[str], count: int = 5) -> dict[str, float]:
    """Seconds of all imports, and of the packages whose own modules take longest."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", *command], cwd=ROOT, capture_output=True, text=True, check=True
    )
    seconds: Counter[str] = Counter()
    for own, module in re.findall(r"import time:\s+(\d+) \|\s+\d+ \|\s+(\S+)", done.stderr):
        seconds[module.split(".")[0]] += int(own) / 1e6
    return {"all": seconds.total()} | dict(seconds.most_common(count))


def main() -> None:
    made = parser(__doc__, "startup.json")
    made.add_argument("--rounds", type=int, default=5, help="of each command")
    made.add_argument("--runs", type=int, default=3, help="of each training run")
    options = made.parse_args()
    lines: list[tuple[str, ...]] = []

    def line(command: str, until: str, found: list[float]) -> None:
        lines.append((command, until, f"{statistics.median(found):.2f}", f"{min(found):.2f} to {max(found):.2f}"))

    commands: dict[str, list[float]] = {}
    for name, command in COMMANDS.items():
        timed(command)
        commands[name] = [timed(command) for _ in range(options.rounds)]
        line(name, "its end", commands[name])
    runs = {name: [first_step(overrides) for _ in range(options.runs)] for name, overrides in RUNS.items()}
    for name, found in runs.items():
        for mark in found[0]:
            line(f"python train.py ({name})", mark, [times[mark] for times in found])
    imports = {}
    for name, command in IMPORTS.items():
        heaviest(command)
        imports[name] = heaviest(command)
    show("Seconds from the command, median and range", ("command", "until", "seconds", "range"), lines)
    for name, packages in imports.items():
        every, *top = packages.items()
        print(f"imports of {name}, {every[1]:.2f} s:", ", ".join(f"{p} {seconds:.2f}" for p, seconds in top))
    content = {
        "medians": {name: statistics.median(found) for name, found in commands.items()},
        "commands": commands,
        "runs": runs,
        "imports": imports,
    }
    keep(options.results, options, content)


if __name__ == "__main__":
    main()
