"""One long training run, watched for what must not grow: memory, open files, the time of a step.

    python -m benchmarks.faults.soak --minutes 60   # ends with status 1 if a limit is exceeded
    python -m benchmarks.faults.soak --only-draw    # the figure from the results kept

The run is `train.py` on the bundled pair with short epochs. Each epoch has a rollout, steps with a checkpoint each, and
a validation. Another process reads the kernel's figures of the run (/proc, so Linux only) every few seconds, and ends
the run with SIGTERM. The first sixth of the run, at most ten minutes, is warm-up. Growth of memory (resident set), open
files and threads is measured from the median of the first quarter after the warm-up to that of the last. The resident
set includes memory that the allocator keeps for later, and it varies with the length of texts. So the bytes in use
(glibc's ``mallinfo2``) are read too, after each rollout and a garbage collection.

Steps differ in work, and other programs slow a shared machine down. So the drift is the slope over time in a
least-squares fit of the logarithm of a step's processor time. The other terms of the fit are the logarithms of the
batch's positions, of its anchors, and of the time of a small fixed computation just before the step. The interval is a
bootstrap over epochs. The limit is exceeded if the drift over the time measured is above it and the interval is above
0. Results go to benchmarks/results/soak.json, the figure to docs/figures/soak.png.
"""

from __future__ import annotations

import ctypes
import gc
import json
import math
import os
import signal
import statistics
import tempfile
import time
from collections import Counter
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

from benchmarks.common import ROOT, keep, parser, read
from benchmarks.faults import traced
from benchmarks.faults.traced import Trace

FIGURE = ROOT / "docs" / "figures" / "soak.png"
#: The learning rate stays at its peak, because the run has no planned end.
SHORT = (
    "data.prompts_per_refresh=32", "data.batch_size=8", "data.batches_per_epoch=12", "data.validation_count=16",
    "max_new_tokens=192", "trainer.max_epochs=1000000", "schedule.warmup=0", "trainer.log_every_n_steps=1",
    "trainer.enable_progress_bar=false", "trainer.accelerator=cpu",
)  # fmt: skip
#: By what is counted: the method whose calls are counted.
COUNTED = {
    "refreshes": "draftopd.training.refresh:RefreshAnchors.refresh",
    "validations": "draftopd.training.module:DraftModule.on_validation_epoch_end",
    "checkpoints": "draftopd.training.checkpoints:LastCheckpoint._save",
}
IN_USE = "in_use_mb"
WATCHED = ("rss_mb", "uss_mb", "open_files", "threads", "directory_mb")
LIMITED = (IN_USE, "rss_mb", "open_files", "threads")
POINTS = 120


class _MallInfo(ctypes.Structure):
    """The ten sizes that glibc's ``mallinfo2`` returns."""

    _fields_ = tuple((f"field_{number}", ctypes.c_size_t) for number in range(10))


def in_use() -> float:
    """MiB that this process has allocated and not freed; NaN where the C library is another."""
    try:
        ask = ctypes.CDLL(None).mallinfo2
    except AttributeError:
        return math.nan
    ask.restype = _MallInfo
    gc.collect()
    found = ask()
    # uordblks, within the heaps, and hblkhd, mapped apart.
    return (found.field_7 + found.field_4) / 2**20


def watch(trace: Trace) -> None:
    """Tell of each step and of each thing counted, and what is in use after a refresh."""
    for name, method in COUNTED.items():
        trace.watch(
            method,
            after=lambda *_, name=name: trace.tell(name, *([time.time(), in_use()] if name == "refreshes" else [])),
        )
    fixed, began = torch.randn(192, 192), [0.0, 0.0, 0.0]

    def before_batch(*_: Any) -> None:
        start = time.process_time()
        for _ in range(30):
            fixed @ fixed
            sum(range(2000))
        began[:] = time.process_time() - start, time.perf_counter(), time.process_time()

    def after_batch(_: Any, trainer: Any, module: Any, outputs: Any, batch: Any, number: int) -> None:
        pace, wall, cpu = began[0], time.perf_counter() - began[1], time.process_time() - began[2]
        size, anchors = batch.ids.numel(), int(batch.anchor_mask.sum())
        trace.tell("step", time.time(), trainer.current_epoch, wall, cpu, pace, size, anchors)

    # Lightning calls this callback before those that write checkpoints.
    callback = "draftopd.training.refresh:RefreshAnchors"
    trace.watch(f"{callback}.on_train_batch_start", after=before_batch)
    trace.watch(f"{callback}.on_train_batch_end", before=after_batch)


def look(process: int, directory: Path) -> tuple[float, ...]:
    """A process's figures, in the order of :data:`WATCHED`."""
    proc = Path("/proc") / str(process)
    rollup = dict(line.split(":") for line in (proc / "smaps_rollup").read_text().splitlines()[1:])
    kilobytes = {name: int(value.split()[0]) for name, value in rollup.items()}
    status = dict(line.split(":", 1) for line in (proc / "status").read_text().splitlines())
    files, size = os.listdir(proc / "fd"), 0
    for folder, _, names in os.walk(directory):
        for name in names:
            with suppress(FileNotFoundError):  # just replaced
                size += os.stat(os.path.join(folder, name)).st_size
    own = kilobytes["Private_Clean"] + kilobytes["Private_Dirty"]
    return kilobytes["Rss"] / 1024, own / 1024, len(files), int(status["Threads"]), size / 2**20


def soak(minutes: float, every: float, runs: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray, Counter[str]]:
    """Train for this many minutes, and look at the run every ``every`` seconds.

    Returns:
        samples: [samples, 1 + watched], seconds since the start first.
        steps: [steps, 7], seconds since the start, epoch, wall and processor seconds, those of the fixed
            computation, the batch's positions and anchors.
        held: [refreshes, 2], seconds since the start and MiB in use after each.
        counts: number of calls of each of :data:`COUNTED`.
    """
    directory, trace = runs / "run", runs / "trace"
    samples, zero, began = [], time.time(), time.monotonic()
    with (runs / "log").open("w") as log:
        process = traced.start("benchmarks.faults.soak", trace, [*SHORT, f"hydra.run.dir={directory}"], log)
        try:
            while process.poll() is None and time.monotonic() - began < 60 * minutes:
                time.sleep(every)
                # From the end of the first validation on.
                if traced.events(trace) and process.poll() is None:
                    with suppress(ProcessLookupError):
                        samples.append((time.time() - zero, *look(process.pid, directory)))
        finally:
            process.send_signal(signal.SIGTERM)
            status = process.wait(timeout=300)
    if status != 128 + signal.SIGTERM:
        raise SystemExit(f"The run ended with status {status}:\n{(runs / 'log').read_text()[-3000:]}")
    events = traced.events(trace)
    steps = np.array([[float(word) for word in event[1:]] for event in events if event[0] == "step"])
    held = np.array([[float(word) for word in event[1:]] for event in events if event[0] == "refreshes"])
    steps[:, 0] -= zero
    held[:, 0] -= zero
    return np.array(samples), steps, held, Counter(event[0] for event in events if event[0] != "step")


def growth(values: np.ndarray) -> float:
    """Percent from the median of the first to that of the last quarter."""
    quarter = max(1, len(values) // 4)
    first, last = np.median(values[:quarter]), np.median(values[-quarter:])
    return float(100 * (last / first - 1))


def drift(steps: np.ndarray, draws: int = 2000, seed: int = 0) -> dict[str, float]:
    """Percent per hour by which the processor time of a step of the same work grows, with a 95 % interval."""
    hours, epochs = steps[:, 0] / 3600, steps[:, 1]
    design = np.column_stack([np.ones(len(steps)), hours - hours.mean(), np.log(steps[:, 4:])])
    design[:, 2:] -= design[:, 2:].mean(0)
    taken = np.log(steps[:, 3])
    groups = [epochs == epoch for epoch in np.unique(epochs)]
    squares = np.stack([design[g].T @ design[g] for g in groups])
    products = np.stack([design[g].T @ taken[g] for g in groups])
    dice = np.random.default_rng(seed)
    counts = dice.multinomial(len(groups), np.full(len(groups), 1 / len(groups)), size=draws)
    counts = np.vstack([np.ones(len(groups), dtype=int), counts])  # the first row is the whole data
    a, b = np.tensordot(counts, squares, 1), counts @ products
    slopes = 100 * np.expm1((np.linalg.pinv(a, hermitian=True) @ b[..., None])[:, 1, 0])
    low, high = np.percentile(slopes[1:], [2.5, 97.5])
    return {"percent_per_hour": float(slopes[0]), "low": float(low), "high": float(high)}


def curve(samples: np.ndarray, steps: np.ndarray) -> dict[str, list[float]]:
    """Medians over spans of equal time; spans without a sample or a step are left out."""
    edges = np.linspace(0, samples[-1, 0], min(POINTS, len(samples)) + 1)
    rows = []
    for start, end in pairwise(edges):
        seen = samples[(samples[:, 0] > start) & (samples[:, 0] <= end), 1:]
        taken = steps[(steps[:, 0] > start) & (steps[:, 0] <= end), 2:5]
        if len(seen) and len(taken):
            rows.append([end / 60, *np.median(seen, 0), *(1000 * np.median(taken, 0))])
    names = ("minute", *WATCHED, "step_wall_ms", "step_cpu_ms", "fixed_cpu_ms")
    return {name: np.round(column, 2).tolist() for name, column in zip(names, zip(*rows, strict=True), strict=True)}


def judge(
    samples: np.ndarray, steps: np.ndarray, held: np.ndarray, minutes: float, limit: float
) -> tuple[dict[str, Any], list[str]]:
    """The figures after warm-up, and the limits that they exceed."""
    warm = 60 * min(10.0, minutes / 6)
    watched, taken = samples[samples[:, 0] > warm], steps[steps[:, 0] > warm]
    if len(watched) < 8 or len(np.unique(taken[:, 1])) < 3:
        raise SystemExit(
            "Too short to judge: eight samples and three epochs must follow the warm-up. Give more --minutes."
        )
    grown = {name: growth(watched[:, 1 + i]) for i, name in enumerate(WATCHED)}
    grown[IN_USE] = growth(held[held[:, 0] > warm, 1])
    hours, slope = (watched[-1, 0] - watched[0, 0]) / 3600, drift(taken)
    exceeded = [f"{name} grew by {grown[name]:.1f} %" for name in LIMITED if grown[name] > limit]
    slower = 100 * ((1 + slope["percent_per_hour"] / 100) ** hours - 1)
    if slower > limit and slope["low"] > 0:
        exceeded.append(f"steps became slower by {slower:.1f} %")
    figures = {
        "warm_up_minutes": warm / 60, "measured_minutes": 60 * hours, "growth_percent": grown,
        "directory_mb_per_hour": (watched[-1, -1] - watched[0, -1]) / hours,
        "peak_rss_mb": float(samples[:, 1].max()), IN_USE: held[:, 1].round(2).tolist(), "step_time_drift": slope,
        "step_cpu_ms": 1000 * statistics.median(taken[:, 3]), "step_wall_ms": 1000 * statistics.median(taken[:, 2]),
    }  # fmt: skip
    return figures, exceeded


def draw(content: dict[str, Any], path: Path) -> None:
    """Draw the figures over time."""
    points, warm = content["curve"], content["figures"]["warm_up_minutes"]
    panels = {
        "memory (MiB)": {"resident": "rss_mb", "private": "uss_mb"},
        "open files, threads": {"open files": "open_files", "threads": "threads"},
        "training step (ms)": {"wall": "step_wall_ms", "processor": "step_cpu_ms"},
        "run directory (MiB)": {"size": "directory_mb"},
    }
    figure = Figure(figsize=(10, 5.6), layout="constrained")
    axes = figure.subplots(2, 2, sharex=True)
    for axis, (label, lines) in zip(axes.flat, panels.items(), strict=True):
        for name, key in lines.items():
            axis.plot(points["minute"], points[key], label=name, linewidth=1.2)
        axis.axvspan(0, warm, color="0.93")
        axis.set(ylabel=label, ylim=(0, None), xlim=(0, None))
        axis.legend(frameon=False, fontsize=8, loc="best")
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.3)
    for axis in axes[1]:
        axis.set_xlabel("minutes (shaded: warm-up)")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    print(f"figure: {path}")


def main() -> None:
    made = parser(__doc__, "soak.json")
    made.add_argument("--minutes", type=float, default=60)
    made.add_argument("--every", type=float, default=5, help="seconds between two looks at the process")
    made.add_argument("--limit", type=float, default=2, help="maximum growth and drift in percent")
    made.add_argument("--figure", type=Path, default=FIGURE)
    made.add_argument("--runs", type=Path, help="directory that keeps the run and its trace; default: none")
    made.add_argument("--only-draw", action="store_true", help="the figure from the results kept")
    options = made.parse_args()
    if options.only_draw:
        draw(read(options.results), options.figure)
        return
    with tempfile.TemporaryDirectory() as folder:
        runs = (options.runs or Path(folder)).resolve()
        runs.mkdir(parents=True, exist_ok=True)
        samples, steps, held, counts = soak(options.minutes, options.every, runs)
    figures, exceeded = judge(samples, steps, held, options.minutes, options.limit)
    content = {
        "steps": len(steps), **counts, "figures": figures, "exceeded": exceeded, "curve": curve(samples, steps)
    }  # fmt: skip
    keep(options.results, options, content)
    draw(content, options.figure)
    print(f"{len(steps)} steps, " + ", ".join(f"{n} {name}" for name, n in counts.items()))
    print(json.dumps(figures, indent=2))
    if exceeded:
        raise SystemExit("Exceeded: " + "; ".join(exceeded))


if __name__ == "__main__":
    main()
