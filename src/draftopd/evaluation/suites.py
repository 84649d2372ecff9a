"""The suites that papers report: rows of a hub dataset, or of a local file in the same schema, as prompts."""

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

#: Seed of the choice where a suite has more rows than are decoded.
CHOICE = 42


class Suite:
    """A benchmark of rows with text fields.

    Args:
        name: of the results.
        dataset, subset, split: what ``datasets.load_dataset`` is asked for.
        template: the user's turn, with fields in braces.
        turns_field: fields of which the first that a row has holds a list of user's turns (MT-Bench); then there is no
            template.
        renamed: other names that a field has in some editions of the suite, ``{name: other}``.
        id_field: names an example; None numbers them.
        count: examples usually decoded; of more rows these are chosen at random, always the same.
        path: a local JSON-lines file in the dataset's schema; None asks the hub.

    Raises:
        PromptError: if there is neither or both of template and turns, a count below 1, or a template that is none.
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
                f"benchmark.{name}.template is none ({error}): write fields in braces, and other braces twice."
            ) from error
        self._names = [field for _, field, _, _ in parts if field]
        self.name, self.dataset, self.subset, self.split = name, dataset, subset, split
        self.template, self.turns_field, self.renamed = template, tuple(turns_field), renamed or {}
        self.id_field, self.count, self.path = id_field, count, path

    def examples(self, limit: int | None = None) -> list[Example]:
        """The suite's examples.

        Raises:
            PromptError: if the rows cannot be had, or have other fields.
        """
        rows = self._hub() if self.path is None else self._file(Path(self.path))
        if not rows:
            raise PromptError(f"The benchmark {self.name} holds no rows: give at least one.")
        wanted = min(self.count if limit is None else min(limit, self.count), len(rows))
        # Chosen once for the usual count, so that a smaller limit takes a part of the same examples.
        order = random.Random(CHOICE).sample(range(len(rows)), min(self.count, len(rows)))
        return [self._example(rows[place], place) for place in order[:wanted]]

    def _example(self, row: dict[str, Any], place: int) -> Example:
        where = f"{self.name}, row {place}"
        name = f"{self.name}-{place}" if self.id_field is None else self._id(row, self.id_field, where)
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

    def _field(self, row: dict[str, Any], name: str, where: str) -> Any:
        for candidate in (name, self.renamed.get(name)):
            if candidate in row:
                return row[candidate]
        raise PromptError(f"{where} has no field {name!r}, only {listed(row)}: is it this suite's file?")

    def _text(self, row: dict[str, Any], name: str, where: str) -> str:
        value = self._field(row, name, where)
        if not is_text(value):
            raise PromptError(f"{where} has a {type(value).__name__} under {name!r}, no text: is it this suite's file?")
        return str(value)

    def _id(self, row: dict[str, Any], name: str, where: str) -> str:
        value = self._field(row, name, where)
        if not is_text(value) and type(value) is not int:
            raise PromptError(f"{where} has a {type(value).__name__} under {name!r}, no name: is it this suite's file?")
        return str(value)

    def _file(self, path: Path) -> list[dict[str, Any]]:
        return [row for _, row in read_rows(path, f"benchmark.{self.name}")]

    def _hub(self) -> list[dict[str, Any]]:
        instead = f"Use benchmark.{self.name}.path=FILE for a local copy in its schema."
        return list(load_dataset(self.dataset, self.subset, self.split, instead=instead))
