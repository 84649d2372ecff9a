"""Checks the names and types of a composed configuration before anything is loaded."""

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
    """Compare every ``_target_`` node with the signature of the object that it names.

    Raises:
        ConfigError: naming the key, what was found, and what fits.
    """
    if isinstance(config, list):
        for index, item in enumerate(config):
            check(item, f"{path}[{index}]")
    if not isinstance(config, dict):
        return
    if "_target_" in config:
        check_call(_locate(config["_target_"], path), config, path)
    for key, value in config.items():
        check(value, f"{path}.{key}" if path else str(key))


def check_call(called: Callable[..., Any], values: dict[str, Any], path: str = "") -> None:
    """Compare the arguments at a key with a signature; keys with a leading ``_`` are Hydra's.

    Raises:
        ConfigError: naming the key, what was found, and what fits.
    """
    parameters, hints, open_ended = _parameters(called)
    for key, value in values.items():
        where = f"{path}.{key}" if path else key
        if key in parameters:
            if not (isinstance(value, dict) and "_target_" in value):
                check_value(value, hints.get(key, Any), where)
        elif not (key.startswith("_") or open_ended):
            name = values.get("_target_", f"{called.__module__}.{called.__qualname__}")
            raise ConfigError(f"{where} is not an option of {name}: {nearest(key, parameters)}")


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
    # The part gets the value as written, not converted: the text "no" would count as true.
    as_written = type(fitted) is type(value) or (isinstance(fitted, float) and type(value) is int)
    if isinstance(fitted, int | float) and not as_written:
        raise ConfigError(f"{path}={value!r} does not fit{wanted}: write {str(fitted).lower()}.")


def _locate(name: Any, path: str) -> Callable[..., Any]:
    """The object that a dotted name points to, attributes of classes included."""
    if not isinstance(name, str):
        raise ConfigError(f"{path}._target_={name!r} cannot be imported: write a dotted name.")
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
    raise ConfigError(f"{path}._target_={name} cannot be imported: check the spelling.")


def _parameters(called: Callable[..., Any]) -> tuple[set[str], dict[str, Any], bool]:
    """Names and annotations of the arguments, and whether the call takes others too.

    A class that passes ``**options`` on to its base takes the base's arguments as well.
    """
    bases = called.__mro__[:-1] if inspect.isclass(called) else ()
    functions = [vars(base)["__init__"] for base in bases if "__init__" in vars(base)] or [called]
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
    """`` int`` for a plain or ranged ``int``; empty for a type without a short name."""
    plain = getattr(hint, "__origin__", hint)
    return f" {plain.__name__}" if inspect.isclass(plain) else ""
