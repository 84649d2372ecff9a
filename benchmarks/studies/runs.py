"""What the studies share: options, training runs in processes of their own, their logs, and figures."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from typing import TypeVar

import matplotlib
from hydra import compose, initialize_config_dir
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from omegaconf import OmegaConf
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from benchmarks import common
from benchmarks.common import ROOT
from draftopd.cli.runs import settings

_COMPOSING = Lock()
Job = TypeVar("Job")
Result = TypeVar("Result")


def study_parser(description: str | None, runs: str, seeds: Sequence[int] = (0, 1, 2)) -> argparse.ArgumentParser:
    """A parser with the studies' options.

    Args:
        runs: default of ``--runs``.
        seeds: default of ``--seeds``; without any the study has one fixed seed, and no such option.
    """
    made = common.parser(description)
    if seeds:
        made.add_argument("--seeds", type=int, nargs="+", default=list(seeds), help="one run per seed and setting")
    made.add_argument("--runs", type=Path, default=Path(runs), help=f"default: {runs}")
    made.add_argument("--parallel", type=int, default=os.cpu_count(), help="runs at once, of one thread each")
    made.add_argument("--only-draw", action="store_true", help="figure and table from the results kept")
    return made


def train(overrides: Iterable[str], directory: Path, threads: int | None = 1) -> Path:
    """Run ``train.py`` into a directory, which is returned; a run that has ended there is left as it is.

    Raises:
        SystemExit: with the end of its messages, if it fails; or if the directory holds a run of other settings, which
            would be continued.
    """
    overrides = [*overrides, "trainer.enable_progress_bar=false"]
    _same_settings(overrides, directory)
    command = [sys.executable, str(ROOT / "train.py"), *overrides]
    done = subprocess.run(
        [*command, f"hydra.run.dir='{directory.resolve()}'"], cwd=ROOT, capture_output=True, text=True, check=False,
        env=os.environ | {"OMP_NUM_THREADS": str(threads)},
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    print(f"{directory}: {' '.join(overrides)}", flush=True)
    return directory


def _same_settings(overrides: list[str], directory: Path) -> None:
    there = directory / "config.yaml"
    if not there.exists():
        return
    with _COMPOSING, initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        config = compose("train", [o for o in overrides if not o.startswith("hydra.")])
    # These know the run's directory.
    config.logger = config.callbacks.best.dirpath = None
    if "store" in config.trajectories:
        config.trajectories.store = None
    wanted, found = settings(config), settings(OmegaConf.load(there))
    other = sorted(key for key in wanted | found if wanted.get(key) != found.get(key))
    if other:
        raise SystemExit(
            f"{directory} holds a run with another {', '.join(other[:3])}: choose another directory (--runs DIR), or "
            "delete this one."
        )


def side_by_side(work: Callable[[Job], Result], jobs: Iterable[Job], parallel: int) -> list[Result]:
    """Do jobs that wait for processes of their own, ``parallel`` at a time."""
    with ThreadPoolExecutor(parallel) as pool:
        return list(pool.map(work, jobs))


def scalars(directory: Path, name: str) -> list[tuple[int, float]]:
    """Step and value of a curve in a run's log; a step that was done again has the later value."""
    events = EventAccumulator(str(directory / "tensorboard"))
    events.Reload()
    return list({event.step: event.value for event in events.Scalars(name)}.items())


def interval(found: Sequence[float]) -> list[float]:
    """A value and its interval, rounded as the results keep them."""
    return [round(value, 5) for value in found]


def plain(found: Sequence[float]) -> str:
    """A kept value with its interval."""
    return "{:.3f} [{:.3f}, {:.3f}]".format(*found)


def percent(found: Sequence[float] | None) -> str:
    """A kept gain with its interval; empty without one."""
    return "{:+.1%} [{:+.1%}, {:+.1%}]".format(*found) if found else ""


def by_seed(taus: Mapping[str, float]) -> str:
    """One tau per seed."""
    return ", ".join(f"{value:.3f}" for value in taus.values())


def markdown(headings: str, rows: Iterable[Sequence[str]]) -> None:
    """Print a table in Markdown.

    Args:
        headings: separated by ``|``; a column whose heading ends with ``:`` has its cells to the right.
    """
    names = headings.split("|")
    print(f"| {' | '.join(name.rstrip(':') for name in names)} |")
    print(f"|{'|'.join('---:' if name.endswith(':') else '---' for name in names)}|")
    for row in rows:
        print(f"| {' | '.join(row)} |")


def bare(panels: Iterable[Axes]) -> None:
    """Take the upper and right edges off."""
    for panel in panels:
        panel.spines[["top", "right"]].set_visible(False)


def save(figure: Figure, name: str) -> None:
    """Write a figure into the documentation; the same data give the same file."""
    with matplotlib.rc_context({"svg.hashsalt": "draftopd"}):
        figure.savefig(ROOT / "docs" / "figures" / f"{name}.svg", metadata={"Date": None})
