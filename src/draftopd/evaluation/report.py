"""An evaluation as one table (printed, in Markdown and in LaTeX), and as JSON."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from draftopd.evaluation.cost import Prediction, best
from draftopd.evaluation.lossless import Mismatch
from draftopd.evaluation.results import Evaluation
from draftopd.evaluation.statistics import Interval, difference, sentence
from draftopd.evaluation.store import finite
from draftopd.io import files
from draftopd.io.files import replaced

#: Format version of ``results.json``.
FORMAT = 1

#: Mismatches listed per result; the JSON file has all.
MISMATCHES_SHOWN = 5


@dataclass(frozen=True)
class Expected:
    """A drafter's expected speedups by block size: from the costs measured here, and if bandwidth is the only cost."""

    drafter: str
    here: list[Prediction]
    bandwidth: list[Prediction]


@dataclass(frozen=True)
class Report:
    """All results of one command.

    ``results`` are ordered by benchmark, then by drafter, as in the configuration; ``expected`` by drafter.
    """

    target: str
    results: list[Evaluation]
    expected: list[Expected]

    @property
    def benchmarks(self) -> list[str]:
        return list(dict.fromkeys(r.benchmark for r in self.results))

    @property
    def drafters(self) -> list[str]:
        return list(dict.fromkeys(r.drafter for r in self.results))

    def of(self, benchmark: str) -> list[Evaluation]:
        return [r for r in self.results if r.benchmark == benchmark]

    def differences(self) -> list[str]:
        """Sentences that compare each drafter with the one before it."""
        found = []
        for benchmark in self.benchmarks:
            for first, second in pairwise(self.of(benchmark)):
                gap = difference(second.tau_parts(), first.tau_parts(), [p.id for p in second.prompts])
                found.append(f"{benchmark}: " + sentence("tau", second.drafter, first.drafter, gap))
                if first.speedup is not None and second.speedup is not None:
                    a, b = ([(s, 1.0) for s in r.speedups().values()] for r in (second, first))
                    gap = difference(a, b, list(first.speedups()), median=True)
                    found.append(f"{benchmark}: " + sentence("speedup", second.drafter, first.drafter, gap))
        return found


#: Escapes of the characters that are commands in LaTeX.
_LATEX = {char: "\\" + char for char in "&%_#${}"} | {
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "\\": r"\textbackslash{}",
}

HEADINGS = ("benchmark", "drafter", "prompts", "tau", "tau, macro", "speedup", "tokens/s", "lossless")


def rows(report: Report) -> list[list[str]]:
    """The table's cells, one row per benchmark and drafter."""
    return [
        [
            r.benchmark, r.drafter, str(len(r.prompts)), ranged(r.tau_interval),
            "-" if math.isnan(r.tau[1]) else f"{r.tau[1]:.2f}",
            "none" if r.speedup is None else f"{ranged(r.speedup_interval)}x",
            f"{r.speculative_rate:.0f} ({r.plain_rate:.0f} plain)", verdict(r),
        ]
        for r in report.results
    ]  # fmt: skip


def print_report(report: Report, console: Console | None = None) -> None:
    """The table, the sentences on differences, the expected speedups, and the first mismatches."""
    console = console or Console()
    settings = report.results[0].settings
    table = Table(
        title=f"{report.target}: batch {settings.batch_size}, temperature {settings.temperature:g}, "
        f"at most {settings.max_new_tokens} tokens; intervals are 95 %",
        title_justify="left",
    )
    # These columns fit a terminal of 80 characters; the files have all of them.
    shown = [HEADINGS.index(name) for name in ("benchmark", "drafter", "tau", "speedup", "lossless")]
    for column in shown:
        table.add_column(HEADINGS[column], overflow="fold")
    for row in rows(report):
        table.add_row(*(row[column] for column in shown))
    console.print(table)
    for line in notes(report):
        console.print(line, highlight=False)


def notes(report: Report) -> list[str]:
    """Lines below the table: differences, expected speedups, reasons for a missing speedup, mismatches."""
    lines = report.differences()
    for expected in report.expected:
        lines += [expectation(report, expected), recommendation(expected)]
    for r in report.results:
        if r.withheld:
            lines.append(f"{r.benchmark}, {r.drafter}: no speedup, {r.withheld}.")
        if r.solved is not None and r is report.of(r.benchmark)[0]:
            lines.append(f"{r.benchmark}: {r.solved:.1%} of the answers are correct.")
        shown = r.mismatches[:MISMATCHES_SHOWN]
        lines += [f"{r.benchmark}, {r.drafter}, {p.id}: {_difference(p.mismatch)}" for p in shown if p.mismatch]
        if len(r.mismatches) > MISMATCHES_SHOWN:
            lines.append(f"and {len(r.mismatches) - MISMATCHES_SHOWN} more, see results.json")
    return lines


def expectation(report: Report, expected: Expected) -> str:
    """The predicted and the measured speedup at the drafter's own block size."""
    own = expected.here[-1]
    measured = [
        f"{r.speedup:.2f}x on {r.benchmark}" for r in report.results if r.drafter == expected.drafter and r.speedup
    ]
    return (
        f"{expected.drafter}: a draft step costs {own.draft:.2f} and a verification of {own.block_size} tokens "
        f"{own.verify:.2f} plain steps, so {own.speedup:.2f}x is expected; measured: {', '.join(measured) or 'none'}."
    )


def recommendation(expected: Expected) -> str:
    """The block sizes with the largest expected speedup, here and if bandwidth is the only cost."""
    here = best(expected.here)
    first = f"{expected.drafter}: block size {here.block_size} is expected to be fastest here ({here.speedup:.2f}x)"
    if not expected.bandwidth:
        return f"{first}."
    there = best(expected.bandwidth)
    return f"{first}; if a step costs only the reading of weights, {there.block_size} ({there.speedup:.2f}x)."


def summary(result: Evaluation) -> dict[str, Any]:
    """The headline figures: rates in tokens per second, None for figures that do not exist."""
    micro, macro = result.tau
    return finite(
        {
            "benchmark": result.benchmark,
            "drafter": result.drafter,
            "prompts": len(result.prompts),
            "block_size": result.block_size,
            "batch_size": result.settings.batch_size,
            "temperature": result.settings.temperature,
            "tau_micro": micro,
            "tau_interval": result.tau_interval._asdict(),
            "tau_macro": macro,
            "mean_accepted": result.mean_accepted,
            "plain_tokens_per_second": result.plain_rate,
            "speculative_tokens_per_second": result.speculative_rate,
            "speedup": result.speedup,
            "speedup_interval": i._asdict() if (i := result.speedup_interval) else None,
            "speedup_withheld": result.withheld,
            "solved": result.solved,
            "lossless_checked": result.checked,
            "mismatches": len(result.mismatches),
            "ties": len(result.ties),
            "tie_tolerance": result.tolerance,
            "law_p": result.distribution_p,
            "acceptance_by_position": result.acceptance_by_position(),
            "rejection_positions": result.rejection_positions(),
            "tau_by_length": result.tau_by_length(),
            "acceptance_by_entropy": result.acceptance_by_entropy(),
        }
    )


def write_tables(report: Report, directory: Path) -> None:
    """``table.md`` and ``table.tex``."""
    cells = rows(report)
    text = markdown(HEADINGS, cells) + "\n" + "".join(f"- {line}\n" for line in notes(report))
    with replaced(directory / "table.md") as partial:
        partial.write_text(text, encoding="utf-8")
    head, *body = [" & ".join(map(_latex, row)) + r" \\" for row in (HEADINGS, *cells)]
    begin = ["% needs \\usepackage{booktabs}", rf"\begin{{tabular}}{{{'l' * len(HEADINGS)}}}"]
    tex = [*begin, r"\toprule", head, r"\midrule", *body, r"\bottomrule", r"\end{tabular}", ""]
    with replaced(directory / "table.tex") as partial:
        partial.write_text("\n".join(tex), encoding="utf-8")


def markdown(headings: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    """A Markdown table, with vertical bars in cells escaped."""
    lines = ["| " + " | ".join(headings) + " |", "|" + "---|" * len(headings)]
    lines += ["| " + " | ".join(cell.replace("|", r"\|") for cell in row) + " |" for row in cells]
    return "\n".join(lines) + "\n"


def write_json(report: Report, path: Path, record: dict[str, Any]) -> None:
    """Write headline figures, every prompt's figures, and ``record`` (what was evaluated, with which versions)."""

    def predictions(found: list[Prediction]) -> list[dict[str, Any]]:
        return [asdict(p) | {"speedup": p.speedup} for p in found]

    content = {
        **record,
        "target": report.target,
        "summaries": [summary(r) for r in report.results],
        "differences": report.differences(),
        "expected": [
            {"drafter": e.drafter, "here": predictions(e.here), "bandwidth": predictions(e.bandwidth)}
            for e in report.expected
        ],
        "prompts": [
            {"benchmark": r.benchmark, "drafter": r.drafter, **asdict(p)} for r in report.results for p in r.prompts
        ],
    }
    files.write_json(path, finite(content), FORMAT)


def verdict(result: Evaluation) -> str:
    """Whether decoding was lossless, in a few words."""
    count = len(result.prompts)
    if result.checked:
        equal, ties = count - len(result.mismatches), len(result.ties)
        tied = f", {ties} differ by a tie" if ties else ""
        return f"{equal} of {count} equal{tied}"
    if result.distribution_p is None:
        return "not tested"
    return f"{'other' if result.withheld else 'same'} distribution, p = {result.distribution_p:.2g}"


def ranged(interval: Interval | None) -> str:
    """``2.31 [2.25, 2.37]``; ``2.31`` for a single example, ``-`` for no figure."""
    if interval is None or math.isnan(interval.value):
        return "-"
    if math.isnan(interval.low):
        return f"{interval.value:.2f}"
    return f"{interval.value:.2f} [{interval.low:.2f}, {interval.high:.2f}]"


def _difference(mismatch: Mismatch) -> str:
    where = f"differs from plain decoding at response token {mismatch.position}"
    if mismatch.speculative_token is None:
        return f"{where}: it ends there, plain decoding goes on with token {mismatch.plain_token}"
    if mismatch.plain_token is None:
        return f"{where}: plain decoding ends there, it goes on with token {mismatch.speculative_token}"
    tokens = f"{mismatch.speculative_token} instead of {mismatch.plain_token}"
    return f"{where}: {tokens}, logit gap {mismatch.logit_gap:+.2e}"


def _latex(cell: str) -> str:
    return "".join(_LATEX.get(char, char) for char in cell)
