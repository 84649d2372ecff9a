"""An evaluation as one self-contained HTML file."""

from __future__ import annotations

import html
import io
from pathlib import Path

from matplotlib.figure import Figure

from draftopd.decoding.draft_text import LEGEND, as_html
from draftopd.decoding.draft_text import STYLE as DRAFT_STYLE
from draftopd.evaluation import plots
from draftopd.evaluation.report import HEADINGS, Report, notes, rows
from draftopd.io.files import replaced

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1a1a1a; max-width: 68rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
table { border-collapse: collapse; font-size: 0.92em; } td, th { padding: 0.3rem 0.8rem 0.3rem 0; text-align: left; }
th { border-bottom: 1px solid #888; } td { border-bottom: 1px solid #e3e3e3; vertical-align: top; }
svg { max-width: 100%; height: auto; } li { margin: 0.2rem 0; }
details { margin: 0.6rem 0; } summary { cursor: pointer; }
"""


def write_page(report: Report, path: Path) -> None:
    """Write the report."""
    settings = report.results[0].settings
    parts = [
        f"<!doctype html><html lang='en'><head><meta charset='utf-8'><title>Evaluation of {html.escape(report.target)}"
        f"</title><style>{STYLE}{DRAFT_STYLE}</style></head><body>",
        f"<h1>Speculative decoding of {html.escape(report.target)}</h1>",
        f"<p>Batch {settings.batch_size}, temperature {settings.temperature:g}, at most {settings.max_new_tokens} new "
        f"tokens, {'thinking' if settings.thinking else 'non-thinking'} template. Tau: tokens per verification "
        "(micro: all tokens by all verifications; macro: mean over prompts). Speedup: median over batches of the "
        "paired ratio to plain decoding by the same engine. Brackets: 95 % bootstrap intervals over examples, for "
        "the speedup over batches.</p>",
        _table(report),
        "<ul>" + "".join(f"<li>{html.escape(line)}</li>" for line in notes(report)) + "</ul>",
        "<h2>By benchmark</h2>",
        svg(plots.overview(report)),
    ]
    for benchmark in report.benchmarks:
        parts += [f"<h2>{html.escape(benchmark)}</h2>", svg(plots.details(report, benchmark))]
    if report.expected:
        parts += [
            "<h2>Expected speedup</h2>",
            "<p>tau(B) / (cost of a draft step + cost of a verification), in plain steps. The tau of smaller "
            "blocks follows from the accepted lengths. Dotted: expected if a step costs only the reading of weights, "
            "as for one sequence on a large GPU.</p>",
            svg(plots.speedups(report)),
        ]
    parts += ["<h2>Drafts</h2>", LEGEND, *_drafts(report), "</body></html>"]
    with replaced(path) as partial:
        partial.write_text("\n".join(parts), encoding="utf-8")


def svg(figure: Figure) -> str:
    """The figure as an SVG element."""
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None})
    return "<svg" + text.getvalue().partition("<svg")[2]


def _table(report: Report) -> str:
    head = "".join(f"<th>{html.escape(h)}</th>" for h in HEADINGS)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in row) + "</tr>" for row in rows(report))
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _drafts(report: Report) -> list[str]:
    parts: list[str] = []
    for result in report.results:
        for prompt in result.prompts:
            if prompt.drafts:
                tau = f"tau {sum(prompt.emitted) / len(prompt.emitted):.2f}" if prompt.emitted else "no block"
                turn = f", turn {prompt.turn + 1}" if prompt.turn else ""
                title = f"{result.benchmark}, {prompt.id}{turn}: {result.drafter}, {tau}"
                question = f"<p>{html.escape(prompt.question)}</p>"
                opened = "" if parts else " open"
                parts.append(
                    f"<details{opened}><summary>{html.escape(title)}</summary>{question}{as_html(prompt.drafts)}</details>"
                )
    return parts
