"""An evaluation as a table on the terminal and as JSON."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from draftopd.evaluation.runner import Evaluation
from draftopd.files import replaced


def summary(result: Evaluation) -> dict[str, Any]:
    """The headline figures; rates in tokens a second."""
    micro, macro = result.tau
    return {
        "benchmark": result.benchmark,
        "prompts": len(result.prompts),
        "batch_size": result.batch_size,
        "temperature": result.sampling.temperature,
        "tau_micro": micro,
        "tau_macro": macro,
        "plain_tokens_per_second": result.plain_rate,
        "speculative_tokens_per_second": result.speculative_rate,
        "speedup": result.speedup,
        "solved": result.solved,
        "lossless_checked": result.checked,
        "mismatches": len(result.mismatches),
        "acceptance_by_position": result.acceptance_by_position(),
        "rejection_positions": result.rejection_positions(),
    }


def print_evaluation(result: Evaluation, console: Console | None = None) -> None:
    """The headline table, the acceptance by position, and every mismatch there is."""
    console = console or Console()
    figures = summary(result)
    table = Table(title=f"{result.benchmark}: {len(result.prompts)} prompts", show_header=False, title_justify="left")
    table.add_row("tau, micro", f"{figures['tau_micro']:.3f}")
    table.add_row("tau, macro", f"{figures['tau_macro']:.3f}")
    table.add_row("plain", f"{result.plain_rate:.1f} tokens/s")
    table.add_row("with the drafter", f"{result.speculative_rate:.1f} tokens/s")
    speedup = result.speedup
    table.add_row(
        "speedup", "none: not lossless" if speedup is None else f"{speedup:.2f}x at batch {result.batch_size}"
    )
    if result.solved is not None:
        table.add_row("answers right", f"{result.solved:.1%}")
    table.add_row("lossless", _verdict(result))
    console.print(table)
    positions = Table(title="Acceptance by block position", title_justify="left")
    rates = figures["acceptance_by_position"]
    for slot in range(1, len(rates) + 1):
        positions.add_column(str(slot), justify="right")
    positions.add_row(*(f"{rate:.2f}" for rate in rates))
    console.print(positions)
    for prompt in result.mismatches:
        assert prompt.mismatch is not None
        gap = prompt.mismatch.logit_gap
        at = "one text ends earlier" if gap is None else f"logit gap {gap:.2e}"
        console.print(f"{prompt.id} differs from plain decoding at response token {prompt.mismatch.position}: {at}")


def write_evaluation(result: Evaluation, path: Path, record: dict[str, Any]) -> None:
    """Headline, every prompt's figures, and ``record`` (what was evaluated, with which versions) as JSON."""
    content = {**record, "summary": summary(result), "prompts": [asdict(p) for p in result.prompts]}
    with replaced(path) as partial:
        partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _verdict(result: Evaluation) -> str:
    if not result.checked:
        return "token equality does not apply above temperature 0"
    right = len(result.prompts) - len(result.mismatches)
    return f"{right} of {len(result.prompts)} equal to plain decoding"
