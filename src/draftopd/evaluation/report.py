"""An evaluation as one table, printed, in Markdown and LaTeX, and as JSON."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from draftopd.evaluation.cost import Prediction, best
from draftopd.evaluation.lossless import Mismatch
from draftopd.evaluation.results import Evaluation
from draftopd.evaluation.statistics import Interval, difference, groups_of, sentence
from draftopd.evaluation.store import finite
from draftopd.io import files
from draftopd.io.files import replaced

#: Of ``results.json``.
FORMAT = 1

#: Mismatches named on the terminal; the JSON file has all.
MISMATCHES_SHOWN = 5


@dataclass(frozen=True)
class Expected:
    """Speedups expected of a drafter by block size: with the costs measured here, and where bandwidth is all."""

    drafter: str
    here: list[Prediction]
    bandwidth: list[Prediction]


@dataclass(frozen=True)
class Report:
    """Everything that one command found.

    ``results`` by benchmark, then by drafter, in the order they were asked for; ``expected`` by drafter.
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
        """Plain sentences on how each drafter compares with the one named before it."""
        found = []
        for benchmark in self.benchmarks:
            for first, second in pairwise(self.of(benchmark)):
                groups = groups_of(second.prompts)
                gap = difference(second.tau_parts(), first.tau_parts(), groups)
                found.append(f"{benchmark}: " + sentence("tau", second.drafter, first.drafter, gap))
                if first.speedup is not None and second.speedup is not None:
                    a, b = ([(s, 1.0) for s in r.speedups().values()] for r in (second, first))
                    gap = difference(a, b, list(first.speedups()), median=True)
                    found.append(f"{benchmark}: " + sentence("speedup", second.drafter, first.drafter, gap))
        return found


#: Characters that LaTeX takes for commands.
_LATEX = {char: "\\" + char for char in "&%_#${}"} | {
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "\\": r"\textbackslash{}",
}

HEADINGS = ("benchmark", "drafter", "prompts", "tau", "tau, macro", "speedup", "tokens/s", "lossless")


def rows(report: Report) -> list[list[str]]:
    """The table's cells, a row for each benchmark and drafter."""
    return [
        [
            r.benchmark, r.drafter, str(len(r.prompts)), ranged(r.tau_interval), _number(r.tau[1], 2),
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
    # What fits eighty columns; the files have all.
    shown = [HEADINGS.index(name) for name in ("benchmark", "drafter", "tau", "speedup", "lossless")]
    for column in shown:
        table.add_column(HEADINGS[column], overflow="fold")
    for row in rows(report):
        table.add_row(*(row[column] for column in shown))
    console.print(table)
    for line in notes(report):
        console.print(line, highlight=False)


def notes(report: Report) -> list[str]:
    """What the table cannot say: differences, expected speedups, reasons for a missing speedup, mismatches."""
    lines = report.differences()
    for expected in report.expected:
        lines += [expectation(report, expected), recommendation(expected)]
    for r in report.results:
        if r.withheld:
            lines.append(f"{r.benchmark}, {r.drafter}: no speedup, {r.withheld}.")
        if r.solved is not None and r is report.of(r.benchmark)[0]:
            lines.append(f"{r.benchmark}: {r.solved:.1%} of the answers are right.")
        shown = r.mismatches[:MISMATCHES_SHOWN]
        lines += [f"{r.benchmark}, {r.drafter}, {p.id}: {_difference(p.mismatch)}" for p in shown if p.mismatch]
        if len(r.mismatches) > MISMATCHES_SHOWN:
            lines.append(f"and {len(r.mismatches) - MISMATCHES_SHOWN} more, see results.json")
    return lines


def expectation(report: Report, expected: Expected) -> str:
    """Predicted beside measured, at the drafter's own block size."""
    own = expected.here[-1]
    measured = [
        f"{r.speedup:.2f}x on {r.benchmark}" for r in report.results if r.drafter == expected.drafter and r.speedup
    ]
    return (
        f"{expected.drafter}: a draft step costs {own.draft:.2f} and a verification of {own.block_size} tokens "
        f"{own.verify:.2f} plain steps, so {own.speedup:.2f}x is expected; measured: {', '.join(measured) or 'none'}."
    )


def recommendation(expected: Expected) -> str:
    """The block size to choose, here and where bandwidth is all that counts."""
    here = best(expected.here)
    first = f"{expected.drafter}: block size {here.block_size} is expected to be fastest here ({here.speedup:.2f}x)"
    if not expected.bandwidth:
        return f"{first}."
    there = best(expected.bandwidth)
    return f"{first}; where reading weights is all that a step costs, {there.block_size} ({there.speedup:.2f}x)."


def summary(result: Evaluation) -> dict[str, Any]:
    """The headline figures: rates in tokens a second, None for what cannot be said."""
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
            "law_p": result.law_p,
            "acceptance_by_position": result.acceptance_by_position(),
            "rejection_positions": result.rejection_positions(),
            "tau_by_length": result.tau_by_length(),
            "acceptance_by_entropy": result.acceptance_by_entropy(),
        }
    )


def write_tables(report: Report, directory: Path) -> None:
    """``table.md`` and ``table.tex``."""
    cells = rows(report)
    lines = ["| " + " | ".join(HEADINGS) + " |", "|" + "---|" * len(HEADINGS)]
    lines += ["| " + " | ".join(cell.replace("|", r"\|") for cell in row) + " |" for row in cells]
    text = "\n".join(lines) + "\n\n" + "\n".join(f"- {line}" for line in notes(report)) + "\n"
    with replaced(directory / "table.md") as partial:
        partial.write_text(text, encoding="utf-8")
    body = [" & ".join(map(_latex, row)) + r" \\" for row in cells]
    head = " & ".join(map(_latex, HEADINGS)) + r" \\"
    tex = [
        "% needs \\usepackage{booktabs}",
        rf"\begin{{tabular}}{{{'l' * len(HEADINGS)}}}",
        r"\toprule",
        head,
        r"\midrule",
    ]
    tex += [*body, r"\bottomrule", r"\end{tabular}", ""]
    with replaced(directory / "table.tex") as partial:
        partial.write_text("\n".join(tex), encoding="utf-8")


def write_json(report: Report, path: Path, record: dict[str, Any]) -> None:
    """Headlines, every prompt's figures, and ``record`` (what was evaluated, with which versions)."""
    content = {
        **record,
        "target": report.target,
        "summaries": [summary(r) for r in report.results],
        "differences": report.differences(),
        "expected": [
            {
                "drafter": e.drafter,
                **{
                    name: [asdict(p) | {"speedup": p.speedup} for p in getattr(e, name)]
                    for name in ("here", "bandwidth")
                },
            }
            for e in report.expected
        ],
        "prompts": [
            {"benchmark": r.benchmark, "drafter": r.drafter, **asdict(p)} for r in report.results for p in r.prompts
        ],
    }
    files.write_json(path, finite(content), FORMAT)


def verdict(result: Evaluation) -> str:
    """Whether the texts are the target's own, in a few words."""
    count = len(result.prompts)
    if result.checked:
        equal, ties = count - len(result.mismatches), len(result.ties)
        tied = f", {ties} differ by a tie" if ties else ""
        return f"{equal} of {count} equal{tied}"
    if result.law_p is None:
        return "not tested"
    return f"same law, p = {result.law_p:.2g}" if not result.withheld else f"other law, p = {result.law_p:.2g}"


def ranged(interval: Interval | None) -> str:
    """``2.31 [2.25, 2.37]``; ``2.31`` of a single example."""
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


def _number(value: float, digits: int) -> str:
    return "-" if math.isnan(value) else f"{value:.{digits}f}"


def _latex(cell: str) -> str:
    return "".join(_LATEX.get(char, char) for char in cell)
