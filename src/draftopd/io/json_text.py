"""Parsing of JSON from untrusted files and servers, and display of untrusted values in messages."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

#: Maximum bytes per line of a JSON-lines file; real prompts and texts are shorter.
MAX_LINE = 16 * 2**20


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: if the text is not JSON, is not UTF-8, begins with a byte order mark, nests too deeply, or has a
            number with too many digits.
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
    """``value``, if it is a whole number.

    Raises:
        ValueError: if it has another type, such as 3.0, true or "3".
    """
    if type(value) is not int:
        raise ValueError(f"{shown(value, 40)} where a whole number belongs")
    return value


def is_text(value: Any) -> bool:
    """Whether ``value`` is a string that UTF-8 can encode; JSON allows half of a surrogate pair, which it cannot."""
    if not isinstance(value, str):
        return False
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def shown(value: Any, limit: int = 300) -> str:
    """An untrusted value on one line of a message: without control characters, cut to ``limit`` characters."""
    text = value if isinstance(value, str) else repr(value)
    line = " ".join("".join(c if c.isprintable() else " " for c in text[: 2 * limit]).split())
    return line if len(line) <= limit and len(text) <= 2 * limit else line[:limit] + "..."


def listed(names: Iterable[Any], limit: int = 8) -> str:
    """The first ``limit`` names separated by commas, for a message; ``nothing`` without names."""
    every = [shown(str(name), 40) for name in names]
    return ", ".join(every[:limit]) + (f" and {len(every) - limit} more" if len(every) > limit else "") or "nothing"
