"""Where a run's time and arithmetic go."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count


class Stopwatch:
    """Seconds by section: ``with clock("target"): ...``. Waits for the GPU, where there is one.

    Args:
        counts: also count the floating-point operations of matrix multiplications and attention, two for each
            multiplication and addition, into ``operations``. Sections must then not lie within one another.
    """

    def __init__(self, counts: bool = False) -> None:
        self.counts = counts
        self.seconds: dict[str, float] = defaultdict(float)
        self.operations: dict[str, float] = defaultdict(float)

    @contextmanager
    def __call__(self, section: str) -> Iterator[None]:
        _wait()
        counter = FlopCounterMode(display=False, custom_mapping=_ATTENTION_ON_CPU) if self.counts else None
        start = time.perf_counter()
        try:
            with counter or nullcontext():
                yield
        finally:
            _wait()
            self.seconds[section] += time.perf_counter() - start
            if counter:
                self.operations[section] += counter.get_total_flops()


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


# torch's counter knows the attention kernels of GPUs only (2.13).
def _attention(query: Any, key: Any, value: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    return int(sdpa_flop_count(query, key, value))


def _attention_backward(grad: Any, query: Any, key: Any, value: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    return int(sdpa_backward_flop_count(grad, query, key, value))


_ATTENTION_ON_CPU = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}
