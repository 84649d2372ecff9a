"""Does Draft-OPD lift a drafter off the plateau of SFT? The paper's first figure on a small scale, with controls.

    python -m benchmarks.studies.plateau                       # from the bundled drafter
    python -m benchmarks.studies.plateau --from-scratch        # from a drafter that SFT first trains to its plateau
    python -m benchmarks.studies.plateau --study recipe        # the best recipe found, and SFT in batches as small
    python -m benchmarks.studies.plateau --study recipe_long   # the same, twice as long
    python -m benchmarks.studies.plateau --target DIR          # another target, from scratch; DIR names the results
    python -m benchmarks.studies.plateau --seeds 0 --epochs 2  # a first look
    python -m benchmarks.studies.plateau --only-draw           # figure and table from the results kept

Every arm starts from the same SFT drafter and reads the same stream of new prompts (``configs/experiment/plateau``).
All arms first take equally many optimizer steps. Then SFT runs once more with as many operations, rollouts included, as
the most expensive of the other arms, rounded up to whole epochs. The recipe's study has equal operations only, because
its smaller batches make more steps of the same replays. Each run is tested once, at its end, on 500 held-out problems.

Operations are counted over the first epoch of each arm, because counting slows decoding down by about two fifths, and
all epochs take about equally many. A run that has ended is not run again, so the same command continues a study that
was stopped. Results go to benchmarks/results/STUDY.csv (one row per run) and STUDY.json (curves, intervals, machine),
the figure to docs/figures/STUDY.svg.
"""

from __future__ import annotations

import argparse
import os
import shutil
from collections.abc import Iterable
from itertools import product
from math import ceil
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.common import RESULTS, keep, read
from benchmarks.studies.runs import (
    bare,
    by_seed,
    interval,
    markdown,
    percent,
    plain,
    save,
    scalars,
    side_by_side,
    study_parser,
    train,
)  # fmt: skip
from benchmarks.studies.seeds import gain, tau
from draftopd.cli.runs import Run, find, rows, write_csv
from draftopd.evaluation.plots import COLOURS

#: By arm: its name in a sentence, and under an axis.
ARMS = {
    "sft": ("continued SFT", "SFT"),
    "opd": ("Draft-OPD", "OPD"),
    "decode_free": ("Draft-OPD, decode-free", "decode-free"),
    "sft_small": ("continued SFT, small batches", "SFT, small"),
    "recipe": ("recipe", "recipe"),
}

#: By what is made equal: the number of epochs of each arm.
Plan = dict[str, dict[str, int]]


class Study(NamedTuple):
    """Arms to train for a number of epochs of 512 replays each.

    They are compared with ``control``, which gets as much of each of ``equal`` (``steps``, ``compute``) in a run of its
    own.
    """

    arms: tuple[str, ...]
    equal: tuple[str, ...]
    control: str
    epochs: int


STUDIES = {
    "plateau": Study(("sft", "opd", "decode_free"), ("steps", "compute"), "sft", 8),
    "recipe": Study(("sft_small", "recipe"), ("compute",), "sft_small", 32),
    "recipe_long": Study(("sft_small", "recipe"), ("compute",), "sft_small", 64),
}


def main() -> None:
    options = parse()
    if not options.only_draw:
        given = [f"target.path={options.target.resolve()}"] if options.target else []
        if options.from_scratch:
            given.append(f"drafter.checkpoint={sft(given, options)}")
        train(["experiment=plateau/opd", *given, "trainer.max_epochs=0", "validate_first=true"], options.runs / "start")
        spent = count(given, options)
        planned = plan(spent, options)
        run_all(planned, given, options)
        write(planned, spent, options)
    draw(read(RESULTS / f"{options.name}.json"), options)


def parse() -> argparse.Namespace:
    parser = study_parser(__doc__, "runs/plateau, and runs/plateau_NAME for another target")
    parser.add_argument("--study", choices=STUDIES, default="plateau")
    parser.add_argument("--epochs", type=int, help="of 512 replays; default: the study's")
    parser.add_argument("--target", type=Path, help="a directory in Hugging Face layout; default: the bundled target")
    parser.add_argument("--from-scratch", action="store_true", help="always on for another target")
    parser.set_defaults(runs=None)
    options = parser.parse_args()
    options.epochs = options.epochs or STUDIES[options.study].epochs
    of_target = f"_{options.target.name}" if options.target else ""
    options.name = options.study + of_target
    options.from_scratch |= bool(of_target)
    options.runs = options.runs or Path(f"runs/plateau{of_target}")
    return options


def sft(given: list[str], options: argparse.Namespace) -> Path:
    """The drafter that SFT has trained to its plateau."""
    directory = options.runs.resolve() / "from_scratch"
    return train(["experiment=bundled_drafter", *given], directory, threads=os.cpu_count()) / "drafter"


def count(given: list[str], options: argparse.Namespace) -> dict[str, float]:
    """Operations of each arm's first epoch, rollouts included."""
    places = {arm: options.runs / "counted" / arm for arm in STUDIES[options.study].arms}
    for directory in places.values():
        if not (directory / "report.json").exists():
            shutil.rmtree(directory, ignore_errors=True)  # a continued run does not count what it did before
    alone = ["trainer.max_epochs=1", "data.test_count=0"]
    side_by_side(
        lambda arm: train([f"experiment=plateau/{arm}", *alone, *given], places[arm]), list(places), options.parallel
    )
    return {arm: find([directory])[0].report["flops"]["total"] for arm, directory in places.items()}


def plan(spent: dict[str, float], options: argparse.Namespace) -> Plan:
    """Epochs of each arm: the control has as many steps, or at least as many operations, as any other arm."""
    study, found = STUDIES[options.study], {}
    for equal in study.equal:
        found[equal] = dict.fromkeys(study.arms, options.epochs)
        if equal == "compute":
            found[equal][study.control] = ceil(options.epochs * max(spent.values()) / spent[study.control])
    return found


def run_all(planned: Plan, given: list[str], options: argparse.Namespace) -> None:
    """Train all arms side by side with every seed."""

    def one(job: tuple[int, tuple[str, int]]) -> None:
        seed, (arm, epochs) = job
        # The target's texts are decoded once for all arms; a speculative rollout makes its own.
        shared = [] if arm == "opd" else [f"trajectories.store={options.runs.resolve() / 'texts'}"]
        overrides = [f"experiment=plateau/{arm}", f"seed={seed}", f"trainer.max_epochs={epochs}", *given]
        train([*overrides, "module.count_flops=false", *shared], place(options, arm, epochs, seed))

    side_by_side(one, list(product(options.seeds, each(planned))), options.parallel)


def each(planned: Plan) -> list[tuple[str, int]]:
    """Arms and their epochs, each once: all arms but the control use one run for equal steps and equal operations."""
    return sorted({pair for epochs in planned.values() for pair in epochs.items()})


def place(options: argparse.Namespace, arm: str, epochs: int, seed: int) -> Path:
    """The directory of a run."""
    return options.runs / f"{arm}-{epochs}" / str(seed)


def runs_of(options: argparse.Namespace, arm: str, epochs: int, seeds: Iterable[int]) -> dict[int, Run]:
    """An arm's runs by seed."""
    return {seed: find([place(options, arm, epochs, seed)])[0] for seed in seeds}


def write(planned: Plan, spent: dict[str, float], options: argparse.Namespace) -> None:
    """Keep the tidy table, curves and intervals; ``spent`` are operations per epoch."""
    kept = [place(options, arm, epochs, seed) for arm, epochs in each(planned) for seed in options.seeds]
    runs = find([options.runs / "start", *kept])
    with (RESULTS / f"{options.name}.csv").open("w", newline="", encoding="utf-8") as file:
        write_csv(rows(runs), file)
    (start,), control_arm = find([options.runs / "start"]), STUDIES[options.study].control
    content: dict[str, Any] = {"start": interval(tau([start.tested])), "rows": []}
    if options.from_scratch:
        (made,) = find([options.runs / "from_scratch"])
        content["sft"] = [(step + 1, value) for step, value in scalars(made.directory, "val/tau")]
    for kind, epochs in planned.items():
        control = [run.tested for run in runs_of(options, control_arm, epochs[control_arm], options.seeds).values()]
        for arm in epochs:
            of_arm = runs_of(options, arm, epochs[arm], options.seeds)
            steps, tflop = of_arm[options.seeds[0]].report["steps"], epochs[arm] * spent[arm] / 1e12
            tested = [run.tested for run in of_arm.values()]
            content["rows"].append({
                "equal": kind, "arm": arm, "steps": steps, "tflop": tflop,
                "tau_by_seed": {seed: tau([run.tested]).value for seed, run in of_arm.items()},
                "tau": interval(tau(tested)), "over_start": interval(gain(tested, [start.tested])),
                "over_control": None if arm == control_arm else interval(gain(tested, control)),
                "curves": [curve(run, start.report["tau_before"], tflop / steps) for run in of_arm.values()],
            })  # fmt: skip
    keep(RESULTS / f"{options.name}.json", options, content)


def curve(run: Run, began: float, tflop: float) -> list[tuple[int, float, float]]:
    """Step, operations in TFLOP and validation tau, before the first step and at each validation.

    Args:
        began: tau before the first step.
        tflop: operations per step.
    """
    found = ((step + 1, value) for step, value in scalars(run.directory, "val/tau"))
    return [(0, 0.0, began), *((step, step * tflop, value) for step, value in found)]


def draw(content: dict[str, Any], options: argparse.Namespace) -> None:
    """Draw validation tau by steps and by operations, and test tau with its intervals; print the table."""
    arms, equal = STUDIES[options.study][:2]
    x_of = {"steps": (0, "optimizer steps"), "compute": (1, "TFLOP, rollouts included")}
    first = ["sft"] if "sft" in content and "steps" in equal else []
    widths = [1.0] * (len(first) + len(equal)) + [0.3 * len(arms)]
    figure = Figure(figsize=(3 * sum(widths) + 0.4, 3.4), layout="constrained")
    panels = dict(zip([*first, *equal, "test"], figure.subplots(1, len(widths), width_ratios=widths), strict=True))
    next(iter(panels.values())).set_ylabel("tau, validation")
    for panel in (panels[name] for name in first):
        panel.plot(*zip(*content["sft"], strict=True), color="black", marker="o", markersize=3)
        panel.set(xlabel="optimizer steps", title="SFT to its plateau")
    for kind in equal:
        panels[kind].set(xlabel=x_of[kind][1], title=f"equal {kind}")
    test = panels["test"]
    for found in content["rows"]:
        number, kind = arms.index(found["arm"]), found["equal"]
        style = {"color": COLOURS[list(ARMS).index(found["arm"])], "label": ARMS[found["arm"]][0]}
        lines(panels[kind], found["curves"], x_of[kind][0], style)
        value, low, high = found["tau"]
        aside, marker = (-0.15, "o") if kind == "steps" else (0.15 * (len(equal) - 1), "s")
        test.errorbar(
            number + aside, value, [[value - low], [high - value]], color=style["color"], marker=marker, capsize=3
        )
    test.axhline(content["start"][0], color="black", linewidth=0.8, linestyle=":")
    bare(panels.values())
    title = "\u25cf steps   \u25a0 compute" if len(equal) > 1 else "test"
    test.set(ylabel="tau, test, 95 % interval", title=title, xlim=(-0.5, len(arms) - 0.5))
    names = [ARMS[arm][1].replace(" ", "\n").replace("-", "-\n") for arm in arms]
    test.set_xticks(range(len(arms)), names, fontsize=8)
    handles = panels[equal[0]].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=len(arms), frameon=False)
    save(figure, options.name)
    table(content)


def lines(panel: Axes, curves: list[list[list[float]]], x: int, style: dict[str, Any]) -> None:
    """Each seed's curve as a thin line, their mean as a thick one."""
    for points in curves:
        panel.plot([p[x] for p in points], [p[2] for p in points], color=style["color"], alpha=0.35, linewidth=0.8)
    means = [[fmean(values) for values in zip(*same, strict=True)] for same in zip(*curves, strict=True)]
    panel.plot([m[x] for m in means], [m[2] for m in means], marker="o", markersize=3, **style)


def table(content: dict[str, Any]) -> None:
    """Print the test taus."""
    rows = [["the SFT drafter", "", "0", "0", "", plain(content["start"]), "", ""]]
    rows += [
        [
            ARMS[found["arm"]][0], found["equal"], f"{found['steps']:.0f}", f"{found['tflop']:.1f}",
            by_seed(found["tau_by_seed"]), plain(found["tau"]), percent(found["over_start"]),
            percent(found["over_control"]),
        ]
        for found in content["rows"]
    ]  # fmt: skip
    markdown("arm|equal|steps:|TFLOP:|tau by seed|tau [95 %]:|over the start:|over continued SFT:", rows)


if __name__ == "__main__":
    main()
