"""Griffe extension for the habits of this package's docstrings.

Sphinx roles become links, ``#:`` comments above an attribute its docstring; arguments described together are parted.
"""

from __future__ import annotations

import re
from pathlib import Path

from griffe import Alias, Docstring, Extension, GriffeLoader, Module, NameResolutionError, Object

_ROLE = re.compile(r":(?:class|func|meth|data|attr|mod):`(~?)([\w.]+)`")
#: ``name, other: text``, over several lines if need be.
_TOGETHER = re.compile(r"^( +)(\w+(?:,\s+\w+)+):( .*(?:\n\1 +\S.*)*)", re.MULTILINE)


class Docstrings(Extension):
    """Rewrites every docstring of a package once it is loaded."""

    def on_package(self, *, pkg: Module, loader: GriffeLoader, **_: object) -> None:
        self._rewrite(pkg)

    def _rewrite(self, item: Object | Alias) -> None:
        if isinstance(item, Alias):
            return
        if item.is_attribute and item.docstring is None:
            item.docstring = commented(item)
        if item.docstring is not None:
            item.docstring.value = rewritten(item.docstring, item)
        for member in item.members.values():
            self._rewrite(member)


def commented(attribute: Object) -> Docstring | None:
    """The ``#:`` comment above an attribute as a docstring."""
    lines = attribute.lines_collection[attribute.filepath] if isinstance(attribute.filepath, Path) else []
    end = start = (attribute.lineno or 1) - 1
    while start and lines[start - 1].strip().startswith("#:"):
        start -= 1
    text = " ".join(line.strip().removeprefix("#:").strip() for line in lines[start:end])
    return Docstring(text, parent=attribute, parser="google", parser_options={}) if text else None


def rewritten(docstring: Docstring, owner: Object) -> str:
    """The docstring's text with links for roles, and an entry for each argument."""
    text = _ROLE.sub(lambda found: _link(owner, found[2], short=bool(found[1])), docstring.value)
    head, section, arguments = text.partition("\nArgs:\n")
    if section:
        end = re.search(r"^\S", arguments, re.MULTILINE)
        inside, after = (arguments[: end.start()], arguments[end.start() :]) if end else (arguments, "")
        arguments = _TOGETHER.sub(_parted, inside) + after
    return head + section + arguments


def _parted(found: re.Match[str]) -> str:
    indent, names, text = found.groups()
    return "\n".join(f"{indent}{name}:{text}" for name in re.split(r",\s+", names))


def _link(owner: Object, path: str, short: bool) -> str:
    shown = path.rsplit(".", 1)[-1] if short else path
    first, _, rest = path.partition(".")
    if first == "draftopd":
        return f"[`{shown}`][{path}]"
    try:
        return f"[`{shown}`][{owner.resolve(first)}{'.' * bool(rest)}{rest}]"
    except NameResolutionError:
        return f"`{shown}`"
