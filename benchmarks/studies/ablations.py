"""Run the sweeps of ``experiment=ablation/*`` side by side, and measure what each value is worth, with intervals.

    python -m benchmarks.studies.ablations                           # all sweeps: hours on two cores
    python -m benchmarks.studies.ablations --sweeps loss anchors --seeds 0
    python -m benchmarks.studies.ablations --only-draw               # figure and table from the results kept

The jobs are those of ``python train.py experiment=ablation/NAME``, with one directory per job. If several jobs have the
same configuration, only one of them is run. Jobs that have ended are not run again, so the same command continues a
study that was stopped. Results go to benchmarks/results/ablations.csv (one row per value and seed) and ablations.json
(one row per value, with 95 % intervals over prompts and seeds), the figure to docs/figures/ablations.svg.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import chain, groupby, product
from typing import Any, NamedTuple

from hydra import compose, initialize_config_dir
from matplotlib.figure import Figure
from omegaconf import OmegaConf

from benchmarks.common import RESULTS, ROOT, keep, machine, read
from benchmarks.studies.runs import (
    bare,
    by_seed,
    interval,
    markdown,
    percent,
    plain,
    save,
    side_by_side,
    study_parser,
    train,
)  # fmt: skip
from benchmarks.studies.seeds import gain, tau
from draftopd.cli.runs import Run, find
from draftopd.evaluation.plots import COLOURS

SWEEPS = sorted(p.stem for p in (ROOT / "configs" / "experiment" / "ablation").glob("*.yaml") if p.stem != "base")
TABLE, KEPT = RESULTS / "ablations.csv", RESULTS / "ablations.json"
#: Options that were measured and then removed, and what to call their values.
REMOVED = {"refresh.every_n_steps": "every {} steps"}
REPORTED = ("steps", "tokens", "tau_after", "test_tau")


class Job(NamedTuple):
    """One value of a sweep with one seed.

    ``configuration`` identifies its run, and ``reference`` the run of the sweep's default with this seed.
    """

    sweep: str
    key: str
    value: str
    seed: int
    configuration: str
    reference: str

    @property
    def overrides(self) -> list[str]:
        return [f"experiment=ablation/{self.sweep}", f"{self.key}={self.value}", f"seed={self.seed}"]


def main() -> None:
    options = parse()
    if not options.only_draw:
        jobs = [job for sweep in SWEEPS for job in jobs_of(sweep, options.seeds)]
        first = {job.configuration: job for job in jobs[::-1]}
        places = {c: options.runs / job.sweep / f"{job.key}={job.value},seed={job.seed}" for c, job in first.items()}
        # Seed by seed, so that a study that was stopped has some result for every value.
        wanted = [job.configuration for sweep in options.sweeps for job in jobs if job.sweep == sweep]
        queue = sorted((first[c] for c in dict.fromkeys(wanted)), key=lambda job: job.seed)
        side_by_side(
            lambda job: train([*job.overrides, "hydra.mode=RUN"], places[job.configuration]), queue, options.parallel
        )
        write(jobs, {c: find([place])[0] for c, place in places.items() if (place / "report.json").exists()}, options)
    draw(read(KEPT)["rows"])


def parse() -> argparse.Namespace:
    parser = study_parser(__doc__, "runs/ablation")
    parser.add_argument("--sweeps", nargs="+", default=SWEEPS, choices=SWEEPS, metavar="SWEEP", help=", ".join(SWEEPS))
    return parser.parse_args()


def jobs_of(sweep: str, seeds: Sequence[int]) -> list[Job]:
    """The jobs that a sweep's configuration lists, but with these seeds."""
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        experiment = f"experiment=ablation/{sweep}"
        params = compose("train", [experiment], return_hydra_config=True).hydra.sweeper.params
        (key,) = (key for key in params if key != "seed")
        return [
            Job(
                sweep, key, value, seed, configuration([experiment, f"{key}={value}", f"seed={seed}"]),
                configuration([experiment, f"seed={seed}"]),
            )
            for value, seed in product(str(params[key]).split(","), seeds)
        ]  # fmt: skip


def configuration(overrides: list[str]) -> str:
    """Everything that changes a run's result, so without its name, its logger and its callbacks."""
    config = compose("train", overrides)
    config.name = config.logger = config.callbacks = None
    return json.dumps(OmegaConf.to_container(config, resolve=True), sort_keys=True)


def write(jobs: Sequence[Job], runs: Mapping[str, Run], options: argparse.Namespace) -> None:
    """Keep one row per value and seed, and one row per value, in the order of the sweeps.

    Sweeps may be run on several machines. A value keeps its rows if its sweep was not asked for, if it has no run
    here, or if its rows hold more seeds than have a run here. ``ran`` says where and when each row was made.
    """
    order = {job[:3]: number for number, job in enumerate(jobs)}
    with TABLE.open(newline="", encoding="utf-8") as file:
        lines = [tuple(line) for line in csv.reader(file)][1:]
    rows = read(KEPT)["rows"]
    kept = {(row["sweep"], row["key"], row["value"]): len(row["tau_by_seed"]) for row in rows}
    ended = [job for job in jobs if job.sweep in options.sweeps and job.configuration in runs]
    seeds = Counter(job[:3] for job in ended)
    ended = [job for job in ended if seeds[job[:3]] >= kept.get(job[:3], 0)]
    renewed = {job[:3] for job in ended}
    lines = [line for line in lines if line[:3] in order.keys() - renewed]
    rows = [row for row in rows if (row["sweep"], row["key"], row["value"]) in order.keys() - renewed]
    for job in ended:
        run = runs[job.configuration]
        blocks = run.tested.values()
        lines.append((
            *job[:4], *(run.report[name] for name in REPORTED), sum(map(sum, blocks)), sum(map(len, blocks)),
            round(run.report["total_seconds"], 1),
        ))  # fmt: skip
    with TABLE.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("sweep", "key", "value", "seed", *REPORTED, "test_tokens", "test_blocks", "seconds"))
        writer.writerows(sorted(lines, key=lambda line: (order[line[:3]], int(line[3]))))
    here = machine()
    ran = {"date": datetime.date.today().isoformat(), "processor": here["processor"], "cores": here["cores"]}
    for (sweep, key, value), found in groupby(ended, key=lambda job: job[:3]):
        same = list(found)
        tested = {job.seed: runs[job.configuration].tested for job in same}
        references = {job.seed: runs[job.reference].tested for job in same if job.reference in runs}
        default = same[0].configuration == same[0].reference
        rows.append({
            "ran": ran, "sweep": sweep, "key": key, "value": value, "default": default,
            "tau_by_seed": {seed: tau([blocks]).value for seed, blocks in tested.items()},
            "tau": interval(tau(list(tested.values()))),
            "over_default": (
                interval(gain(list(tested.values()), list(references.values()))) if references and not default else None
            ),
        })  # fmt: skip
    rows.sort(key=lambda row: order[row["sweep"], row["key"], row["value"]])
    keep(KEPT, options, {"rows": rows})


def draw(kept: list[dict[str, Any]]) -> None:
    """Draw one panel per sweep and print the table, for sweeps of which more than one value was run."""
    sweeps = [list(rows) for _, rows in groupby(kept, key=lambda row: row["sweep"])]
    sweeps = [rows for rows in sweeps if len(rows) > 1]
    columns = 3
    figure = Figure(figsize=(3.4 * columns, 2.1 * -(-len(sweeps) // columns)), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.08)
    panels = list(figure.subplots(-(-len(sweeps) // columns), columns, squeeze=False).flat)
    for panel, rows in zip(panels, sweeps, strict=False):
        for y, row in enumerate(rows):
            value, low, high = row["tau"]
            colour = "black" if row["default"] else COLOURS[0]
            panel.errorbar(value, y, xerr=[[value - low], [high - value]], marker="o", capsize=2, color=colour)
            panel.plot(list(row["tau_by_seed"].values()), [y + 0.25] * len(row["tau_by_seed"]), "|", color=colour)
        panel.set_yticks(
            range(len(rows)), [REMOVED.get(row["key"], "{}").format(row["value"]) for row in rows], fontsize=8
        )
        panel.set(ylim=(len(rows) - 0.4, -0.6))
        panel.set_title(rows[0]["sweep"], fontsize=9)
        panel.tick_params(axis="x", labelsize=8)
    bare(panels)
    for panel in panels[len(sweeps) :]:
        panel.set_axis_off()
    figure.supxlabel("test tau, 95 % interval; one stroke per seed; black: the default", fontsize=9)
    save(figure, "ablations")
    table = [
        [
            row["sweep"], REMOVED.get(row["key"], f"`{row['key']}={{}}`").format(row["value"]),
            by_seed(row["tau_by_seed"]), plain(row["tau"]),
            "default" if row["default"] else percent(row["over_default"]),
        ]
        for row in chain.from_iterable(sweeps)
    ]  # fmt: skip
    markdown("sweep|value|tau by seed|tau [95 %]:|over the default:", table)


if __name__ == "__main__":
    main()
