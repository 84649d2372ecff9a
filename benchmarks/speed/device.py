"""The clock and memory of a CPU or a GPU."""

from __future__ import annotations

import resource
import time

import torch


def wait(device: str) -> None:
    """Until the GPU has done what was asked of it."""
    if device == "cuda":
        torch.cuda.synchronize()


def held(device: str) -> float:
    """The peak of this process in bytes: of the GPU's memory since :func:`fresh_peak`, else of main memory."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def fresh_peak(device: str) -> float:
    """Count the GPU's peak from here on, and return the bytes held now."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    return held(device)


def multiplication_rate(device: str, dtype: str, size: int | None = None, count: int = 5) -> float:
    """Operations per second of a large matrix multiplication: the best of ``count`` turns.

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
