"""What the benchmarks' page says is there: a command per script, and one form of results."""

from __future__ import annotations

import importlib.util
import json
import re

from tests.support.paths import ROOT

BENCHMARKS = ROOT / "benchmarks"
PAGE = (BENCHMARKS / "README.md").read_text()


def test_the_page_has_a_command_for_every_script() -> None:
    scripts = {
        f"benchmarks.{path.parent.name}.{path.stem}"
        for path in BENCHMARKS.glob("*/*.py")
        if "keep(" in path.read_text() and "def main(" in path.read_text()
    }
    assert "benchmarks.studies.plateau" in scripts
    assert scripts == set(re.findall(r"python -m (benchmarks\.\w+\.\w+)", PAGE))


def test_commands_of_the_documentation_name_scripts() -> None:
    pages = [
        ROOT / "README.md",
        ROOT / "Makefile",
        *(ROOT / "docs").rglob("*.md"),
        *(ROOT / "notebooks").glob("*.ipynb"),
    ]
    text = "\n".join(page.read_text() for page in pages)
    named = set(re.findall(r"python -m (benchmarks\.[\w.]+)", text))
    assert len(named) > 5
    assert not [name for name in named if importlib.util.find_spec(name) is None]
    assert not [path for path in re.findall(r"\bbenchmarks/\w[\w/]*\.py", text) if not (ROOT / path).exists()]


def test_results_have_one_form() -> None:
    files = sorted((BENCHMARKS / "results").glob("*.json"))
    assert files
    for file in files:
        assert list(json.loads(file.read_text()))[:4] == ["date", "machine", "versions", "arguments"], file.name
