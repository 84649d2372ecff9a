"""The short report at the end of a training run."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

#: Version of ``report.json``.
FORMAT = 2
#: Version of ``test.json``: ``emitted``, by the test prompt's index, the tokens of each of its blocks.
TESTED_FORMAT = 1


@dataclass(frozen=True)
class TrainingReport:
    """The results of a run; times in seconds."""

    tau_before: float
    tau_after: float
    steps: int
    tokens: int
    seconds: dict[str, float]
    total_seconds: float
    directory: str
    #: Operations counted, by part; empty where they were not.
    flops: dict[str, float]
    #: Held-out micro tau of the test prompts; NaN where none were tested.
    test_tau: float


def print_report(report: TrainingReport) -> None:
    table = Table(title="Training report", show_header=False, title_justify="left")
    if not math.isnan(report.tau_before):
        change = report.tau_after / report.tau_before - 1
        table.add_row("held-out tau before", f"{report.tau_before:.3f}")
        table.add_row("held-out tau after", f"{report.tau_after:.3f} ({change:+.1%})")
    else:
        table.add_row("held-out tau", f"{report.tau_after:.3f}")
    if not math.isnan(report.test_tau):
        table.add_row("test tau", f"{report.test_tau:.3f}")
    table.add_row("optimizer steps", f"{report.steps:,}")
    table.add_row("recorded tokens seen", f"{report.tokens:,}")
    other = report.total_seconds - sum(report.seconds.values())
    for section, seconds in [*report.seconds.items(), ("start-up, other", other)]:
        table.add_row(f"time in {section}", f"{seconds:.1f} s")
    for part, spent in report.flops.items():
        table.add_row(f"operations, {part}", f"{spent / 1e12:.3f} TFLOP")
    table.add_row("total time", f"{report.total_seconds:.1f} s")
    console = Console()
    console.print(table)
    # Outside the table, so that each line can be copied.
    where = os.path.relpath(report.directory)
    for line in (
        f"drafter      {where}/drafter",
        f"checkpoints  {where}/checkpoints",
        f"evaluate     python eval.py checkpoint={where}/drafter",
        f"watch        tensorboard --logdir {where}/tensorboard",
    ):
        console.print(line, soft_wrap=True, highlight=False)
