"""Imports run one way: a room knows only the rooms before it, and no two files import each other in a circle."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from tests.support.paths import ROOT

SOURCES = ROOT / "src" / "draftopd"

#: Every room of the package, in the order of imports.
ROOMS = (
    "errors", "bundled", "io", "data", "targets", "drafters", "distributed", "decoding", "rollout", "replay", "losses",
    "metrics", "training", "evaluation", "interop", "planning", "cli", "__main__",
)  # fmt: skip


def modules(sources: Path) -> dict[str, Path]:
    """The package's modules by dotted name, ``__init__`` files left out."""
    files = sorted(sources.rglob("*.py"))
    return {".".join(f.relative_to(sources).with_suffix("").parts): f for f in files if f.stem != "__init__"}


def imports(path: Path, known: set[str]) -> Iterator[str]:
    """The modules that a file imports, inside functions and under TYPE_CHECKING too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "draftopd":
            within = (node.module or "").partition(".")[2]
            names = [f"{within}.{alias.name}".lstrip(".") for alias in node.names]
            yield from (name if name in known else within for name in names)
        elif isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[2] for alias in node.names if alias.name.startswith("draftopd."))


def graph(sources: Path) -> dict[str, set[str]]:
    """Each module and what it imports."""
    found = modules(sources)
    return {name: set(imports(path, set(found))) & set(found) for name, path in found.items()}


def upward(found: dict[str, set[str]]) -> list[str]:
    """Imports of a later room."""
    order = {room: number for number, room in enumerate(ROOMS)}
    return [
        f"{name} imports {other}"
        for name, others in found.items()
        for other in sorted(others)
        if order[other.split(".")[0]] > order[name.split(".")[0]]
    ]


def test_every_room_is_listed_and_nothing_lies_loose() -> None:
    entries = {p.name.removesuffix(".py") for p in SOURCES.iterdir() if p.name not in ("__pycache__", "py.typed")}
    assert entries == set(ROOMS) | {"__init__"}
    loose = {p.stem for p in SOURCES.glob("*.py")}
    assert loose == {"__init__", "__main__", "errors"}


def test_no_room_imports_a_later_one() -> None:
    assert upward(graph(SOURCES)) == []


def test_no_circle_of_files() -> None:
    TopologicalSorter(graph(SOURCES)).prepare()  # raises CycleError, which names the circle


def test_both_faults_are_noticed(tmp_path: Path) -> None:
    for name, text in {
        "io/a.py": "from draftopd.cli import b\nfrom draftopd.io import c",
        "cli/b.py": "import draftopd.errors",
        "io/c.py": "def f():\n    from draftopd.io.a import g",
        "errors.py": "",
    }.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    found = graph(tmp_path)
    assert upward(found) == ["io.a imports cli.b"]
    with pytest.raises(CycleError, match=r"io\.a"):
        TopologicalSorter(found).prepare()
