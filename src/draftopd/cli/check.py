"""Names and types of a composed configuration, checked before anything is loaded."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Callable
from typing import Any, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.errors import PydanticSchemaGenerationError, PydanticUndefinedAnnotation, PydanticUserError

from draftopd.cli.nearest import nearest
from draftopd.errors import ConfigError


def check(config: Any, path: str = "") -> None:
    """Compare every ``_target_`` node with the signature of what it names.

    Raises:
        ConfigError: naming the key, what was found, and what fits.
    """
    if isinstance(config, list):
        for index, item in enumerate(config):
            check(item, f"{path}[{index}]")
    if not isinstance(config, dict):
        return
    if "_target_" in config:
        _check_call(config, path)
    for key, value in config.items():
        check(value, f"{path}.{key}" if path else str(key))


def _check_call(node: dict[str, Any], path: str) -> None:
    called = _locate(node["_target_"], path)
    parameters, hints, open_ended = _parameters(called)
    for key, value in node.items():
        if key.startswith("_"):
            continue
        if key not in parameters:
            if open_ended:
                continue
            raise ConfigError(f"{path}.{key} is no option of {node['_target_']}: {nearest(key, parameters)}")
        if isinstance(value, dict) and "_target_" in value:
            continue
        check_value(value, hints.get(key, Any), f"{path}.{key}" if path else key)


def check_value(value: Any, hint: Any, path: str) -> None:
    """Compare one value with an annotation, its range (``PositiveInt``, ``Annotated``) included.

    Raises:
        ConfigError: naming the key, what was found, and what fits.
    """
    if value == "???":
        raise ConfigError(f"{path} must be given: {path}=VALUE.")
    try:
        adapter = TypeAdapter(hint, config=ConfigDict(arbitrary_types_allowed=True))
    except PydanticUserError:
        adapter = TypeAdapter(hint)  # types that carry a configuration of their own
    except (PydanticSchemaGenerationError, PydanticUndefinedAnnotation, TypeError):
        return
    wanted = _name(hint)
    try:
        fitted = adapter.validate_python(value)
    except ValidationError as error:
        first = error.errors()[0]
        if first["type"] in ("is_instance_of", "callable_type"):
            return
        if first["type"] == "literal_error":
            expected = " ".join(e["ctx"]["expected"] for e in error.errors() if e["type"] == "literal_error")
            choices = [text or number for text, number in re.findall(r"'([^']*)'|\b(\d+)\b", expected)]
            raise ConfigError(f"{path}={value} does not exist: {nearest(str(value), choices)}") from error
        expected = "expected more values" if first["type"] == "missing" else first["msg"]
        raise ConfigError(f"{path}={value!r} does not fit{wanted}: {expected}.") from error
    # The part gets the value as written, not as converted: the text "no" would count as true.
    as_written = type(fitted) is type(value) or (isinstance(fitted, float) and type(value) is int)
    if isinstance(fitted, int | float) and not as_written:
        raise ConfigError(f"{path}={value!r} does not fit{wanted}: write {str(fitted).lower()}.")


def _locate(name: Any, path: str) -> Callable[..., Any]:
    """The object a dotted name points to, attributes of classes included."""
    if not isinstance(name, str):
        raise ConfigError(f"{path}._target_={name!r} names nothing that can be imported: write a dotted name.")
    parts = name.split(".")
    for cut in range(len(parts) - 1, 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:cut]))
        except ModuleNotFoundError:
            continue
        try:
            for part in parts[cut:]:
                found = getattr(found, part)
        except AttributeError:
            break
        if not callable(found):
            break
        return found
    raise ConfigError(f"{path}._target_={name} names nothing that can be imported: check the spelling.")


def _parameters(called: Callable[..., Any]) -> tuple[set[str], dict[str, Any], bool]:
    """Names and annotations of the arguments, and whether others are taken too.

    A class that hands ``**options`` on to its base takes the base's arguments as well.
    """
    functions = [called]
    if inspect.isclass(called):
        functions = [
            vars(base)["__init__"] for base in called.__mro__ if "__init__" in vars(base) and base is not object
        ]
        functions = functions or [called]
    names: set[str] = set()
    hints: dict[str, Any] = {}
    for function in functions:
        parameters = inspect.signature(function).parameters.values()
        named = [p.name for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL) and p.name != "self"]
        names.update(named)
        found = _hints(function)
        hints |= {name: found[name] for name in named if name in found and name not in hints}
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            return names, hints, False
    return names, hints, True


def _hints(function: Callable[..., Any]) -> dict[str, Any]:
    try:
        return get_type_hints(function, include_extras=True)
    except (NameError, TypeError):
        return {}


def _name(hint: Any) -> str:
    """`` int`` for a plain or ranged ``int``; nothing for what has no short name."""
    plain = getattr(hint, "__origin__", hint)
    return f" {plain.__name__}" if inspect.isclass(plain) else ""
