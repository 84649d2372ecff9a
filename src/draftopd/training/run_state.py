"""The progress of a run: tokens, time, operations, skipped steps and tau, saved in its checkpoints."""

from __future__ import annotations

import time
from typing import Any

from draftopd.training.nonfinite import Skips
from draftopd.training.stopwatch import Stopwatch


class RunState:
    """The state of a run beside weights and optimizer.

    Args:
        count_flops: see :class:`~draftopd.training.stopwatch.Stopwatch`.
        max_skipped_in_a_row: see :class:`~draftopd.training.nonfinite.Skips`.
    """

    def __init__(self, count_flops: bool = False, max_skipped_in_a_row: int = 10) -> None:
        self.clock = Stopwatch(count_flops)
        self.skips = Skips(max_skipped_in_a_row)
        #: Recorded tokens seen.
        self.tokens = 0
        #: Seconds of rollouts and steps without validation; set by :meth:`stop_clock`.
        self.training_seconds = 0.0
        #: Held-out micro tau before training and at the last validation; NaN if not measured.
        self.tau_before = self.tau_after = float("nan")
        #: Seconds that the earlier parts of a continued run measured.
        self.earlier_seconds = 0.0
        self._started: float | None = None

    def start_clock(self) -> None:
        """Begin or continue training."""
        self._started = time.perf_counter() - self.training_seconds - self._validation_seconds()

    def stop_clock(self) -> dict[str, float]:
        """The training seconds so far, to log; empty before training has begun."""
        if self._started is None:
            return {}
        self.training_seconds = time.perf_counter() - self._started - self._validation_seconds()
        return {"time/training_seconds": self.training_seconds}

    def flops(self) -> dict[str, float]:
        """Floating-point operations of this process so far; empty if they are not counted.

        ``drafter`` includes loss and backward pass, ``rollout`` the walks that find fresh anchors. What logged steps
        measure is included, validation is not.
        """
        if not self.clock.counts:
            return {}
        spent = self.clock.operations
        parts = {
            "target": spent["target"],
            "drafter": spent["drafter"] + spent["loss"] + spent["backward"],
            "rollout": spent["rollout"] + spent["walk"],
        }
        return parts | {"total": sum(parts.values())}

    def logged(self) -> dict[str, float]:
        """The run's figures at a logged step."""
        figures = {f"train/flops/{part}": spent for part, spent in self.flops().items()}
        return figures | {"train/tokens": float(self.tokens), "train/skipped_steps": float(self.skips.total)}

    def state(self) -> dict[str, Any]:
        """The state for a checkpoint."""
        return {
            "tokens": self.tokens, "training_seconds": self.training_seconds, "tau_before": self.tau_before,
            "tau_after": self.tau_after, "clock": self.clock.state(), "skips": self.skips.state(),
        }  # fmt: skip

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from a :meth:`state`."""
        self.tokens, self.training_seconds = state["tokens"], state["training_seconds"]
        self.tau_before, self.tau_after = state["tau_before"], state["tau_after"]
        self.clock.restore(state["clock"])
        self.skips.restore(state["skips"])
        self.earlier_seconds = sum(self.clock.seconds.values())

    def _validation_seconds(self) -> float:
        return self.clock.seconds.get("validation", 0.0)
