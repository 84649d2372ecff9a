"""The short report at the end of a training run."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

#: Of ``report.json``.
FORMAT = 1


@dataclass(frozen=True)
class TrainingReport:
    """What a run came to; times in seconds."""

    tau_before: float
    tau_after: float
    steps: int
    tokens: int
    seconds: dict[str, float]
    total_seconds: float
    directory: str


def print_report(report: TrainingReport) -> None:
    table = Table(title="Training report", show_header=False, title_justify="left")
    if not math.isnan(report.tau_before):
        change = report.tau_after / report.tau_before - 1
        table.add_row("held-out tau before", f"{report.tau_before:.3f}")
        table.add_row("held-out tau after", f"{report.tau_after:.3f} ({change:+.1%})")
    else:
        table.add_row("held-out tau", f"{report.tau_after:.3f}")
    table.add_row("optimizer steps", f"{report.steps:,}")
    table.add_row("recorded tokens seen", f"{report.tokens:,}")
    other = report.total_seconds - sum(report.seconds.values())
    for section, seconds in [*report.seconds.items(), ("backward, start-up, other", other)]:
        table.add_row(f"time in {section}", f"{seconds:.1f} s")
    table.add_row("time in all", f"{report.total_seconds:.1f} s")
    console = Console()
    console.print(table)
    # Outside the table, so that they can be copied whole.
    where = os.path.relpath(report.directory)
    for line in (
        f"drafter      {where}/drafter",
        f"checkpoints  {where}/checkpoints",
        f"evaluate     python eval.py checkpoint={where}/drafter",
        f"watch        tensorboard --logdir {where}/tensorboard",
    ):
        console.print(line, soft_wrap=True, highlight=False)
