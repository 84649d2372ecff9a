"""The Draft-OPD paper's figures (arXiv 2605.29343) beside those of an evaluation."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from draftopd.errors import FileError


class PaperRow(NamedTuple):
    """Mean speedup and tau of one model and drafter."""

    model: str
    drafter: str
    speedup: float
    tau: float


PAPER = (
    PaperRow("Qwen3-4B", "EAGLE-3", 3.87, 5.33),
    PaperRow("Qwen3-4B", "DFlash", 4.33, 5.51),
    PaperRow("Qwen3-4B", "Draft-OPD", 4.86, 5.96),
    PaperRow("Qwen3-8B", "EAGLE-3", 4.06, 5.64),
    PaperRow("Qwen3-8B", "DFlash", 4.34, 5.19),
    PaperRow("Qwen3-8B", "Draft-OPD", 4.89, 5.73),
)

#: Text in a drafter's name that puts it into the paper's row.
MARKS = {"Draft-OPD": "opd", "EAGLE-3": "eagle", "DFlash": "dflash"}


class OwnRow(NamedTuple):
    """A run's means; no speedup if one benchmark has none."""

    target: str
    drafter: str
    speedup: float | None
    tau: float
    benchmarks: tuple[str, ...]
    temperature: float


def read(results: Path) -> list[OwnRow]:
    """The run's means from its ``results.json``.

    Raises:
        FileError: if the file cannot be read or is not one.
    """
    try:
        return _own_rows(json.loads(results.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FileError(f"{results} is not the results.json of an evaluation ({error}).") from error


def _own_rows(content: dict[str, Any]) -> list[OwnRow]:
    found: dict[str, list[dict[str, Any]]] = {}
    for summary in content["summaries"]:
        found.setdefault(summary["drafter"], []).append(summary)
    rows = []
    for drafter, summaries in found.items():
        speedups = [s["speedup"] for s in summaries]
        mean = None if None in speedups else sum(speedups) / len(speedups)
        tau = sum(s["tau_macro"] for s in summaries) / len(summaries)
        benchmarks = tuple(s["benchmark"] for s in summaries)
        rows.append(OwnRow(content["target"], drafter, mean, tau, benchmarks, summaries[0]["temperature"]))
    return rows


def table(own: Sequence[OwnRow]) -> str:
    """A Markdown table of the paper's rows with this run's beside them; runs without a row in the paper follow."""
    lines = [
        "| model | drafter | paper: speedup | paper: tau | this run: speedup | this run: tau |",
        "|---|---|---|---|---|---|",
    ]
    matched = set()
    for row in PAPER:
        mine = next((o for o in own if _belongs_to(o, row)), None)
        matched.add(mine)
        cells = ("", "") if mine is None else (_speedup(mine), f"{mine.tau:.2f}")
        lines.append(f"| {row.model} | {row.drafter} | {row.speedup:.2f}x | {row.tau:.2f} | {cells[0]} | {cells[1]} |")
    for mine in own:
        if mine not in matched:
            lines.append(f"| {mine.target} | {mine.drafter} | | | {_speedup(mine)} | {mine.tau:.2f} |")
    if own:
        covered = ", ".join(own[0].benchmarks)
        lines += ["", f"This run: {covered}; temperature {own[0].temperature:g}."]
    return "\n".join(lines)


def _belongs_to(own: OwnRow, row: PaperRow) -> bool:
    kind = next((kind for kind, mark in MARKS.items() if mark in own.drafter.lower()), None)
    return Path(own.target).name.lower() == row.model.lower() and kind == row.drafter and own.temperature == 0


def _speedup(own: OwnRow) -> str:
    return "none" if own.speedup is None else f"{own.speedup:.2f}x"
