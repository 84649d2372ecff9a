"""What every refusal has in common."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from draftopd.errors import DraftOPDError

#: What tells a user to do something.
ADVICE = re.compile(
    r"\b(use|set|name|write|copy|train|choose|delete|roll out|check|give|raise|save|look|mend|expected|must|leave|"
    r"did you mean|should be|quote|lower|is it|must lie|add|download)\b",
    re.IGNORECASE,
)


def snapshot(place: Path) -> dict[str, bytes | None]:
    """Every file under a directory with its bytes, directories with None."""
    return {str(p.relative_to(place)): p.read_bytes() if p.is_file() else None for p in sorted(place.rglob("*"))}


def refused(act: Callable[[], object], kind: type[DraftOPDError], message: str, place: Path) -> None:
    """``act`` ends in just this kind of error, in one readable line that says what to do, and changes no file."""
    before = snapshot(place)
    with pytest.raises(DraftOPDError) as raised:
        act()
    said = str(raised.value)
    assert type(raised.value) is kind, raised.value
    assert re.search(message, said), said
    assert ADVICE.search(said), f"no advice: {said}"
    assert "\n" not in said and said.isprintable() and len(said) < 1000, said[:2000]
    assert snapshot(place) == before


#: ``(kind) -> directory``: a fresh copy of what is to be spoiled.
Copy = Callable[[str], Path]
