"""The results of training runs as a tidy table: one row per run, one column per variable."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from omegaconf import OmegaConf

from draftopd.cli.keys import walk
from draftopd.cli.report import FORMAT, TESTED_FORMAT
from draftopd.errors import FileError
from draftopd.io.files import read_json

#: Settings that depend on a run's directory only.
_NOT_COMPARED = ("logger", "name", "trajectories.store", "rollout.trajectories.", "callbacks.best.dirpath")


class Run(NamedTuple):
    """A run that has ended.

    ``config``: by dotted key; ``report``: the content of ``report.json``; ``tested``: by prompt, the emitted tokens of
    each block, empty where nothing was tested.
    """

    directory: Path
    config: dict[str, Any]
    report: dict[str, Any]
    tested: dict[str, list[int]]


def find(roots: Iterable[Path]) -> list[Run]:
    """The runs that ended under these directories, each once, by path.

    Raises:
        FileError: if there is none, or a report is damaged or of another version.
    """
    roots = [root.resolve() for root in roots]
    found = sorted({path.parent for root in roots for path in root.rglob("report.json")})
    runs = [_read(directory) for directory in found if (directory / "config.yaml").exists()]
    if not runs:
        where = ", ".join(map(str, roots))
        raise FileError(f"No training run has ended under {where}: give the directory of a sweep, as runs/ablation.")
    return runs


def rows(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """One row per run: the settings that differ between the runs, then the results.

    ``gflop`` columns are empty where nothing was counted, ``test_tau`` where nothing was tested.
    """
    keys = [key for run in runs for key in _compared(run.config)]
    differing = [key for key in dict.fromkeys(keys) if len({str(run.config.get(key)) for run in runs}) > 1]
    common = Path(os.path.commonpath([run.directory.parent for run in runs]))
    table = []
    for run in runs:
        report = run.report
        row = {"run": str(run.directory.relative_to(common))} | {key: run.config.get(key) for key in differing}
        row |= {name: report[name] for name in ("steps", "tokens", "tau_before", "tau_after", "test_tau")}
        row |= {"test_tokens": sum(map(sum, run.tested.values())), "test_blocks": sum(map(len, run.tested.values()))}
        row |= {f"gflop_{part}": round(spent / 1e9, 1) for part, spent in report["flops"].items()}
        row["seconds"] = round(report["total_seconds"], 1)
        table.append(row)
    return table


def settings(config: Any) -> dict[str, Any]:
    """The settings of a configuration by dotted key, without those that depend on the run's directory only."""
    return _compared(_flat(OmegaConf.to_container(config, resolve=True)))


def write_csv(table: Sequence[dict[str, Any]], file: TextIO) -> None:
    """Write the rows with all their columns; a missing value is empty."""
    columns = list(dict.fromkeys(key for row in table for key in row))
    writer = csv.DictWriter(file, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(table)


def _read(directory: Path) -> Run:
    config = OmegaConf.to_container(OmegaConf.load(directory / "config.yaml"))
    tested = directory / "test.json"
    emitted = read_json(tested, TESTED_FORMAT)["emitted"] if tested.exists() else {}
    return Run(directory, _flat(config), read_json(directory / "report.json", FORMAT), emitted)


def _compared(config: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if not key.startswith(_NOT_COMPARED)}


def _flat(config: Any) -> dict[str, Any]:
    return {key: value for key, value in walk(config) if not isinstance(value, dict)}
