"""Trajectories from files and datasets of token ids."""

from __future__ import annotations

from abc import abstractmethod
from array import array
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from draftopd.data.order import RoundOrder
from draftopd.errors import PromptError
from draftopd.io.datasets import load_dataset
from draftopd.io.json_text import MAX_LINE, listed, parse_json, shown
from draftopd.rollout.request import Request, Trajectory
from draftopd.rollout.trajectories import ORIGIN_SAMPLE, Trajectories


class RecordedTrajectories(Trajectories):
    """Recorded texts, which have prompts of their own, in an order that is shuffled in every round.

    Texts whose prompt is longer than the request's limit are left out and counted. Responses are cut at their first
    stop token and at the response limit.

    Args:
        prompt_field, response_field: names of the fields with the token ids.
        seed: of the order.
    """

    def __init__(self, prompt_field: str, response_field: str, seed: int) -> None:
        super().__init__()
        self.prompt_field, self.response_field, self.seed = prompt_field, response_field, seed

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def read(self, index: int) -> tuple[Any, str]:
        """One row, and a description of where it was read."""

    def collect(self, request: Request) -> Iterator[list[Trajectory]]:
        """The request's texts.

        Raises:
            PromptError: if a row is not valid, or no text of the request can be used.
        """
        self.counts = Counter()
        order = RoundOrder(len(self), "recorded", self.seed)
        for begin in range(0, len(request.indices), ORIGIN_SAMPLE):
            indices = request.indices[begin : begin + ORIGIN_SAMPLE]
            batch = [t for t in (self._trajectory(order[index], request) for index in indices) if t is not None]
            self.check_origin(request, batch, last=begin + ORIGIN_SAMPLE >= len(request.indices))
            self.counts["read"] += len(batch)
            request.progress(len(indices), sum(len(t.response) for t in batch))
            yield batch
        if request.indices and not self.counts["read"]:
            raise PromptError(
                f"None of {len(request.indices)} recorded texts can be used: {self.counts['prompt too long']} prompts "
                f"are longer than data.max_prompt_tokens={request.max_prompt_tokens}."
            )

    def _trajectory(self, row: int, request: Request) -> Trajectory | None:
        values, where = self.read(row)
        if not isinstance(values, dict):
            raise PromptError(
                f"{where} holds a {type(values).__name__}, expected an object: write one object per line."
            )
        prompt, response = (
            self._ids(values, name, where, request.target.vocab_size)
            for name in (self.prompt_field, self.response_field)
        )
        if len(prompt) > request.max_prompt_tokens:
            self.counts["prompt too long"] += 1
            return None
        return Trajectory.ended(prompt, response, request)

    def _ids(self, values: dict[str, Any], name: str, where: str, vocabulary: int) -> list[int]:
        ids = values.get(name)
        if not isinstance(ids, list) or not ids or not all(type(i) is int for i in ids):
            found = f"found {listed(values)}" if name not in values else "it must be a list of numbers, not empty"
            raise PromptError(
                f"{where} has no token ids under {name!r} ({found}): set trajectories.prompt_field and "
                "trajectories.response_field."
            )
        if not 0 <= min(ids) <= max(ids) < vocabulary:
            raise PromptError(
                f"{where}: {name!r} holds ids from {min(ids)} to {max(ids)}, but the target's vocabulary has "
                f"{vocabulary}: the texts were recorded with another tokenizer, use this target's."
            )
        return ids


class JsonlTrajectories(RecordedTrajectories):
    """Texts of a UTF-8 JSON-lines file with one object per line; lines are read when they are needed.

    Args:
        path: the file.
        prompt_field, response_field, seed: see :class:`RecordedTrajectories`. The default names are those that vLLM
            and SGLang use.

    Raises:
        PromptError: if the file cannot be read or is empty.
    """

    def __init__(
        self, path: str, prompt_field: str = "prompt_token_ids", response_field: str = "token_ids", seed: int = 0
    ) -> None:
        super().__init__(prompt_field, response_field, seed)
        self.path = Path(path)
        self._starts, self._numbers = array("q"), array("q")
        offset = 0
        try:
            with self.path.open("rb") as file:
                for number, line in enumerate(iter(lambda: file.readline(MAX_LINE + 1), b""), start=1):
                    if len(line) > MAX_LINE:
                        raise PromptError(
                            f"{path}, line {number} is longer than {MAX_LINE} bytes: write one text per line."
                        )
                    if line.strip():
                        self._starts.append(offset)
                        self._numbers.append(number)
                    offset += len(line)
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise PromptError(
                f"The trajectories {shown(path)} cannot be read ({reason}): name a JSON-lines file."
            ) from error
        if not self._starts:
            raise PromptError(f"{path} holds no trajectories: give at least one.")

    def __len__(self) -> int:
        return len(self._starts)

    def read(self, index: int) -> tuple[Any, str]:
        where = f"{self.path}, line {self._numbers[index]}"
        try:
            with self.path.open("rb") as file:
                file.seek(self._starts[index])
                return parse_json(file.readline()), where
        except (OSError, ValueError) as error:
            raise PromptError(f"{where} is not JSON ({error}): write one object per line.") from error


class DatasetTrajectories(RecordedTrajectories):
    """Texts of a dataset on the hub or in local files; needs ``pip install datasets``.

    Args:
        path: the dataset's name, or a file type such as ``parquet`` with ``data_files``.
        name, split, data_files: see :func:`~draftopd.io.datasets.load_dataset`.
        prompt_field, response_field, seed: see :class:`RecordedTrajectories`.

    Raises:
        PromptError: if ``datasets`` is not installed, or the dataset cannot be loaded or is empty.
    """

    def __init__(
        self,
        path: str,
        name: str | None = None,
        split: str = "train",
        data_files: str | None = None,
        prompt_field: str = "prompt_token_ids",
        response_field: str = "token_ids",
        seed: int = 0,
    ) -> None:
        super().__init__(prompt_field, response_field, seed)
        instead = "Use trajectories=jsonl trajectories.path=FILE for a local copy."
        self.rows = load_dataset(path, name, split, data_files, instead=instead)
        self.path = path
        if not len(self.rows):
            raise PromptError(f"The dataset {path} holds no trajectories: give at least one.")

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, index: int) -> tuple[Any, str]:
        return self.rows[index], f"{self.path}, row {index}"
