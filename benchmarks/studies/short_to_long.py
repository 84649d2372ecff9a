"""A drafter trained on the beginnings of texts and tested on whole ones: tau by position, and what raises it.

    python -m benchmarks.studies.short_to_long
    python -m benchmarks.studies.short_to_long --only-draw   # figure and table from the results kept

SFT makes a drafter from scratch that has seen only the first ``--short`` tokens of each response. Four ways on are
compared with equally many steps: scaled rotary positions (without training), continued SFT on whole texts, and
decode-free Draft-OPD on beginnings or on whole texts. The bundled drafter, which was made in the same way on whole
texts, shows how much could be gained. All are tested on whole texts. Runs that have ended are not run again. Results go
to benchmarks/results/short_to_long.json, the figure to docs/figures/short_to_long.svg.
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

from matplotlib.figure import Figure

from benchmarks.common import RESULTS, keep, read
from benchmarks.studies.runs import bare, interval, markdown, percent, plain, save, side_by_side, study_parser, train
from benchmarks.studies.seeds import gain, tau
from draftopd.cli.runs import find
from draftopd.evaluation.plots import COLOURS

KEPT = RESULTS / "short_to_long.json"

#: Linear scaling of the short drafter's positions, which brings those of whole texts into the range that it has seen.
SCALES = (2, 4)
#: By drafter: its name. The key is the directory of its runs.
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
#: Tokens per bin of the figure, and the least number of blocks that a bin is drawn for.
WIDTH, MIN_BLOCKS = 16, 100


def main() -> None:
    options = parse()
    if not options.only_draw:
        write(run(options), options)
    draw(read(KEPT))


def parse() -> argparse.Namespace:
    parser = study_parser(__doc__, "runs/short_to_long")
    parser.add_argument("--short", type=int, default=48, help="tokens of each response that the first drafter sees")
    parser.add_argument("--epochs", type=int, default=5, help="of 32 optimizer steps, after SFT")
    return parser.parse_args()


def run(options: argparse.Namespace) -> dict[str, list[Path]]:
    """Train and test, and return the directories of each drafter's runs."""
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
    """A copy of a drafter that divides its positions by ``factor``."""
    shutil.copytree(drafter, to, dirs_exist_ok=True)
    config = json.loads((to / "config.json").read_text())
    config["rope_scaling"] = {"rope_type": "linear", "factor": float(factor)}
    (to / "config.json").write_text(json.dumps(config, indent=2))
    return to


def write(places: Mapping[str, Sequence[Path]], options: argparse.Namespace) -> None:
    """Keep tau within and beyond the positions trained on, and by bin."""
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
            if sum(len(blocks) for blocks in own[0].values()) >= MIN_BLOCKS
        ]
        rows.append(row)
    keep(KEPT, options, {"rows": rows})


def between(tested: Mapping[str, Sequence[int]], span: range) -> dict[str, list[int]]:
    """For each prompt, the sizes of the blocks whose anchor has one of these positions in the response."""
    return {
        prompt: [size for size, first in zip(blocks, accumulate(blocks, initial=0), strict=False) if first in span]
        for prompt, blocks in tested.items()
    }


def draw(content: dict[str, Any]) -> None:
    """Draw tau along the text, and print the table."""
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
    bare([panel])
    figure.legend(loc="outside right upper", frameon=False, fontsize=8)
    save(figure, "short_to_long")
    rows = [
        [
            NAMES[row["arm"]], str(row["seeds"]), *(plain(row[part]) for part in ("within", "beyond", "all")),
            percent(row["beyond_over_short"]) if row["arm"] != "short" else "",
        ]
        for row in content["rows"]
    ]  # fmt: skip
    markdown("drafter|seeds:|tau within:|beyond:|all:|beyond, over SFT on beginnings:", rows)


if __name__ == "__main__":
    main()
