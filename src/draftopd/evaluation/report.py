"""An evaluation as tables on the terminal and as JSON."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from draftopd.evaluation.lossless import Mismatch
from draftopd.evaluation.runner import Evaluation
from draftopd.files import replaced

#: Mismatches named on the terminal; the JSON file has all.
MISMATCHES_SHOWN = 5


def summary(result: Evaluation) -> dict[str, Any]:
    """The headline figures: rates in tokens a second, None for what cannot be said."""
    micro, macro = result.tau
    figures = {
        "benchmark": result.benchmark,
        "prompts": len(result.prompts),
        "block_size": result.block_size,
        "batch_size": result.settings.batch_size,
        "temperature": result.settings.temperature,
        "tau_micro": micro,
        "tau_macro": macro,
        "mean_accepted": result.mean_accepted,
        "plain_tokens_per_second": result.plain_rate,
        "speculative_tokens_per_second": result.speculative_rate,
        "speedup": result.speedup,
        "speedup_withheld": result.withheld,
        "solved": result.solved,
        "lossless_checked": result.checked,
        "mismatches": len(result.mismatches),
        "acceptance_by_position": result.acceptance_by_position(),
        "rejection_positions": result.rejection_positions(),
    }
    return _finite(figures)


def print_evaluation(result: Evaluation, console: Console | None = None) -> None:
    """The headline table, the acceptance by position, and the first mismatches."""
    console = console or Console()
    figures, settings = summary(result), result.settings
    mode = f"batch {settings.batch_size}, temperature {settings.temperature:g}"
    table = Table(
        title=f"{result.benchmark}: {len(result.prompts)} prompts, {mode}", show_header=False, title_justify="left"
    )
    table.add_row("tau, micro", _number(figures["tau_micro"], 3))
    table.add_row("tau, macro", _number(figures["tau_macro"], 3))
    table.add_row("mean accepted", f"{_number(figures['mean_accepted'], 3)} of {result.block_size - 1} proposals")
    table.add_row("plain", f"{result.plain_rate:.1f} tokens/s")
    table.add_row("with the drafter", f"{result.speculative_rate:.1f} tokens/s")
    table.add_row("speedup", f"none, {result.withheld}" if result.speedup is None else f"{result.speedup:.2f}x")
    if result.solved is not None:
        table.add_row("answers right", f"{result.solved:.1%}")
    table.add_row("lossless", _verdict(result))
    console.print(table)
    console.print(_positions(figures["acceptance_by_position"], figures["rejection_positions"]))
    for prompt in result.mismatches[:MISMATCHES_SHOWN]:
        assert prompt.mismatch is not None
        console.print(f"{prompt.id}: {_difference(prompt.mismatch)}", highlight=False)
    hidden = len(result.mismatches) - MISMATCHES_SHOWN
    if hidden > 0:
        console.print(f"and {hidden} more, see the file", highlight=False)


def write_evaluation(result: Evaluation, path: Path, record: dict[str, Any]) -> None:
    """Headline, every prompt's figures, and ``record`` (what was evaluated, with which versions) as JSON."""
    content = {**record, "summary": summary(result), "prompts": [asdict(p) for p in result.prompts]}
    with replaced(path) as partial:
        partial.write_text(json.dumps(_finite(content), indent=2) + "\n", encoding="utf-8")


def _positions(rates: list[float | None], rejections: list[int]) -> Table:
    """By block position: the acceptance rate among blocks that got there, and the blocks rejected there."""
    table = Table(title="By block position", title_justify="left")
    for heading in ("position", "acceptance", "rejected here"):
        table.add_column(heading, justify="right")
    for slot, (rate, rejected) in enumerate(zip(rates, rejections, strict=False), start=1):
        table.add_row(str(slot), _number(rate, 2), str(rejected))
    table.add_row("none", "", str(rejections[-1]))
    return table


def _verdict(result: Evaluation) -> str:
    if not result.checked:
        return "token equality does not apply above temperature 0"
    right = len(result.prompts) - len(result.mismatches)
    return f"{right} of {len(result.prompts)} equal to plain decoding"


def _difference(mismatch: Mismatch) -> str:
    where = f"differs from plain decoding at response token {mismatch.position}"
    if mismatch.speculative_token is None:
        return f"{where}: it ends there, plain decoding goes on with token {mismatch.plain_token}"
    if mismatch.plain_token is None:
        return f"{where}: plain decoding ends there, it goes on with token {mismatch.speculative_token}"
    tokens = f"{mismatch.speculative_token} instead of {mismatch.plain_token}"
    return f"{where}: {tokens}, logit gap {mismatch.logit_gap:+.2e}"


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _finite(value: Any) -> Any:
    """The same with None for NaN and infinity, which JSON does not know."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
