"""Trains in one process for a long time and watches what must not grow: memory, open files, the time of a step.

    python benchmarks/soak.py --minutes 60      # ends with status 1 if a limit is exceeded
    python benchmarks/soak.py --figure-only     # draws the kept results again

It is the command `train.py` on the bundled pair, with short epochs: each has a rollout, steps with a checkpoint each,
and a validation. Another process reads the kernel's figures of it (/proc, so Linux only) every few seconds and ends it
with SIGTERM. The first sixth of the run, at most ten minutes, is warm-up. Growth of memory (resident set) and of open
files and threads is that of the median from the first to the last quarter of what follows. The resident set holds what
the allocator keeps for later and swings with the length of texts, so the bytes that are in use are asked of it too
(glibc's ``mallinfo2``), after each rollout and a collection of garbage.

Steps differ in work, and a machine shared with others in pace. So the drift is the slope over time in a least-squares
fit of the logarithm of a step's processor time, beside the logarithms of the batch's places, of its anchors, and of the
time of a small fixed computation done just before the step. The interval is a bootstrap over epochs. The limit of the
drift is exceeded if what it comes to over the time measured is above it, and the interval above 0. Results go to
benchmarks/results/soak.json, the figure to docs/figures/soak.png.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import importlib
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import keep

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results" / "soak.json"
FIGURE = ROOT / "docs" / "figures" / "soak.png"
#: The learning rate stays at its peak: there is no end to plan its fall by.
SHORT = (
    "data.prompts_per_refresh=32", "data.batch_size=8", "data.batches_per_epoch=12", "data.validation_count=16",
    "max_new_tokens=192", "trainer.max_epochs=1000000", "module.warmup=0", "trainer.log_every_n_steps=1",
    "trainer.enable_progress_bar=false", "trainer.accelerator=cpu",
)  # fmt: skip
#: What is counted: calls of these.
COUNTED = {
    "refreshes": "draftopd.training.refresh:RefreshAnchors.refresh",
    "validations": "draftopd.training.module:DraftModule.on_validation_epoch_end",
    "checkpoints": "draftopd.training.checkpoints:LastCheckpoint._keep",
}
IN_USE = "in_use_mb"
WATCHED = ("rss_mb", "uss_mb", "open_files", "threads", "directory_mb")
LIMITED = (IN_USE, "rss_mb", "open_files", "threads")
POINTS = 120


class _MallInfo(ctypes.Structure):
    """What glibc's ``mallinfo2`` gives: ten sizes."""

    _fields_ = tuple((f"field_{place}", ctypes.c_size_t) for place in range(10))


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


def child(trace: Path, overrides: list[str]) -> None:
    """``train.py`` that writes a line for each step and for each thing counted."""
    from draftopd.training.refresh import RefreshAnchors

    out = os.open(trace, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def tell(*words: object) -> None:
        os.write(out, (" ".join(map(str, words)) + "\n").encode())

    def told(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            result = function(*args, **kwargs)
            tell(name, *([time.time(), in_use()] if name == "refreshes" else []))
            return result

        return call

    for name, place in COUNTED.items():
        module, _, path = place.partition(":")
        owner, _, method = path.partition(".")
        kind = getattr(importlib.import_module(module), owner)
        setattr(kind, method, told(name, getattr(kind, method)))
    fixed, began = torch.randn(192, 192), [0.0, 0.0, 0.0]

    def on_train_batch_start(self: RefreshAnchors, trainer: Any, module: Any, *batch: Any) -> None:
        start = time.process_time()
        for _ in range(30):
            fixed @ fixed
            sum(range(2000))
        began[:] = time.process_time() - start, time.perf_counter(), time.process_time()

    def on_train_batch_end(self: RefreshAnchors, trainer: Any, module: Any, outputs: Any, batch: Any, _: int) -> None:
        # Before the callbacks that write checkpoints, which Lightning puts last.
        pace, wall, cpu = began[0], time.perf_counter() - began[1], time.process_time() - began[2]
        tell(
            "step", time.time(), trainer.current_epoch, wall, cpu, pace, batch.ids.numel(), int(batch.anchor_mask.sum())
        )

    RefreshAnchors.on_train_batch_start = on_train_batch_start  # type: ignore[method-assign]
    RefreshAnchors.on_train_batch_end = on_train_batch_end  # type: ignore[method-assign]
    sys.path.insert(0, str(ROOT))
    sys.argv = [str(ROOT / "train.py"), *overrides]
    import train

    train.main()


def watch(process: int, directory: Path) -> tuple[float, ...]:
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
    """Train so long.

    Returns:
        samples: [samples, 1 + watched], seconds since the start first.
        steps: [steps, 7], seconds since the start, epoch, wall and processor seconds, those of the fixed
            computation, the batch's places and anchors.
        held: [refreshes, 2], seconds since the start and MiB in use after each.
        counts: how often each thing of :data:`COUNTED` was done.
    """
    directory, trace = runs / "run", runs / "trace"
    command = [sys.executable, __file__, "--child", str(trace), *SHORT, f"hydra.run.dir={directory}"]
    trace.unlink(missing_ok=True)
    samples, zero, began = [], time.time(), time.monotonic()
    with (runs / "log").open("w") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, env=os.environ | {"HF_HUB_OFFLINE": "1"}
        )
        try:
            while process.poll() is None and time.monotonic() - began < 60 * minutes:
                time.sleep(every)
                # Once the first validation is over, until it ends by itself, which is an error.
                if trace.exists() and process.poll() is None:
                    with suppress(ProcessLookupError):
                        samples.append((time.time() - zero, *watch(process.pid, directory)))
        finally:
            process.send_signal(signal.SIGTERM)
            status = process.wait(timeout=300)
    if status != 128 + signal.SIGTERM:
        raise SystemExit(f"The run ended with status {status}:\n{(runs / 'log').read_text()[-3000:]}")
    events = [line.split() for line in trace.read_text().splitlines()]
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
    """Percent an hour that a step of the same work takes more processor time, with a 95 % interval."""
    hours, epochs = steps[:, 0] / 3600, steps[:, 1]
    design = np.column_stack([np.ones(len(steps)), hours - hours.mean(), np.log(steps[:, 4:])])
    design[:, 2:] -= design[:, 2:].mean(0)
    taken = np.log(steps[:, 3])
    groups = [epochs == epoch for epoch in np.unique(epochs)]
    squares = np.stack([design[g].T @ design[g] for g in groups])
    products = np.stack([design[g].T @ taken[g] for g in groups])
    dice = np.random.default_rng(seed)
    counts = dice.multinomial(len(groups), np.full(len(groups), 1 / len(groups)), size=draws)
    counts = np.vstack([np.ones(len(groups), dtype=int), counts])  # first all as they are
    a, b = np.tensordot(counts, squares, 1), counts @ products
    slopes = 100 * np.expm1((np.linalg.pinv(a, hermitian=True) @ b[..., None])[:, 1, 0])
    low, high = np.percentile(slopes[1:], [2.5, 97.5])
    return {"percent_per_hour": float(slopes[0]), "low": float(low), "high": float(high)}


def curve(samples: np.ndarray, steps: np.ndarray) -> dict[str, list[float]]:
    """Medians over stretches of equal time; stretches without a sample or a step are left out."""
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
    """The figures after warm-up, and which limits they exceed."""
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
    import matplotlib.pyplot as plt

    points, warm = content["curve"], content["figures"]["warm_up_minutes"]
    panels = {
        "memory (MiB)": {"resident": "rss_mb", "private": "uss_mb"},
        "open files, threads": {"open files": "open_files", "threads": "threads"},
        "training step (ms)": {"wall": "step_wall_ms", "processor": "step_cpu_ms"},
        "run directory (MiB)": {"size": "directory_mb"},
    }
    figure, axes = plt.subplots(2, 2, figsize=(10, 5.6), sharex=True, layout="constrained")
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
    if sys.argv[1:2] == ["--child"]:
        child(Path(sys.argv[2]), sys.argv[3:])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--every", type=float, default=5, help="seconds between two looks at the process")
    parser.add_argument("--limit", type=float, default=2, help="percent: of growth and of drift")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--figure", type=Path, default=FIGURE)
    parser.add_argument("--runs", type=Path, help="where to keep the run and its trace; default: nowhere")
    parser.add_argument("--figure-only", action="store_true")
    options = parser.parse_args()
    if options.figure_only:
        draw(json.loads(options.results.read_text()), options.figure)
        return
    with tempfile.TemporaryDirectory() as folder:
        runs = options.runs or Path(folder)
        runs.mkdir(parents=True, exist_ok=True)
        samples, steps, held, counts = soak(options.minutes, options.every, runs)
    figures, exceeded = judge(samples, steps, held, options.minutes, options.limit)
    content = {
        "steps": len(steps), **counts, "figures": figures, "exceeded": exceeded, "curve": curve(samples, steps)
    }  # fmt: skip
    options.results.parent.mkdir(parents=True, exist_ok=True)
    keep(options, content)
    draw(content, options.figure)
    print(f"{len(steps)} steps, " + ", ".join(f"{n} {name}" for name, n in counts.items()))
    print(json.dumps(figures, indent=2))
    if exceeded:
        raise SystemExit("Exceeded: " + "; ".join(exceeded))


if __name__ == "__main__":
    main()
