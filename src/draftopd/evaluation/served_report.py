"""A server's figures as a table and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from draftopd.evaluation.served import Served
from draftopd.evaluation.store import finite
from draftopd.io.files import replaced, write_json

#: Of ``served.json``.
FORMAT = 1

HEADINGS = (
    "benchmark",
    "concurrency",
    "tau",
    "tokens/s",
    "plain tokens/s",
    "speedup",
    "median latency",
    "equal to plain",
)


def rows(found: Sequence[Served]) -> list[list[str]]:
    """The table's cells, a row for each benchmark and concurrency."""
    return [
        [
            s.benchmark, str(s.concurrency), _number(s.tau, 2), _number(s.tokens_per_second, 0),
            _number(s.plain_tokens_per_second, 0),
            "none" if s.lossless is False else "-" if s.speedup is None else f"{s.speedup:.2f}x",
            f"{s.latency:.2f} s", "-" if s.compared is None else f"{s.equal} of {s.compared}",
        ]
        for s in found
    ]  # fmt: skip


def print_served(found: Sequence[Served], console: Console | None = None) -> None:
    """The table on the terminal."""
    table = Table(title="Served", title_justify="left")
    for heading in HEADINGS:
        table.add_column(heading, overflow="fold")
    for row in rows(found):
        table.add_row(*row)
    (console or Console()).print(table)


def write_served(found: Sequence[Served], directory: Path, record: dict[str, Any]) -> None:
    """``served.json``, with ``record`` (what was evaluated, with which versions), and ``table.md``."""
    content = finite({**record, "served": [s.as_dict() for s in found]})
    write_json(directory / "served.json", content, FORMAT)
    lines = ["| " + " | ".join(HEADINGS) + " |", "|" + "---|" * len(HEADINGS)]
    lines += ["| " + " | ".join(row) + " |" for row in rows(found)]
    with replaced(directory / "table.md") as partial:
        partial.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
