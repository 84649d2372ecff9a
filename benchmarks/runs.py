"""Training runs as processes of their own, what their logs say, and where figures go."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from typing import TypeVar

import matplotlib
from hydra import compose, initialize_config_dir
from matplotlib.figure import Figure
from omegaconf import OmegaConf
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from draftopd.cli.runs import settings

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
_COMPOSING = Lock()
Job = TypeVar("Job")
Result = TypeVar("Result")


def train(overrides: Iterable[str], directory: Path, threads: int | None = 1) -> Path:
    """``train.py`` into a directory, which is returned; a run that has ended there already is left as it is.

    Raises:
        SystemExit: with the end of what it printed, if it fails; or if the directory holds a run of other settings,
            which it would go on from.
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
    config.logger = None
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
    """Do jobs that wait for processes of their own, so many at once."""
    with ThreadPoolExecutor(parallel) as pool:
        return list(pool.map(work, jobs))


def scalars(directory: Path, name: str) -> list[tuple[int, float]]:
    """Step and value of a curve of a run's log; of a step that was done again, the later value."""
    events = EventAccumulator(str(directory / "tensorboard"))
    events.Reload()
    return list({event.step: event.value for event in events.Scalars(name)}.items())


def interval(found: Sequence[float]) -> list[float]:
    """A figure and its interval, as results keep them."""
    return [round(value, 5) for value in found]


def save(figure: Figure, name: str) -> None:
    """Keep a figure for the documentation; the same data give the same file."""
    with matplotlib.rc_context({"svg.hashsalt": "draftopd"}):
        figure.savefig(ROOT / "docs" / "figures" / f"{name}.svg", metadata={"Date": None})
