"""Results on disk, example by example, so that an interrupted evaluation can be continued."""

from __future__ import annotations

import json
import logging
import math
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from draftopd.decoding.draft_text import DraftedBlock
from draftopd.errors import ConfigError, FileError
from draftopd.evaluation.lossless import Mismatch
from draftopd.evaluation.results import PromptResult
from draftopd.evaluation.runner import ExampleResults
from draftopd.io.files import read_json, replaced, seal, write_json, writing
from draftopd.io.json_text import parse_json

log = logging.getLogger(__name__)

#: Format version of ``examples.json`` and ``examples.jsonl``.
FORMAT = 1


class ResultStore:
    """``examples.jsonl`` in a run's directory: one line per example, written when the example is done.

    Each line has a checksum; a damaged line is left out, and its example decoded again.

    Args:
        directory: the run's.
        identity: everything that the figures depend on, by which another evaluation's examples are recognised.

    Raises:
        ConfigError: if the directory holds another evaluation's examples.
        FileError: if it cannot be written, or the identity stored there is damaged.
    """

    def __init__(self, directory: Path, identity: dict[str, Any]) -> None:
        with writing(directory):
            directory.mkdir(parents=True, exist_ok=True)
        self.path = directory / "examples.jsonl"
        self._identity = json.loads(json.dumps(identity, default=str))
        self.done: dict[tuple[str, str], ExampleResults] = {}
        marker = directory / "examples.json"
        if self.path.exists():
            try:
                found = read_json(marker, FORMAT)
            except FileError as error:
                raise FileError(f"{error} Delete {self.path} to start again, or use another hydra.run.dir.") from error
            if found != self._identity:
                raise ConfigError(
                    f"{directory} holds an evaluation of other drafters, benchmarks or settings: use another "
                    "hydra.run.dir, or repeat that evaluation's command to continue it."
                )
            self._read()
        else:
            write_json(marker, self._identity, FORMAT)

    def add(self, benchmark: str, example: str, results: ExampleResults) -> None:
        """Write one example's results.

        Raises:
            FileError: if they cannot be written; earlier examples are kept.
        """
        self.done[benchmark, example] = results
        row = {
            "benchmark": benchmark,
            "example": example,
            "results": {name: [asdict(turn) for turn in turns] for name, turns in results.items()},
        }
        row = json.loads(json.dumps(finite(row)))
        with writing(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row | {"checksum": seal(row)}, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def of(self, benchmark: str) -> list[ExampleResults]:
        """A benchmark's examples in the order in which they were decoded."""
        return [results for (name, _), results in self.done.items() if name == benchmark]

    def _read(self) -> None:
        kept, left_out = [], 0
        # Bytes and split, not splitlines: the last character may be cut off, and texts may hold other separators.
        for line in self.path.read_bytes().split(b"\n"):
            if not line:
                continue
            try:
                row = parse_json(line)
                if row.pop("checksum") != seal(row):
                    raise ValueError
                results = {name: [_turn(turn) for turn in turns] for name, turns in row["results"].items()}
                self.done[row["benchmark"], row["example"]] = results
            except (ValueError, KeyError, TypeError, AttributeError):
                left_out += 1
                continue
            kept.append(line.decode())
        if left_out:
            log.warning("%d lines of %s are damaged or cut off: their examples are decoded again.", left_out, self.path)
        with replaced(self.path) as partial:
            partial.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")


def _turn(raw: dict[str, Any]) -> PromptResult:
    mismatch = Mismatch(**raw["mismatch"]) if raw["mismatch"] else None
    return PromptResult(**raw | {"mismatch": mismatch, "drafts": [DraftedBlock(*block) for block in raw["drafts"]]})


def finite(value: Any) -> Any:
    """The same value with None for NaN and infinity, which JSON does not have."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
