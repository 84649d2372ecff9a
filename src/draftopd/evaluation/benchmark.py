"""Held-out prompts to evaluate on, with the answers where they are known."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from draftopd.bundled.problems import Split, problems, read_answer
from draftopd.data.prompts import Messages, read_jsonl
from draftopd.errors import PromptError


@dataclass(frozen=True)
class Example:
    """One conversation: ``messages`` come before the target's first answer, ``follow_ups`` are the user's later turns.

    ``answer`` is the correct number if the benchmark knows it.
    """

    id: str
    messages: Messages
    answer: int | None = None
    follow_ups: tuple[str, ...] = ()

    def solved(self, response: str) -> bool | None:
        """Whether the response ends in the correct answer; None if the answer is not known."""
        return None if self.answer is None else read_answer(response) == self.answer


class Benchmark(Protocol):
    """A named list of examples."""

    name: str

    def examples(self, limit: int | None = None) -> list[Example]:
        """The first ``limit`` examples; None: the benchmark's default number."""


class ReasoningBenchmark:
    """Held-out problems of the bundled corpus: no training problem has the same steps and numbers.

    Raises:
        PromptError: if ``count`` is less than 1.
    """

    name = "reasoning"

    def __init__(self, split: Split = "test", count: int = 128) -> None:
        if count < 1:
            raise PromptError(f"benchmark.reasoning.count must be 1 or more, found {count}.")
        self.split: Split = split
        self.count = count

    def examples(self, limit: int | None = None) -> list[Example]:
        count = self.count if limit is None else min(limit, self.count)
        return [
            Example(f"{self.split}-{index}", [{"role": "user", "content": p.question}], p.value)
            for index, p in enumerate(problems(self.split, count))
        ]


class JsonlBenchmark:
    """Prompts of a JSON-lines file, read as by ``data=jsonl``.

    Raises:
        PromptError: if the file cannot be read or holds no prompt.
    """

    def __init__(self, path: str, field: str = "prompt", name: str | None = None) -> None:
        self.path, self.field = Path(path), field
        self.name = name or self.path.stem

    def examples(self, limit: int | None = None) -> list[Example]:
        rows = read_jsonl(self.path, self.field, limit, group="benchmark")
        if not rows:
            raise PromptError(f"{self.path} holds no prompts: give at least one.")
        return [Example(f"{self.name}-{index}", messages) for index, messages in enumerate(rows)]
