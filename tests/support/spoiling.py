"""Changes to a copied directory that make it one to refuse."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

Change = Callable[[Path], object]

#: JSON deeper than parsers go.
DEEP = b'{"a": ' * 5000 + b"1" + b"}" * 5000


def config(file: str = "config.json", **changes: Any) -> Change:
    """Other fields of a JSON file; ``...`` takes one out."""

    def change(place: Path) -> None:
        raw = json.loads((place / file).read_text()) | changes
        (place / file).write_text(json.dumps({k: v for k, v in raw.items() if v is not ...}))

    return change


def content(name: str, data: bytes) -> Change:
    """Other bytes in a file."""
    return lambda place: (place / name).write_bytes(data)


class Harm:
    """A pickle that would leave a file where it is loaded."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.place / "harmed"),)


def pickled(name: str, remove: str = "model.safetensors") -> Change:
    def change(place: Path) -> None:
        (place / remove).unlink()
        (place / name).write_bytes(pickle.dumps(Harm(place)))

    return change
