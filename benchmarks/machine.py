"""What a benchmark ran on."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import resource
import time
from importlib.metadata import version
from pathlib import Path

import torch


def describe() -> dict[str, object]:
    """Processor or GPU, cores, versions and date, as plain values."""
    return {
        "date": datetime.date.today().isoformat(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("draftopd", "torch", "transformers", "lightning")},
    }


def held(device: str) -> float:
    """The most bytes this process has held: of the GPU's memory since :func:`fresh_peak`, else of main memory."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def fresh_peak(device: str) -> float:
    """Count the GPU's peak from here on, and say what is held now."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    return held(device)


def multiplication_rate(device: str, dtype: str, size: int | None = None, count: int = 5) -> float:
    """Operations a second of a large matrix multiplication here: the best of ``count`` turns.

    On a GPU a turn is ten of them, larger and queued, so that launching and waiting do not show.
    """
    size, queued = size or (8192 if device == "cuda" else 2048), 10 if device == "cuda" else 1
    a = torch.randn(size, size, device=device, dtype=getattr(torch, dtype))
    best = float("inf")
    for _ in range(count):
        wait(device)
        began = time.perf_counter()
        for _ in range(queued):
            a @ a
        wait(device)
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 * queued / best


def wait(device: str) -> None:
    """Until the GPU has done what was asked of it."""
    if device == "cuda":
        torch.cuda.synchronize()


def arguments(options: argparse.Namespace) -> dict[str, object]:
    """What was asked for, without the paths of this machine."""
    local = ("results", "case", "way", "peer", "reference", "reference_python")
    return {name: value for name, value in vars(options).items() if name not in local}


def keep(options: argparse.Namespace, content: dict[str, object]) -> None:
    """Write results to ``options.results``, with the machine and what was asked for."""
    whole = {"machine": describe(), "arguments": arguments(options), **content}
    options.results.parent.mkdir(exist_ok=True)
    options.results.write_text(json.dumps(whole, indent=2, default=str) + "\n")
    print(f"wrote {options.results}")


def _processor() -> str:
    information = Path("/proc/cpuinfo")
    if information.exists():
        names = [line.split(":", 1)[1].strip() for line in information.read_text().splitlines() if "model name" in line]
        if names:
            return names[0]
    return platform.processor() or platform.machine()
