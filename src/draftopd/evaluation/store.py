"""Results on disk, example by example, so that an interrupted evaluation goes on where it was."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from draftopd.draft_text import DraftedBlock
from draftopd.errors import ConfigError
from draftopd.evaluation.lossless import Mismatch
from draftopd.evaluation.results import PromptResult
from draftopd.evaluation.runner import ExampleResults
from draftopd.files import replaced
from draftopd.json_text import read_json, shown


class ResultStore:
    """``examples.jsonl`` in a run's directory: one line an example, written when it is done.

    Args:
        directory: the run's.
        identity: all that the figures depend on; another run's examples are not taken for this one's.

    Raises:
        ConfigError: if the directory holds another evaluation's examples, or what cannot be read.
    """

    def __init__(self, directory: Path, identity: dict[str, Any]) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.path = directory / "examples.jsonl"
        self._identity = json.loads(json.dumps(identity, default=str))
        self.done: dict[tuple[str, str], ExampleResults] = {}
        marker = directory / "examples.json"
        if self.path.exists() and marker.exists():
            if self._marked(marker) != self._identity:
                raise ConfigError(
                    f"{directory} holds an evaluation of other drafters, benchmarks or settings: use another "
                    "hydra.run.dir, or the same command to go on with it."
                )
            self._read()
        else:
            with replaced(marker) as partial:
                partial.write_text(json.dumps(self._identity, indent=2) + "\n", encoding="utf-8")

    def add(self, benchmark: str, example: str, results: ExampleResults) -> None:
        """Keep one example's figures."""
        self.done[benchmark, example] = results
        row = {
            "benchmark": benchmark,
            "example": example,
            "results": {name: [asdict(turn) for turn in turns] for name, turns in results.items()},
        }
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(finite(row), ensure_ascii=False) + "\n")

    def of(self, benchmark: str) -> list[ExampleResults]:
        """A benchmark's examples in the order they were done."""
        return [results for (name, _), results in self.done.items() if name == benchmark]

    def _marked(self, marker: Path) -> Any:
        try:
            return read_json(marker.read_bytes())
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"{marker} cannot be read ({error}): use another hydra.run.dir, or delete it and {self.path.name}."
            ) from error

    def _read(self) -> None:
        kept: list[str] = []
        # Bytes, and not splitlines: the last letter may be cut in two, and a text may hold other separators.
        for line in self.path.read_bytes().split(b"\n"):
            try:
                row = read_json(line)
            except ValueError:
                break  # the end, or cut off while it was written: decoded again
            try:
                results = {name: [_turn(turn) for turn in turns] for name, turns in row["results"].items()}
                self.done[row["benchmark"], row["example"]] = results
            except (KeyError, TypeError, AttributeError) as error:
                raise ConfigError(
                    f"{self.path}, line {len(kept) + 1} holds no example's figures ({shown(str(error))}): delete the "
                    "file, and the same command decodes again."
                ) from error
            kept.append(line.decode())
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
