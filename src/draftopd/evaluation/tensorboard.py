"""An evaluation in TensorBoard: scalars, figures, and drafts as text."""

from __future__ import annotations

from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from draftopd.decoding.draft_text import as_markdown
from draftopd.evaluation import plots
from draftopd.evaluation.report import Report


def write_tensorboard(report: Report, directory: Path) -> None:
    """Write one run per drafter for comparison, and the figures into the directory's own run."""
    for drafter in report.drafters:
        with SummaryWriter(str(directory / drafter)) as writer:
            for result in (r for r in report.results if r.drafter == drafter):
                where = f"eval/{result.benchmark}"
                writer.add_scalar(f"{where}/tau", result.tau[0])
                if result.speedup is not None:
                    writer.add_scalar(f"{where}/speedup", result.speedup)
                for slot, rate in enumerate(result.acceptance_by_position(), start=1):
                    writer.add_scalar(f"{where}/acceptance_by_position", rate, slot)
                for first, tau, _ in result.tau_by_length():
                    writer.add_scalar(f"{where}/tau_by_length", tau, first)
                for prompt in result.prompts:
                    if prompt.drafts:
                        writer.add_text(f"{where}/drafts/{prompt.id}_{prompt.turn}", as_markdown(prompt.drafts))
    with SummaryWriter(str(directory)) as writer:
        writer.add_figure("eval/overview", plots.overview(report))
        for benchmark in report.benchmarks:
            writer.add_figure(f"eval/{benchmark}", plots.details(report, benchmark))
        if report.expected:
            writer.add_figure("eval/expected_speedup", plots.speedups(report))
