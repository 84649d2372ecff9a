"""The notebooks run from top to bottom, and those in the repository show what they found."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

from tests.support.paths import ROOT

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def outputs(notebook: Any) -> list[Any]:
    return [output for cell in notebook["cells"] for output in cell.get("outputs", [])]


def noise(notebook: Any) -> list[Any]:
    """What a reader did not ask for: errors, warnings, progress bars."""
    return [o for o in outputs(notebook) if o["output_type"] == "error" or o.get("name") == "stderr"]


def test_every_notebook_is_listed_in_the_docs() -> None:
    listed = re.findall(r"\d\d_\w+\.ipynb", (ROOT / "docs" / "notebooks.md").read_text())
    assert sorted(set(listed)) == [path.name for path in NOTEBOOKS]


@each
def test_outputs_are_kept(path: Path) -> None:
    notebook = json.loads(path.read_text(encoding="utf-8"))
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1)), "run it from top to bottom"
    shown = outputs(notebook)
    assert any({"image/svg+xml", "image/png"} & set(o.get("data", {})) for o in shown), "no figure"
    assert not noise(notebook)
    assert not re.search(r"(?<!\w)/(home|root|Users|tmp|work|opt)/", json.dumps(shown)), "a path of one machine"
    assert path.stat().st_size < 500_000


@each
def test_links_lead_somewhere(path: Path) -> None:
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    text = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    links = re.findall(r"\]\((?!http)([^)#\s]+)", text)
    assert all((path.parent / link).exists() for link in links), links


@pytest.mark.slow
@each
def test_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("nbclient", "nbformat", "ipykernel"):
        pytest.importorskip(package, reason=f"{package} is not installed: pip install -e '.[dev]'")
    import nbformat
    from nbclient import NotebookClient

    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    # They import support.py from beside them, and are run elsewhere to see whether they leave files.
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, (str(path.parent), os.environ.get("PYTHONPATH")))))
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    work = tmp_path / "work"
    work.mkdir()
    NotebookClient(notebook, timeout=240, kernel_name="python3", resources={"metadata": {"path": str(work)}}).execute()
    assert not noise(notebook)
    assert not list(work.iterdir()), "it leaves files where it was started"
