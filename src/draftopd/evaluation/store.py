"""Results on disk, example by example, so that an interrupted evaluation goes on where it was."""

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

#: Of ``examples.json`` and ``examples.jsonl``.
FORMAT = 1


class ResultStore:
    """``examples.jsonl`` in a run's directory: one line an example, written when it is done.

    Args:
        directory: the run's.
        identity: all that the figures depend on; another run's examples are not taken for this one's.

    Each line carries its checksum; a damaged one is left out, and its example decoded again.

    Raises:
        ConfigError: if the directory holds another evaluation's examples.
        FileError: if it cannot be written, or what says whose examples it holds is damaged.
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
                raise FileError(f"{error} Delete {self.path} to begin anew, or use another hydra.run.dir.") from error
            if found != self._identity:
                raise ConfigError(
                    f"{directory} holds an evaluation of other drafters, benchmarks or settings: use another "
                    "hydra.run.dir, or the same command to go on with it."
                )
            self._read()
        else:
            write_json(marker, self._identity, FORMAT)

    def add(self, benchmark: str, example: str, results: ExampleResults) -> None:
        """Keep one example's figures.

        Raises:
            FileError: if they cannot be written; the examples before stay.
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
        """A benchmark's examples in the order they were done."""
        return [results for (name, _), results in self.done.items() if name == benchmark]

    def _read(self) -> None:
        kept, left_out = [], 0
        # Bytes, and not splitlines: the last letter may be cut in two, and a text may hold other separators.
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
            log.warning("%d lines of %s are damaged or cut off: decoded again.", left_out, self.path)
        with replaced(self.path) as partial:
            partial.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")


def _turn(raw: dict[str, Any]) -> PromptResult:
    mismatch = Mismatch(**raw["mismatch"]) if raw["mismatch"] else None
    return PromptResult(**raw | {"mismatch": mismatch, "drafts": [DraftedBlock(*block) for block in raw["drafts"]]})


def finite(value: Any) -> Any:
    """The same with None for NaN and infinity, which JSON does not know."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
