"""The configuration reference, read off the YAML files: every file, every key, its default and its comment.

A key's description is the comment behind it, or the lines of comment above it. Where a file has none, it is that of the
same key in another option of its group, or of the key that an experiment overrides: one meaning is written down once.
A group's ``base/`` files hold keys that several options share; each option that begins with one is shown with them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from html import escape
from pathlib import Path

import yaml

#: Groups in the order in which the data walk through them, and what an option decides.
GROUPS = {
    "target": "The frozen model whose decoding is to become faster.",
    "drafter": "The model that is trained: what it reads of the target and how it drafts.",
    "trajectories": "Where the target's texts come from, for `rollout=decode_free` and `rollout=target`.",
    "rollout": "How texts and anchors are found.",
    "data": "Prompts, and the replay batches made of what was rolled out.",
    "loss": "What a step minimises.",
    "optimizer": "How a step changes the drafter's weights.",
    "schedule": "How the learning rate changes over the run.",
    "trainer": "Lightning's trainer: devices, precision, length of the run.",
    "callbacks": "What Lightning's trainer calls beside the refresh of anchors.",
    "logger": "Where figures go.",
    "experiment": "Several choices at once.",
    "engine": "What decodes in an evaluation.",
    "benchmark": "Prompts of an evaluation; `benchmark=[NAME,NAME]` for several.",
}

#: Options that the others of their group are read beside.
USUAL = {
    "target": "tiny",
    "trajectories": "in_process",
    "data": "reasoning",
    "rollout": "speculative",
    "loss": "sharp_kl",
    "optimizer": "adamw",
    "schedule": "cosine",
    "benchmark": "gsm8k",
}


#: Ends an entry of a defaults list that puts a base's keys at the option's own place.
HERE = "@_here_"


@dataclass(frozen=True)
class Key:
    """One value of a file.

    Args:
        path: its place in the file, dotted.
        override: what goes before ``=`` on the command line.
        default: as written.
        comment: the file's own, or empty.
    """

    path: str
    override: str
    default: str
    comment: str


@dataclass
class Option:
    """One YAML file.

    Args:
        group: its folder; empty for ``train.yaml`` and ``eval.yaml``.
        name: the file's name without ``.yaml``.
        text: the comment at its head.
        calls: its ``_target_``, or empty.
        begins: its defaults list, an entry each, as ``group=option``.
        keys: its values, in the file's order.
    """

    group: str
    name: str
    text: str
    calls: str
    begins: list[str] = field(default_factory=list)
    keys: list[Key] = field(default_factory=list)


def read(configs: Path) -> list[Option]:
    """All files, in the order of :data:`GROUPS`, the usual option of each group first.

    Raises:
        ValueError: if there is a folder that :data:`GROUPS` does not know, or the other way round.
    """
    folders = {place.name for place in configs.iterdir() if place.is_dir()} - {"hydra"}
    if folders != set(GROUPS):
        raise ValueError(f"configs/ and GROUPS differ in {sorted(folders ^ set(GROUPS))}: describe each group once.")
    options = [read_option(configs / f"{name}.yaml", "") for name in ("train", "eval")]
    for group in GROUPS:
        folder = configs / group
        names = [path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.yaml")]
        names = [name for name in names if not name.startswith("base/")]
        for name in sorted(names, key=lambda name: (name != USUAL.get(group), "/" in name, name)):
            option = read_option(folder / f"{name}.yaml", group)
            option.name = name  # its folder included
            options.append(option)
    return options


def read_option(path: Path, group: str) -> Option:
    """One file; ``group`` is its folder."""
    source = path.read_text()
    lines = source.splitlines()
    package = group
    if lines[0].startswith("# @package "):
        package = lines.pop(0).removeprefix("# @package ").replace("_global_", "")
        lines.insert(0, "")
    root = yaml.compose(source)
    first = root.value[0][0].start_mark.line
    head = _head(lines[:first])
    option, bases = Option(group, path.stem, head, ""), list[Option]()
    for key, value in root.value:
        if key.value == "_target_":
            option.calls = value.value
        elif key.value == "defaults":
            chosen = [_begin(entry) for entry in value.value]
            shared = [entry for entry in chosen if entry.endswith(HERE) or entry.startswith("base/")]
            bases += [read_option(path.parent / f"{entry.removesuffix(HERE)}.yaml", group) for entry in shared]
            option.begins = [entry for entry in chosen if entry and entry not in shared]
        else:
            option.keys += _leaves(key, value, [], package, lines, first)
    for base in reversed(bases):
        _take_over(option, base)
    return option


def _take_over(option: Option, base: Option) -> None:
    """Give an option the keys of a base that it does not set, and the base's comments on those that it sets."""
    option.calls = option.calls or base.calls
    theirs = {key.path: key for key in base.keys}
    option.keys = [
        replace(key, comment=theirs[key.path].comment) if key.path in theirs and not key.comment else key
        for key in option.keys
    ]
    own = {key.path for key in option.keys}
    # A container that the option fills in stands for the base's single value.
    option.keys += [k for k in base.keys if k.path not in own and not any(o.startswith(f"{k.path}.") for o in own)]


def _head(lines: list[str]) -> str:
    """The comment lines at the head of a file as Markdown; an empty one parts paragraphs."""
    return "\n".join(line.removeprefix("#").strip() for line in lines if line.startswith("#")).strip()


def _begin(entry: yaml.Node) -> str:
    """An entry of a defaults list as it is written on the command line; empty for what is no choice."""
    if isinstance(entry, yaml.ScalarNode):
        return "" if entry.value == "_self_" else entry.value
    ((key, value),) = entry.value
    group = key.value.removeprefix("override ").removeprefix("optional ").removeprefix("/")
    if group.startswith("hydra/") or value.value == "null":
        return ""
    chosen = value.value if isinstance(value, yaml.ScalarNode) else ",".join(v.value for v in value.value)
    return f"{group}={chosen}"


def _leaves(
    key: yaml.Node, value: yaml.Node, above: list[str], package: str, lines: list[str], first: int
) -> Iterator[Key]:
    """The values under a key; containers in flow style and lists are values.

    Comment above line ``first`` is the file's, not a key's.
    """
    path = [*above, key.value]
    if key.value == "_partial_":  # how Hydra makes a function, no choice
        return
    if isinstance(value, yaml.MappingNode) and not value.flow_style and value.value:
        for inner_key, inner in value.value:
            yield from _leaves(inner_key, inner, path, package, lines, first)
        return
    dotted = ".".join(path)
    comment = _behind(value, lines) or _above(key.start_mark.line, lines, first)
    yield Key(dotted, f"{package}.{dotted}" if package else dotted, _written(value), comment)


def _behind(value: yaml.Node, lines: list[str]) -> str:
    """The comment behind a value on its line."""
    mark = value.end_mark
    rest = lines[mark.line][mark.column :] if mark.line < len(lines) else ""
    return rest.strip().removeprefix("#").strip() if rest.strip().startswith("#") else ""


def _above(line: int, lines: list[str], first: int) -> str:
    """The lines of comment right above a line, none of them above line ``first``."""
    found = []
    while line > first and lines[line - 1].strip().startswith("#"):
        line -= 1
        found.append(lines[line].strip().removeprefix("#").strip())
    return " ".join(reversed(found))


def _written(value: yaml.Node) -> str:
    """A value as it is written in the file, in one line."""
    if isinstance(value, yaml.ScalarNode):
        return f'"{value.value}"' if value.style and value.value in ("", "null") else value.value.replace("\n", "\\n")
    if isinstance(value, yaml.SequenceNode):
        return f"[{', '.join(map(_written, value.value))}]"
    return f"{{{', '.join(f'{k.value}: {_written(v)}' for k, v in value.value)}}}"


def describe(options: list[Option]) -> dict[tuple[str, str, str], str]:
    """What each key means, by group, option and path; empty where nothing says it."""
    everywhere: dict[str, str] = {}
    in_group: dict[tuple[str, str], str] = {}
    for option in options:
        for key in option.keys:
            if key.comment:
                everywhere.setdefault(key.override, key.comment)
                in_group.setdefault((option.group, key.path), key.comment)
    return {
        (option.group, option.name, key.path): key.comment
        or in_group.get((option.group, key.path), everywhere.get(key.override, ""))
        or ("a run for each value" if key.path.startswith("hydra.sweeper.params.") else "")
        for option in options
        for key in option.keys
    }


def pages(configs: Path) -> dict[str, str]:
    """The pages of the reference by their path in the documentation: Markdown."""
    options = read(configs)
    meanings = describe(options)
    built = {"configuration/index.md": _index(options)}
    for name in ("train", "eval"):
        option = next(o for o in options if not o.group and o.name == name)
        built[f"configuration/{name}.md"] = f"# {name}.yaml\n\n{_section(option, meanings, heading=False)}"
    for group, text in GROUPS.items():
        sections = [_section(o, meanings) for o in options if o.group == group]
        built[f"configuration/{group}.md"] = f"# {group}\n\n{text}\n\n" + "\n".join(sections)
    return built


def _index(options: list[Option]) -> str:
    usual = {entry for option in options if not option.group for entry in option.begins}
    rows = []
    for group, text in GROUPS.items():
        names = []
        for option in (o for o in options if o.group == group):
            shown = f"[`{option.name}`]({group}.md#{group}-{option.name})"
            names.append(f"**{shown}**" if f"{group}={option.name}" in usual else shown)
        rows.append(f"| [`{group}=`]({group}.md) | {text} | {', '.join(names)} |")
    table = "\n".join(["| group | | options, the default in bold |", "|---|---|---|", *rows])
    return f"""# Configuration

`train.py` and `eval.py` compose their configuration with [Hydra](https://hydra.cc) from the files in `configs/`. Every
page here is made from these files when the site is built: their keys, their defaults, and their comments as the text.

```bash
python train.py loss=forward_kl                 # GROUP=OPTION swaps a part
python train.py loss.gamma=0.9 seed=1           # KEY=VALUE changes a value
python train.py loss=forward_kl --cfg job       # shows the whole configuration and runs nothing
python train.py -m loss=sharp_kl,forward_kl seed=0,1   # a sweep
```

A wrong name or type ends the command before a model is loaded, and names the nearest valid choice. `null` is YAML's
word for nothing, `???` marks what must be given, and `${{seed}}` takes the value of another key.
The keys of a run itself are in [train.yaml](train.md) and [eval.yaml](eval.md).

{table}
"""


def _section(option: Option, meanings: dict[tuple[str, str, str], str], heading: bool = True) -> str:
    parts = []
    if heading:
        parts.append(f"## `{option.group}={option.name}` {{ #{option.group}-{option.name} }}")
    if option.text:
        parts.append(option.text)
    if option.calls:
        ours = option.calls.startswith("draftopd.")
        parts.append(f"Builds [`{option.calls}`][{option.calls}]." if ours else f"Builds `{option.calls}`.")
    if option.begins:
        parts.append("Begins with " + ", ".join(f"{_link(entry, option.group)}" for entry in option.begins) + ".")
    rows = [
        f"| `{key.override}` | {_code(key.default)} | {_cell(meanings[option.group, option.name, key.path])} |"
        for key in option.keys
        if not key.path.endswith("_target_")
    ]
    if rows:
        value = "value" if option.group == "experiment" else "default"
        parts.append("\n".join([f"| key | {value} | |", "|---|---|---|", *rows]))
    return "\n\n".join(parts) + "\n"


def _link(entry: str, group: str) -> str:
    """A choice of a defaults list, linked to where it is described."""
    chosen, _, names = entry.partition("=")
    if not names:  # another option of the same group
        return f"[`{group}={entry}`](#{group}-{entry})"
    shown = f"[{names}]" if "," in names else names
    chosen, at, place = chosen.partition("@")  # the place is relative to the group's own
    return f"[`{chosen}{at}{f'{group}.{place}' if at else ''}={shown}`]({chosen}.md#{chosen}-{names.split(',')[0]})"


def _code(text: str) -> str:
    """Code in a table's cell; a dollar sign would begin a formula."""
    return f"<code>{escape(text).replace('|', '&#124;').replace('$', '&#36;')}</code>"


def _cell(text: str) -> str:
    """A comment in a table's cell: plain text, what looks like code or Markdown left as it is written."""
    return (
        escape(text, quote=False)
        .replace("|", "&#124;")
        .replace("*", "&#42;")
        .replace("_", "&#95;")
        .replace("$", "&#36;")
    )
