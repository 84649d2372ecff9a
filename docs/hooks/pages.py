"""What MkDocs does beyond its plugins: pages made from other files, and mathematics as MathML.

Browsers lay out MathML themselves, without a script or a font; GitHub renders the same ``$...$`` too.
"""

from __future__ import annotations

import re
from html import unescape
from pathlib import Path
from typing import Any

import configuration
from latex2mathml.converter import convert
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]

#: Files of the repository that are pages too.
PAGES = {
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
    "tables.md": "benchmarks/results/README.md",
}

_FORMULA = re.compile(r'<(span|div) class="arithmatex">(\\\(|\\\[)(.*?)(\\\)|\\\])</\1>', re.DOTALL)


def on_files(files: Files, config: Any) -> Files:
    """Add the configuration reference, and the pages that lie outside ``docs/``."""
    made = configuration.pages(ROOT / "configs")
    made |= {page: (ROOT / source).read_text() for page, source in PAGES.items()}
    for path, text in made.items():
        files.append(File.generated(config, path, content=text))
    return files


def on_page_content(html: str, **_: Any) -> str:
    """Turn formulas into MathML."""
    return _FORMULA.sub(lambda found: _mathml(found[3], "block" if found[1] == "div" else "inline"), html)


def _mathml(tex: str, display: str) -> str:
    made = str(convert(unescape(tex).strip(), display=display))
    if "\\" in made:
        raise PluginError(f"A command of the formula {tex} is not known to latex2mathml: write it otherwise.")
    return made
