"""Optimizer steps whose loss or gradient is not finite: detected, skipped, counted, and their batches kept."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from draftopd.errors import ConfigError, FileError, NumericsError
from draftopd.io.files import replaced, write_json
from draftopd.io.json_text import shown
from draftopd.replay.batch import ReplayBatch
from draftopd.replay.packing import Layout

log = logging.getLogger(__name__)

#: Version of ``step-N.json``.
FORMAT = 1


class Skips:
    """Counts skipped steps, and ends a run that skips too many in a row.

    Args:
        max_in_a_row: at most this many may follow one another; 0 ends the run at the first.

    Raises:
        ConfigError: if it is negative.
    """

    def __init__(self, max_in_a_row: int) -> None:
        if max_in_a_row < 0:
            raise ConfigError(f"module.max_skipped_in_a_row must be 0 or more, found {max_in_a_row}.")
        self.max_in_a_row = max_in_a_row
        self.total = self.in_a_row = 0

    def taken(self) -> None:
        """Count a step that was taken."""
        self.in_a_row = 0

    def skipped(self) -> None:
        """Count a skipped step."""
        self.total += 1
        self.in_a_row += 1

    def rescaled(self) -> None:
        """Count a step skipped for an overflow of float16 under a loss scale that can still be lowered."""
        self.total += 1

    def check(self, step: int, what: str) -> None:
        """End the run after too many in a row.

        Raises:
            NumericsError: saying what to try.
        """
        if self.in_a_row > self.max_in_a_row:
            raise NumericsError(
                f"{what} at step {step}, and {self.in_a_row} steps in a row were skipped (module.max_skipped_in_a_row="
                f"{self.max_in_a_row}). Lower optimizer.lr or the loss weights, or use "
                "trainer.precision=32-true, and start again; checkpoints written so far are intact. "
                "docs/reliability.md shows how to read the batches."
            )

    def state(self) -> dict[str, int]:
        """The state for a checkpoint."""
        return {"total": self.total, "in_a_row": self.in_a_row}

    def restore(self, state: dict[str, int]) -> None:
        """Continue from a :meth:`state`."""
        self.total, self.in_a_row = state["total"], state["in_a_row"]


def largest_gradient(optimizer: Optimizer) -> Tensor:
    """The largest absolute entry of all gradients, or of this rank's shard; NaN if one is NaN. Without a transfer."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    gradients = [g for g in map(_gradient, parameters) if g is not None and g.numel()]
    return torch.nn.utils.get_total_norm(gradients, norm_type=math.inf)


def nonfinite_gradients(module: nn.Module) -> list[str]:
    """Names of the parameters whose gradients hold NaN or infinity."""
    found = ((name, _gradient(parameter)) for name, parameter in module.named_parameters())
    return [name for name, gradient in found if gradient is not None and not gradient.isfinite().all()]


def drop_gradients(optimizer: Optimizer) -> None:
    """Remove all gradients, so that the optimizer's step changes neither weights nor its own state."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = None


def keep_batch(
    directory: Path, keep: int, batches: Sequence[ReplayBatch], losses: Sequence[float], about: dict[str, Any]
) -> Path | None:
    """Write the batch of a skipped step to ``step-N.safetensors`` and its record to ``step-N.json``.

    Args:
        directory: made if absent; holds the newest ``keep`` batches of each rank.
        keep: 0 writes nothing.
        batches, losses: the step's micro-batches and this rank's loss of each; the first one whose loss is not finite
            is kept, else the last.
        about: the record, with ``step``, ``rank`` and ``ranks``.

    Returns:
        The path; None if nothing was written. A failed write is a warning, because the other ranks continue.
    """
    if not keep:
        return None
    index = next((i for i, loss in enumerate(losses) if not math.isfinite(loss)), len(losses) - 1)
    rank = f"-rank-{about['rank']}" if about["ranks"] > 1 else ""
    path = directory / f"step-{about['step']}{rank}.safetensors"
    fields = batches[index]._asdict()
    if layout := fields.pop("layout"):
        fields |= {f"layout.{k}": v for k, v in layout._asdict().items()}
    tensors = {k: v.cpu().clone(memory_format=torch.contiguous_format) for k, v in fields.items()}
    record = about | {"micro_batch": index, "losses": [x if math.isfinite(x) else str(x) for x in losses]}
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with replaced(path) as partial:
            save_file(tensors, partial)
        write_json(path.with_suffix(".json"), record, FORMAT)
    except (OSError, FileError) as error:
        log.warning("The batch of step %d cannot be kept in %s: %s", about["step"], directory, error)
        return None
    numbered = {int(p.name.split("-")[1].split(".")[0]): p for p in directory.glob(f"step-*{rank}.safetensors")}
    for step in sorted(numbered)[:-keep]:
        numbered[step].unlink()
        numbered[step].with_suffix(".json").unlink(missing_ok=True)
    return path


def read_batch(path: str | Path) -> ReplayBatch:
    """The batch of a skipped step, on the CPU.

    Raises:
        FileError: if it is absent or damaged.
    """
    try:
        tensors = load_file(path)
        layout = {k.removeprefix("layout."): tensors.pop(k) for k in list(tensors) if k.startswith("layout.")}
        return ReplayBatch(**tensors, layout=Layout(**layout) if layout else None)
    except (OSError, SafetensorError, TypeError) as error:
        raise FileError(
            f"{path} is not a kept batch, or is damaged: {shown(str(error))}. Name a step-N.safetensors of a run's "
            "nonfinite directory."
        ) from error


def _gradient(parameter: Tensor) -> Tensor | None:
    """A parameter's gradient, or this rank's shard of it."""
    gradient = parameter.grad
    return gradient.to_local() if isinstance(gradient, DTensor) else gradient
