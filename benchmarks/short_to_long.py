"""Trained on the beginnings of texts, tested on whole ones: tau by place in the text, and what mends it.

    python benchmarks/short_to_long.py
    python benchmarks/short_to_long.py --only-draw  # figure and table from the results kept

SFT makes a drafter from scratch that has seen no more than the first ``--short`` tokens of any response. From there:
rotary positions scaled (the weights as they are), continued SFT on whole texts, and decode-free Draft-OPD on
beginnings or on whole texts, as many steps each. The bundled drafter, made the same way on whole texts, is what is
missed. All are tested on whole texts. Runs that have ended are not run again. Results go to
benchmarks/results/short_to_long.json, the figure to docs/figures/short_to_long.svg.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from machine import keep
from matplotlib.figure import Figure
from runs import RESULTS, interval, save, side_by_side, train

from draftopd.cli.runs import find
from draftopd.evaluation.plots import COLOURS
from draftopd.evaluation.seeds import gain, tau

KEPT = RESULTS / "short_to_long.json"

#: Linear scaling of the short drafter's positions: those of whole texts fall among the ones it has seen.
SCALES = (2, 4)
#: Every drafter: where its runs are kept, and what it is called.
NAMES = {
    "whole": "SFT on whole texts",
    "short": "SFT on beginnings",
    **{f"scaled_{scale}": f"the same, positions divided by {scale}" for scale in SCALES},
    "sft": "then SFT on whole texts",
    "opd_short": "then Draft-OPD on beginnings",
    "opd_whole": "then Draft-OPD on whole texts",
}
#: Experiment and overrides of those that are trained from the short drafter.
TRAINED = {
    "sft": ["experiment=plateau/sft"],
    "opd_short": ["experiment=plateau/decode_free", "rollout.max_new_tokens={short}"],
    "opd_whole": ["experiment=plateau/decode_free"],
}
#: Tokens a bin of the figure; of fewer blocks none is drawn.
WIDTH, LEAST = 16, 100


def main() -> None:
    options = parse()
    if not options.only_draw:
        write(run(options), options)
    draw(json.loads(KEPT.read_text()))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", type=int, default=48, help="tokens of a response")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=5, help="of 32 optimizer steps, after SFT")
    parser.add_argument("--runs", type=Path, default=Path("runs/short_to_long"))
    parser.add_argument("--parallel", type=int, default=os.cpu_count(), help="runs at once, of one thread each")
    parser.add_argument("--only-draw", action="store_true")
    return parser.parse_args()


def run(options: argparse.Namespace) -> dict[str, list[Path]]:
    """Train and test; the directories of each drafter's runs."""
    root = options.runs.resolve()
    sft = ["experiment=bundled_drafter", f"rollout.max_new_tokens={options.short}"]
    made = train(sft, root / "from_scratch", threads=os.cpu_count()) / "drafter"
    drafters = {"whole": "bundled:tiny_dflash", "short": made}
    drafters |= {f"scaled_{scale}": scaled(made, root / f"drafter_scaled_{scale}", scale) for scale in SCALES}
    jobs = {
        name: [(["experiment=plateau/sft", "trainer.max_epochs=0", f"drafter.checkpoint={drafter}"], root / name)]
        for name, drafter in drafters.items()
    }
    common = [f"trainer.max_epochs={options.epochs}", "module.count_flops=false", f"drafter.checkpoint={made}"]
    for name, overrides in TRAINED.items():
        given = [o.format(short=options.short) for o in overrides] + common
        jobs[name] = [([*given, f"seed={seed}"], root / name / str(seed)) for seed in options.seeds]
    side_by_side(lambda job: train(*job), [job for same in jobs.values() for job in same], options.parallel)
    return {name: [directory for _, directory in same] for name, same in jobs.items()}


def scaled(drafter: Path, to: Path, factor: int) -> Path:
    """A copy of a drafter whose positions count ``1 / factor``."""
    shutil.copytree(drafter, to, dirs_exist_ok=True)
    config = json.loads((to / "config.json").read_text())
    config["rope_scaling"] = {"rope_type": "linear", "factor": float(factor)}
    (to / "config.json").write_text(json.dumps(config, indent=2))
    return to


def write(places: Mapping[str, Sequence[Path]], options: argparse.Namespace) -> None:
    """Keep tau within and beyond what was trained on, and by bin."""
    tested = {name: [find([place])[0].tested for place in of_arm] for name, of_arm in places.items()}
    longest = max(sum(blocks) for run in tested["whole"] for blocks in run.values())
    rows: list[dict[str, Any]] = []
    for name, runs in tested.items():
        parts = {"within": range(options.short), "beyond": range(options.short, longest), "all": range(longest)}
        row: dict[str, Any] = {"arm": name, "seeds": len(runs)}
        for part, span in parts.items():
            own = [between(run, span) for run in runs]
            row[part] = interval(tau(own))
            row[f"{part}_over_short"] = interval(gain(own, [between(run, span) for run in tested["short"]]))
        bins = {b: [between(run, range(b, b + WIDTH)) for run in runs] for b in range(0, longest, WIDTH)}
        row["bins"] = [
            (begin, *interval(tau(own)))
            for begin, own in bins.items()
            if sum(len(blocks) for blocks in own[0].values()) >= LEAST
        ]
        rows.append(row)
    keep(argparse.Namespace(**vars(options), results=KEPT), {"rows": rows})


def between(tested: Mapping[str, Sequence[int]], span: range) -> dict[str, list[int]]:
    """Of every prompt the blocks whose anchor has one of these places in the response."""
    return {
        prompt: [size for size, first in zip(blocks, accumulate(blocks, initial=0), strict=False) if first in span]
        for prompt, blocks in tested.items()
    }


def draw(content: dict[str, Any]) -> None:
    """tau along the text; and the table."""
    figure = Figure(figsize=(7.6, 3.4), layout="constrained")
    panel = figure.subplots()
    for number, row in enumerate(content["rows"]):
        begins, values, low, high = zip(*row["bins"], strict=True)
        middles = [begin + WIDTH / 2 for begin in begins]
        colour = ("black", *COLOURS)[number]
        panel.plot(middles, values, marker="o", markersize=3, color=colour, label=NAMES[row["arm"]])
        panel.fill_between(middles, low, high, color=colour, alpha=0.1, linewidth=0)
    panel.axvline(content["arguments"]["short"], color="#888888", linewidth=0.8, linestyle=":")
    panel.set(xlabel=f"token of the response (bins of {WIDTH})", ylabel="tau, test, 95 % interval")
    panel.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right upper", frameon=False, fontsize=8)
    save(figure, "short_to_long")
    print("| drafter | seeds | tau within | beyond | all | beyond, over SFT on beginnings |")
    print("|---|---:|---:|---:|---:|---:|")
    for row in content["rows"]:
        cells = ["{:.3f} [{:.3f}, {:.3f}]".format(*row[part]) for part in ("within", "beyond", "all")]
        over = "{:+.1%} [{:+.1%}, {:+.1%}]".format(*row["beyond_over_short"]) if row["arm"] != "short" else ""
        print(f"| {NAMES[row['arm']]} | {row['seeds']} | {' | '.join(cells)} | {over} |")


if __name__ == "__main__":
    main()
