"""Dotted keys of a configuration."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


def walk(config: Any, prefix: str = "", lists: bool = False) -> Iterator[tuple[str, Any]]:
    """Every dotted key of nested dictionaries, and its value.

    Args:
        prefix: begins every key.
        lists: include the items of lists, whose keys are their indices.
    """
    if isinstance(config, dict):
        items = list(config.items())
    else:
        items = list(enumerate(config)) if lists and isinstance(config, list) else []
    for key, value in items:
        yield f"{prefix}{key}", value
        yield from walk(value, f"{prefix}{key}.", lists)
