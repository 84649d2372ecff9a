"""Time and floating-point operations of a run, by section."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

#: Sections of a training step; other sections are outside of steps.
STEP_SECTIONS = ("target", "walk", "drafter", "loss", "backward")


class Stopwatch:
    """Seconds by section: ``with clock("target"): ...``.

    A GPU runs behind the program, so that timing a section means waiting for it, which costs time. Sections of a
    training step therefore wait only at the steps that :meth:`step` is told to time; the seconds of the other steps
    are extrapolated. On a CPU every step is timed.

    Args:
        counts: also count the floating-point operations of matrix multiplications and attention, two per
            multiplication and addition, into ``operations``. Sections must then not be nested.
    """

    def __init__(self, counts: bool = False) -> None:
        self.counts = counts
        self.operations: dict[str, float] = defaultdict(float)
        self._measured: dict[str, float] = defaultdict(float)
        self._timed = True
        self._steps = self._timed_steps = 0

    def step(self, timed: bool) -> None:
        """Begin a training step; ``timed`` says whether its sections are timed on a GPU."""
        self._timed = timed or not torch.cuda.is_available()
        self._steps += 1
        self._timed_steps += self._timed

    @contextmanager
    def __call__(self, section: str) -> Iterator[None]:
        timed = self._timed or section not in STEP_SECTIONS
        if timed:
            _wait()
        counter = FlopCounterMode(display=False, custom_mapping=_ATTENTION_ON_CPU) if self.counts else None
        start = time.perf_counter()
        try:
            with counter or nullcontext():
                yield
        finally:
            if timed:
                _wait()
                self._measured[section] += time.perf_counter() - start
            if counter:
                self.operations[section] += counter.get_total_flops()

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds by section; those of steps are estimated from the steps that were timed."""
        factor = self._steps / self._timed_steps if self._timed_steps else 1.0
        return {s: t * (factor if s in STEP_SECTIONS else 1.0) for s, t in self._measured.items()}

    def state(self) -> dict[str, Any]:
        """The state for a checkpoint."""
        return {
            "measured": dict(self._measured), "operations": dict(self.operations),
            "steps": self._steps, "timed_steps": self._timed_steps,
        }  # fmt: skip

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from a :meth:`state`."""
        self._measured.update(state["measured"])
        self.operations.update(state["operations"])
        self._steps, self._timed_steps = state["steps"], state["timed_steps"]


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


# torch's counter (2.13) knows only the attention kernels of GPUs.
def _attention(query: Any, key: Any, value: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    return int(sdpa_flop_count(query, key, value))


def _attention_backward(grad: Any, query: Any, key: Any, value: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    return int(sdpa_backward_flop_count(grad, query, key, value))


_ATTENTION_ON_CPU = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}
