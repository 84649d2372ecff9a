"""An evaluation's figures. Each drafter has the same colour in all of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import matplotlib.ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from draftopd.evaluation.report import Report
from draftopd.evaluation.results import LENGTH_BIN, Evaluation
from draftopd.evaluation.statistics import Interval
from draftopd.metrics.entropy_acceptance import EDGES

#: Distinguishable with colour-blindness (Okabe and Ito).
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")

#: Rates of fewer slots are not drawn.
MIN_SLOTS = 10


def overview(report: Report) -> Figure:
    """Tau and speedup by benchmark, with 95 % intervals."""
    figure = Figure(
        figsize=(max(7.0, 2.2 * len(report.benchmarks) * len(report.drafters) ** 0.5), 3.4), layout="constrained"
    )
    left, right = figure.subplots(1, 2)
    _bars(left, report, "tau", lambda r: r.tau_interval)
    _bars(right, report, "speedup over plain decoding", lambda r: r.speedup_interval)
    right.axhline(1, color="black", linewidth=0.8, linestyle=":")
    _legend(figure, left)
    return figure


def details(report: Report, benchmark: str) -> Figure:
    """One benchmark: acceptance by position, rejections, tau along the response, acceptance by entropy."""
    figure = Figure(figsize=(9, 6.4), layout="constrained")
    axes = figure.subplots(2, 2)
    results = report.of(benchmark)
    for panel, draw in zip(axes.flat, (_positions, _rejections, _length, _entropy), strict=True):
        draw(panel, results)
        panel.spines[["top", "right"]].set_visible(False)
    _legend(figure, axes[0, 0])
    return figure


def speedups(report: Report) -> Figure:
    """Expected speedup by block size, from the costs measured here and if bandwidth is the only cost."""
    figure = Figure(figsize=(7, 3.2), layout="constrained")
    panel = figure.subplots()
    names = dict.fromkeys([*report.drafters, *(e.drafter for e in report.expected)])
    colours = dict(zip(names, COLOURS * 9, strict=False))
    for expected in report.expected:
        colour = colours[expected.drafter]
        for style, name, predictions in (("-", "here", expected.here), (":", "bandwidth only", expected.bandwidth)):
            if not predictions:
                continue
            panel.plot(
                [p.block_size for p in predictions], [p.speedup for p in predictions], style,
                marker="o", color=colour, label=f"{expected.drafter}, {name}",
            )  # fmt: skip
        own = expected.here[-1].block_size
        measured = [r.speedup for r in report.results if r.drafter == expected.drafter and r.speedup]
        panel.plot([own] * len(measured), measured, "*", markersize=12, color=colour, markeredgecolor="black")
    panel.plot([], [], "*", color="white", markeredgecolor="black", markersize=12, label="measured")
    panel.axhline(1, color="black", linewidth=0.8, linestyle=":")
    panel.set(xlabel="block size", ylabel="expected speedup", ylim=(0, None))
    panel.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True))
    panel.spines[["top", "right"]].set_visible(False)
    panel.legend(frameon=False, fontsize="small", loc="center left", bbox_to_anchor=(1.01, 0.5))
    return figure


def _legend(figure: Figure, panel: Axes) -> None:
    """The drafters' colours below the panels, if there are several drafters."""
    handles, labels = panel.get_legend_handles_labels()
    if len(labels) > 1:
        figure.legend(handles, labels, loc="outside lower center", ncols=min(4, len(labels)), frameon=False)


def _bars(panel: Axes, report: Report, what: str, figure_of: Callable[[Evaluation], Interval | None]) -> None:
    width = 0.8 / len(report.drafters)
    for number, (drafter, colour) in enumerate(zip(report.drafters, COLOURS * 9, strict=False)):
        found = {r.benchmark: figure_of(r) for r in report.results if r.drafter == drafter}
        known = [(index, i) for index, name in enumerate(report.benchmarks) if (i := found.get(name)) is not None]
        x = [index + (number - (len(report.drafters) - 1) / 2) * width for index, _ in known]
        heights = [i.value for _, i in known]
        errors = [[i.value - i.low for _, i in known], [i.high - i.value for _, i in known]]
        panel.bar(x, heights, 0.92 * width, color=colour, label=drafter)
        panel.errorbar(x, heights, errors, fmt="none", ecolor="black", capsize=3, linewidth=1)
        for middle, height, (_, interval) in zip(x, heights, known, strict=True):
            if not math.isnan(height):
                top = height if math.isnan(interval.high) else interval.high
                panel.annotate(
                    f"{height:.2f}", (middle, top), textcoords="offset points", xytext=(0, 3), ha="center",
                    fontsize="small",
                )  # fmt: skip
    panel.set_xticks(range(len(report.benchmarks)), report.benchmarks)
    panel.set_ylabel(what)
    panel.margins(y=0.12)
    panel.spines[["top", "right"]].set_visible(False)


def _positions(panel: Axes, results: Sequence[Evaluation]) -> None:
    for result, colour in zip(results, COLOURS * 9, strict=False):
        counts = result.rejection_positions()
        tested = [sum(counts[slot:]) for slot in range(len(counts) - 1)]
        pairs = zip(result.acceptance_by_position(), tested, strict=True)
        rates = [rate if count >= MIN_SLOTS else math.nan for rate, count in pairs]
        panel.plot(range(1, len(rates) + 1), rates, marker="o", color=colour, label=result.drafter)
    panel.set(xlabel="position in the block", ylabel="accepted, of those tested", ylim=(0, 1.02))
    panel.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True))


def _rejections(panel: Axes, results: Sequence[Evaluation]) -> None:
    width = 0.8 / len(results)
    last = max(r.block_size for r in results)
    for number, (result, colour) in enumerate(zip(results, COLOURS * 9, strict=False)):
        counts = result.rejection_positions()
        total = sum(counts) or 1
        # The last count is of blocks without a rejection, which all drafters have at the right end.
        x = [slot + (number - (len(results) - 1) / 2) * width for slot in [*range(1, len(counts)), last]]
        panel.bar(x, [c / total for c in counts], 0.92 * width, color=colour)
    panel.set_xticks(range(1, last + 1), [*map(str, range(1, last)), "none"])
    panel.set(xlabel="position of the first rejection", ylabel="fraction of blocks")


def _length(panel: Axes, results: Sequence[Evaluation]) -> None:
    for result, colour in zip(results, COLOURS * 9, strict=False):
        bins = result.tau_by_length()
        panel.plot(
            [first + LENGTH_BIN / 2 for first, _, _ in bins], [tau for _, tau, _ in bins], marker="o", color=colour
        )
    every = [found for r in results for found in r.tau_by_length()]
    longest = max((first + LENGTH_BIN for first, _, _ in every), default=LENGTH_BIN)
    panel.set(xlabel=f"response tokens before the block, bins of {LENGTH_BIN:,}", ylabel="tau")
    panel.set(xlim=(0, longest), ylim=(0, 1.15 * max((tau for _, tau, _ in every), default=1)))


def _entropy(panel: Axes, results: Sequence[Evaluation]) -> None:
    for result, colour in zip(results, COLOURS * 9, strict=False):
        bins = [found for found in result.acceptance_by_entropy() if found[2] >= MIN_SLOTS]
        panel.plot([EDGES.index(edge) for edge, _, _ in bins], [rate for _, rate, _ in bins], marker="o", color=colour)
    panel.set_xticks(range(len(EDGES)), [f"{edge:g}" for edge in EDGES])
    panel.set(xlabel="entropy of the target from (nats)", ylabel="accepted, of those tested", ylim=(0, 1.02))
