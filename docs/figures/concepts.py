"""Draw the figures of the concepts: ``python docs/figures/concepts.py``; ``--format pdf --out DIR`` for a paper.

What a figure shows is computed from its example: accepted lengths from texts and proposals, masks from anchors, fits by
minimising the divergence.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from shapes import ACCEPTED, BLUE, CONTEXT, EDGE, INK, OWN, REJECTED, arrow, box, canvas, cell, legend

#: The target's text, and what a drafter of block size 5 proposes at each anchor that it comes to.
TEXT = ["Six", "times", "seven", "is", "42", ",", "so", "the", "answer", "is", "42", "."]
PROPOSALS = {0: "times seven is 49", 4: ". So it is", 5: "so the answer is"}


def accepted_length(proposals: Sequence[str], anchor: int) -> int:
    """How many proposals agree with the text behind an anchor."""
    follows = TEXT[anchor + 1 :]
    return next((k for k, word in enumerate(proposals) if k >= len(follows) or word != follows[k]), len(proposals))


def overview() -> Figure:
    """The loop of training."""
    figure, axes = canvas(8.6, 3.0, 17.2, 6.0)
    rooms = [
        ("prompts", ""),
        ("rollout", "target and current\ndrafter decode"),
        ("anchor buffer", "texts, anchors,\naccepted lengths"),
        ("replay", "draft again at\nthe anchors"),
        ("loss", "on accepted and\nrejected slots"),
    ]
    lefts, widths = [0.3, 2.9, 6.6, 10.3, 14.0], [1.8, 2.9, 2.9, 2.9, 2.9]
    for (name, what), left, width in zip(rooms, lefts, widths, strict=True):
        box(axes, (left, 2.5), width, 2.0, "white", linewidth=1.0, rounding=0.18)
        middle = left + width / 2
        axes.text(middle, 4.05 if what else 3.5, name, ha="center", va="center", weight="bold", size=9.5)
        axes.text(middle, 3.2, what, ha="center", va="center", linespacing=1.35)
    for (left, width), right in zip(list(zip(lefts, widths, strict=True))[:-1], lefts[1:], strict=True):
        arrow(axes, (left + width + 0.08, 3.5), (right - 0.08, 3.5))
    strip = {
        2.9: [CONTEXT, ACCEPTED, ACCEPTED, OWN, ACCEPTED, OWN],
        6.6: [CONTEXT, CONTEXT, CONTEXT, OWN, CONTEXT, OWN],
        10.3: [OWN, ACCEPTED, ACCEPTED, REJECTED, REJECTED, REJECTED],
    }
    for left, fills in strip.items():
        for place, fill in enumerate(fills):
            box(axes, (left + 0.34 + place * 0.38, 4.78), 0.3, 0.34, fill)
    for left in (2.9, 10.3):
        axes.text(left + 1.45, 5.55, "drafter  +  target, frozen", ha="center", va="center", color=BLUE)
    low = 1.35
    axes.plot([15.45, 15.45, 4.35], [2.42, low, low], color=BLUE, linewidth=1.2)
    arrow(axes, (4.35, low - 0.02), (4.35, 2.42), color=BLUE, linewidth=1.2)
    axes.text(9.9, low - 0.42, "the drafter that has learnt rolls out again", ha="center", va="center", color=BLUE)
    legend(
        axes, 2.9, 0.12, [("anchor, or the target's own token", OWN), ("accepted", ACCEPTED), ("rejected", REJECTED)]
    )
    return figure


def speculative_decoding() -> Figure:
    """Three verifications of one text."""
    figure, axes = canvas(8.6, 3.5, 14.6, 5.95)
    top, left = 5.0, 2.3
    for place in range(len(TEXT)):
        axes.text(left + place + 0.46, top + 0.55, str(place), ha="center", size=6.5, color="#6b7482")
    axes.text(0.1, top + 0.55, "position", size=7.5, color="#6b7482")
    anchor, emitted = 0, []
    for step in range(len(PROPOSALS)):
        y = top - 0.42 - step * 1.22
        proposals = PROPOSALS[anchor].split()
        n = accepted_length(proposals, anchor)
        axes.text(0.1, y + 0.42, f"verification {step + 1}", va="center", weight="bold")
        axes.text(0.1, y + 0.05, f"n = {n}, emits {n + 1}", va="center", size=7.5)
        for place in range(anchor):
            cell(axes, left + place, y, TEXT[place], CONTEXT, edgecolor="#c9cfd8")
        cell(axes, left + anchor, y, TEXT[anchor], OWN, linewidth=1.9)
        for k, word in enumerate(proposals):
            good = k < n
            cell(axes, left + anchor + 1 + k, y, word, ACCEPTED if good else REJECTED)
            if not good:
                axes.plot([left + anchor + 1.1 + k, left + anchor + 1.82 + k], [y + 0.3] * 2, color="#b4494b", lw=0.9)
        own = anchor + n + 1
        if n < len(proposals):
            axes.text(
                left + own + 0.46,
                y - 0.24,
                f"{TEXT[own]}",
                ha="center",
                va="center",
                color=EDGE[OWN],
                weight="bold",
                size=7.5,
            )
        else:
            cell(axes, left + own, y, TEXT[own], OWN)
        arrow(
            axes,
            (left + own + 0.46, y - (0.42 if n < len(proposals) else 0.06)),
            (left + own + 0.46, y - 0.56),
            color=EDGE[OWN],
            mutation_scale=7,
        )
        emitted.append(n + 1)
        anchor = own
    y = top - 0.42 - 3 * 1.22
    axes.text(0.1, y + 0.42, "next anchor", va="center", weight="bold")
    tau = sum(emitted) / len(emitted)
    axes.text(0.1, y + 0.05, rf"$\tau$ = {sum(emitted)} / {len(emitted)} = {tau:.2f}", va="center", size=8)
    for place in range(anchor + 1):
        cell(
            axes,
            left + place,
            y,
            TEXT[place],
            CONTEXT if place < anchor else OWN,
            **({"edgecolor": "#c9cfd8"} if place < anchor else {"linewidth": 1.9}),
        )
    legend(
        axes,
        2.3,
        0.18,
        [
            ("anchor (thick), correction, bonus", OWN),
            ("accepted proposal", ACCEPTED),
            ("rejected proposal", REJECTED),
            ("text so far", CONTEXT),
        ],
    )
    return figure


def streams(slots: int = 7, n: int = 3, gamma: float = 0.8) -> Figure:
    """One replayed block, its streams, and what a slot weighs."""
    figure, axes = canvas(7.4, 3.5, 11.6, 5.5)
    left, y = 3.0, 2.75
    cell(axes, left, y, "anchor", OWN, linewidth=1.9)
    for k in range(1, slots + 1):
        cell(axes, left + k, y, rf"$d_{k}$", ACCEPTED if k <= n else REJECTED)
    axes.text(0.1, y + 0.3, "block", va="center", weight="bold")

    def span(first: int, last: int, height: float, text: str, colour: str, style: str = "-") -> None:
        a, b = left + first + 0.04, left + last + 0.88
        axes.plot([a, a, b, b], [height - 0.12, height, height, height - 0.12], color=colour, lw=1.2, ls=style)
        axes.text((a + b) / 2, height + 0.2, text, ha="center", va="center", color=colour)

    span(1, n, 3.62, f"accepted stream, n = {n}", EDGE[ACCEPTED])
    span(n + 1, slots, 3.62, "rejected stream", EDGE[REJECTED])
    span(1, n + 1, 4.32, "with include_correction=true", EDGE[OWN], "--")
    axes.annotate(
        "correction slot n + 1",
        (left + n + 1.46, y - 0.03),
        (left + n + 1.46, y - 0.42),
        ha="center",
        va="center",
        size=7.5,
        color=EDGE[OWN],
    )
    axes.text(
        0.1,
        5.2,
        "The target scores all slots on the drafter's own tokens:  "
        r"$p_k = p(\,\cdot\mid y_{\leq a}, d_1 \ldots d_{k-1})$",
        va="center",
    )
    base, height = 0.5, 1.45
    axes.text(
        0.1, base + 0.75, "weight of a slot\n" r"$\gamma^{k-1}$, $\gamma$ = " f"{gamma}", va="center", linespacing=1.5
    )
    axes.plot([left + 0.9, left + slots + 1], [base, base], color=INK, lw=0.8)
    for k in range(1, slots + 1):
        weight = gamma ** (k - 1)
        fill = ACCEPTED if k <= n else REJECTED
        axes.bar(left + k + 0.46, weight * height, 0.5, base, color=fill, edgecolor=EDGE[fill], linewidth=0.9)
        axes.text(left + k + 0.46, base + weight * height + 0.14, f"{weight:.2f}", ha="center", va="center", size=7)
        axes.text(left + k + 0.46, base - 0.22, f"k = {k}", ha="center", va="center", size=7)
    return figure


def masks(length: int, anchors: Sequence[int], block: int, causal: bool) -> np.ndarray:
    """Which keys each block token sees: ``[anchors * block, length + anchors * block]``."""
    rows = np.arange(len(anchors) * block)
    own = rows // block
    context = np.arange(length)[None, :] < np.asarray(anchors)[own][:, None]
    same = own[:, None] == own[None, :]
    blocks = same & (rows[None, :] <= rows[:, None]) if causal else same
    return np.concatenate([context, blocks], 1)


def replay(length: int = 12, anchors: Sequence[int] = (2, 5, 9), block: int = 4) -> Figure:
    """All anchors in one pass: who sees what."""
    figure = Figure((8.6, 2.6), layout="constrained")
    for place, (causal, title) in enumerate(
        [(False, "drafter (DFlash): proposes"), (True, "target: scores the proposals")]
    ):
        axes = figure.add_subplot(1, 2, place + 1)
        seen = masks(length, anchors, block, causal)
        shade = np.where(seen, np.where(np.arange(seen.shape[1]) < length, 1, 2), 0)
        colours = mpl.colors.ListedColormap(["#ffffff", "#9fb3d1", "#f0b866"])
        axes.pcolormesh(shade, cmap=colours, vmin=0, vmax=2, edgecolors="#d7dce4", linewidth=0.5)
        axes.axvline(length, color=INK, lw=1.1)
        for edge in range(block, len(anchors) * block, block):
            axes.axhline(edge, color=INK, lw=0.6)
            axes.axvline(length + edge, color=INK, lw=0.6)
        axes.invert_yaxis()
        axes.set_aspect("equal")
        middles = [i * block + block / 2 for i in range(len(anchors))]
        axes.set_yticks(middles, [f"block at\nanchor {a}" for a in anchors])
        axes.set_xticks([length / 2, length + len(anchors) * block / 2], ["recorded text", "the blocks themselves"])
        axes.tick_params(length=0)
        axes.set_title(title, size=9)
        for spine in axes.spines.values():
            spine.set_linewidth(0.8)
    return figure


def acceptance_length() -> Figure:
    """tau by acceptance rate."""
    figure = Figure((4.6, 3.0), layout="constrained")
    axes = figure.add_subplot()
    rates = np.linspace(0, 0.999, 400)
    for size, colour in zip((4, 8, 16), ("#9fb3d1", "#5f7fb3", BLUE), strict=True):
        tau = (1 - rates**size) / (1 - rates)
        axes.plot(rates, tau, color=colour, lw=1.8)
        axes.text(1.012, tau[-1], f"B = {size}", va="center", color=colour)
    axes.set(xlim=(0, 1), ylim=(0, 16.5), xlabel=r"acceptance rate $\alpha$ of every slot", ylabel=r"$\tau$")
    axes.set_yticks([1, 4, 8, 12, 16])
    axes.grid(color="#e3e7ee", lw=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def divergences() -> Figure:
    """What a drafter too small for the target's distribution settles on, by divergence."""
    tokens = np.arange(40)

    def bell(mean: float, width: float) -> np.ndarray:
        weights = np.exp(-0.5 * ((tokens - mean) / width) ** 2) + 1e-9
        return weights / weights.sum()

    p = 0.62 * bell(11, 2.6) + 0.38 * bell(28, 2.2)
    kinds: list[tuple[str, Callable[[np.ndarray], float]]] = [
        (r"forward KL$(p\,\|\,q)$", lambda q: float((p * np.log(p / q)).sum())),
        (r"reverse KL$(q\,\|\,p)$", lambda q: float((q * np.log(q / p)).sum())),
        ("total variation", lambda q: float(1 - np.minimum(p, q).sum())),
    ]
    figure = Figure((8.6, 2.2), layout="constrained")
    for place, (name, divergence) in enumerate(kinds):
        family = [bell(m, w) for m in np.linspace(5, 34, 117) for w in np.linspace(1.5, 14, 101)]
        q = min(family, key=divergence)
        axes = figure.add_subplot(1, 3, place + 1)
        axes.bar(tokens, p, 0.9, color=CONTEXT, edgecolor=EDGE[CONTEXT], linewidth=0.5, label="target $p$")
        axes.plot(tokens, q, color="#c0392b", lw=1.8, label="drafter $q$")
        axes.set_title(name, size=9)
        axes.text(
            0.98,
            0.93,
            rf"$\sum\min(p,q)$ = {np.minimum(p, q).sum():.2f}",
            transform=axes.transAxes,
            ha="right",
            va="top",
            size=7.5,
        )
        axes.set(xticks=[], yticks=[], ylim=(0, max(p.max(), q.max()) * 1.28), xlabel="tokens")
        axes.spines[["top", "right", "left"]].set_visible(False)
        if place == 0:
            axes.legend(frameon=False, loc="upper left", fontsize=7.5)
    return figure


def decode_free(length: int = 26, slots: int = 4, seed: int = 3) -> Figure:
    """The chain of anchors in a given text."""
    right = np.random.default_rng(seed).random((length, slots)) < 0.68
    n = [min(int(np.cumprod(row).sum()), length - 1 - t) for t, row in enumerate(right)]
    chain = [0]
    while chain[-1] + n[chain[-1]] + 1 < length - 1:
        chain.append(chain[-1] + n[chain[-1]] + 1)
    figure, axes = canvas(8.6, 1.95, length + 3.2, 6.3)
    y = 2.6
    for t in range(length):
        visited = t in chain
        style = {"linewidth": 1.3} if visited else {"edgecolor": "#c9cfd8"}
        box(axes, (t + 2.9, y), 0.86, 1.05, OWN if visited else CONTEXT, rounding=0.1, **style)
        axes.text(
            t + 3.33,
            y + 0.5,
            str(n[t]),
            ha="center",
            va="center_baseline",
            weight="bold" if visited else "normal",
            color=INK if visited else "#7b8594",
        )
    for a, b in pairwise(chain):
        arrow(
            axes,
            (a + 3.4, y + 1.15),
            (b + 3.27, y + 1.15),
            connectionstyle=f"arc3,rad=-{0.75 if b - a == 1 else 0.5}",
            color=EDGE[OWN],
            mutation_scale=8,
        )
    axes.text(0.1, y + 0.5, "accepted\nlength $n_t$", va="center", linespacing=1.3)
    axes.text(3.4, 5.6, r"the next anchor is $t + n_t + 1$", va="center", color=EDGE[OWN])
    walked = f"walk: drafts at the {len(chain)} visited anchors, one after the other"
    everywhere = f"everywhere: drafts at all {length} positions at once, then follows the chain"
    legend(axes, 2.9, 1.35, [(walked, OWN)])
    legend(axes, 2.9, 0.5, [(everywhere, CONTEXT)])
    return figure


FIGURES = {
    function.__name__: function
    for function in (overview, speculative_decoding, streams, replay, acceptance_length, divergences, decode_free)
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", default=list(FIGURES), help=f"of {', '.join(FIGURES)}; default all")
    parser.add_argument("--format", default="svg", help="svg, pdf or png")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    options = parser.parse_args()
    mpl.rcParams.update(
        {
            "font.size": 8,
            "svg.hashsalt": "draftopd",
            "text.color": INK,
            "axes.edgecolor": INK,
            "axes.labelcolor": INK,
            "xtick.color": INK,
            "ytick.color": INK,
            "pdf.fonttype": 42,
        }
    )
    for name in options.names:
        metadata = {"Date": None} if options.format == "svg" else None
        figure = FIGURES[name]()
        figure.savefig(options.out / f"{name}.{options.format}", metadata=metadata, dpi=160, facecolor="white")


if __name__ == "__main__":
    main()
