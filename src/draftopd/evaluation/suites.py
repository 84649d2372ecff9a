"""Benchmarks that papers report: rows of a hub dataset, or of a local file in the same schema, as prompts."""

from __future__ import annotations

import random
import string
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from draftopd.data.prompts import read_rows
from draftopd.errors import PromptError
from draftopd.evaluation.benchmark import Example
from draftopd.io.datasets import load_dataset
from draftopd.io.json_text import is_text, listed

#: Seed of the choice if a suite has more rows than are decoded.
CHOICE = 42


class Suite:
    """A benchmark of rows with text fields.

    Args:
        name: of the results.
        dataset, subset, split: arguments of ``datasets.load_dataset``.
        template: the user's turn, with fields in braces.
        turns_field: names of the field that holds a list of user's turns (MT-Bench), instead of a template; the first
            one that a row has is read.
        renamed: names of a field in other editions of the suite, ``{name: other}``.
        id_field: field with the example's id; None numbers the examples.
        count: default number of examples; if there are more rows, always the same ones are chosen at random.
        path: a local JSON-lines file in the dataset's schema; None: from the hub.

    Raises:
        PromptError: if neither or both of template and turns_field are given, the count is below 1, or the template is
            invalid.
    """

    def __init__(
        self,
        name: str,
        dataset: str,
        subset: str | None = None,
        split: str = "test",
        template: str | None = None,
        turns_field: Sequence[str] = (),
        renamed: dict[str, str] | None = None,
        id_field: str | None = None,
        count: int = 128,
        path: str | None = None,
    ) -> None:
        if (template is None) == (not turns_field):
            raise PromptError(f"benchmark.{name} needs a template or a turns_field, and not both: leave one out.")
        if count < 1:
            raise PromptError(f"benchmark.{name}.count must be 1 or more, found {count}.")
        try:
            parts = [] if template is None else list(string.Formatter().parse(template))
        except ValueError as error:
            raise PromptError(
                f"benchmark.{name}.template is not valid ({error}): write fields in braces, and double other braces."
            ) from error
        self._names = [field for _, field, _, _ in parts if field]
        self.name, self.dataset, self.subset, self.split = name, dataset, subset, split
        self.template, self.turns_field, self.renamed = template, tuple(turns_field), renamed or {}
        self.id_field, self.count, self.path = id_field, count, path

    def examples(self, limit: int | None = None) -> list[Example]:
        """The suite's examples.

        Raises:
            PromptError: if the rows cannot be loaded, or have other fields.
        """
        if self.path is None:
            instead = f"Use benchmark.{self.name}.path=FILE for a local copy in its schema."
            rows = list(load_dataset(self.dataset, self.subset, self.split, instead=instead))
        else:
            rows = [row for _, row in read_rows(Path(self.path), f"benchmark.{self.name}")]
        if not rows:
            raise PromptError(f"The benchmark {self.name} holds no rows: give at least one.")
        wanted = min(self.count if limit is None else min(limit, self.count), len(rows))
        # Chosen for the default count, so that a smaller limit takes the first of the same examples.
        order = random.Random(CHOICE).sample(range(len(rows)), min(self.count, len(rows)))
        return [self._example(rows[index], index) for index in order[:wanted]]

    def _example(self, row: dict[str, Any], index: int) -> Example:
        where = f"{self.name}, row {index}"
        name = f"{self.name}-{index}" if self.id_field is None else self._text(row, self.id_field, where, int)
        if self.template is not None:
            text = self.template.format(**{field: self._text(row, field, where) for field in self._names})
            return Example(name, [{"role": "user", "content": text.strip()}])
        field = next((f for f in self.turns_field if f in row), None)
        turns = row[field] if field is not None else None
        if not (isinstance(turns, list) and turns and all(is_text(t) and t.strip() for t in turns)):
            raise PromptError(
                f"{where} has no list of turns under {' or '.join(self.turns_field)}: is it this suite's file?"
            )
        return Example(name, [{"role": "user", "content": turns[0]}], follow_ups=tuple(turns[1:]))

    def _text(self, row: dict[str, Any], name: str, where: str, *others: type) -> str:
        """A field's text, or value of ``others``."""
        found = next((n for n in (name, self.renamed.get(name)) if n in row), None)
        if found is None:
            raise PromptError(f"{where} has no field {name!r}, only {listed(row)}: is it this suite's file?")
        value = row[found]
        if not is_text(value) and type(value) not in others:
            kind = type(value).__name__
            raise PromptError(f"{where} has a {kind} under {name!r}, expected text: is it this suite's file?")
        return str(value)
