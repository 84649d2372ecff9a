"""JSON from outside: read, or refused with one kind of error."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

#: A line of a JSON-lines file is no longer, in bytes: no prompt and no text is.
MAX_LINE = 16 * 2**20


def parse_json(text: str | bytes) -> Any:
    """What a JSON text says.

    Raises:
        ValueError: if it is none, is not UTF-8, begins with a byte order mark, nests too deeply, or has a number
            of too many digits.
    """
    if isinstance(text, bytes):
        text = text.decode("utf-8")
    if text.startswith("\ufeff"):
        raise ValueError("it begins with a byte order mark: save it as UTF-8 without one")
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it nests too deeply") from error


def whole(value: Any) -> int:
    """A whole number, as it stands.

    Raises:
        ValueError: for anything else, 3.0, true and "3" included.
    """
    if type(value) is not int:
        raise ValueError(f"{shown(value, 40)} where a whole number belongs")
    return value


def is_text(value: Any) -> bool:
    """Whether it is a text that can be encoded: JSON can write half of a surrogate pair."""
    if not isinstance(value, str):
        return False
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def shown(value: Any, most: int = 300) -> str:
    """A stranger's text or value for one line of a message: cut off, and without control characters."""
    text = value if isinstance(value, str) else repr(value)
    line = "".join(c if c.isprintable() else " " for c in text[: 2 * most])
    line = " ".join(line.split())
    return line if len(line) <= most and len(text) <= 2 * most else line[:most] + "..."


def listed(names: Iterable[Any], most: int = 8) -> str:
    """Names for a message: the first few, or ``nothing``."""
    every = [shown(str(name), 40) for name in names]
    return ", ".join(every[:most]) + (f" and {len(every) - most} more" if len(every) > most else "") or "nothing"
