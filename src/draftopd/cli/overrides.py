"""Checks a command's overrides before Hydra reads them and writes anything."""

from __future__ import annotations

import os
import re
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from draftopd.cli.keys import walk
from draftopd.cli.nearest import nearest
from draftopd.cli.secrets import exposed


def foreseen(configs: Path, name: str, arguments: list[str]) -> str | None:
    """An error message about a command line, as far as its overrides can be read beforehand, or None."""
    flags = {a.partition("=")[0] for a in arguments if a.startswith("-")}
    overrides = [a for a in arguments if not a.startswith("-")]
    if not flags:
        return problem(configs, name, overrides)
    if flags <= {"-m", "--multirun"}:
        return _problem_of_sweep(configs, name, overrides)
    if flags <= {"-c", "--cfg", "--resolve"}:
        # The argument of --cfg is among them: job, hydra or all.
        return problem(configs, name, [o for o in overrides if "=" in o or o.startswith("~")], keeps=False)
    return None  # some of Hydra's other flags change the directory of configurations


def _problem_of_sweep(configs: Path, name: str, overrides: list[str]) -> str | None:
    """An error message about an unknown option or an exposed key among the values of a sweep, or None."""
    first = []
    for override in overrides:
        try:
            parsed = OverridesParser.create().parse_override(override)
            swept = parsed.is_sweep_override() and not parsed.is_hydra_override()
            values = list(parsed.sweep_string_iterator()) if swept else []
        except HydraException:
            return None  # Hydra reports it
        given = [f"{parsed.get_key_element()}={value}" for value in values] or [override]
        for one in given:
            unknown = _unknown_option(configs, one)
            if unknown:
                return unknown
        first.append(given[0])
    try:
        with initialize_config_dir(str(configs), version_base="1.3"):
            return exposed(compose(name, first))
    except (HydraException, OmegaConfBaseException):
        return None
    finally:
        GlobalHydra.instance().clear()


def _unknown_option(configs: Path, override: str) -> str | None:
    """An error message if ``override`` chooses an option that its group does not have, or None."""
    # GROUP@PACKAGE=OPTION puts an option at another key than the group's own.
    key, _, option = override.lstrip("+~").partition("=")
    group = key.partition("@")[0]
    if "=" not in override or not (configs / group).is_dir() or "/" in group or not group:
        return None
    files = {p.relative_to(configs / group).with_suffix("") for p in (configs / group).rglob("*.yaml")}
    options = {str(file) for file in files if file.parts[0] != "base"}  # base/ is not an option
    if option == "null":
        return f"{key}=null cannot be chosen: write ~{key} to leave the group out."
    several = option.startswith("[") and option.endswith("]")
    for part in option[1:-1].split(",") if several else [option]:
        if part.strip() and part.strip() not in options and (several or "," not in part):
            return f"{key}={option} does not exist: {nearest(part.strip(), options)}"
    return None


def problem(configs: Path, name: str, overrides: list[str], keeps: bool = True) -> str | None:
    """An error message about the overrides of the configuration ``name``, or None.

    Args:
        keeps: whether the command writes into a run directory: all values must then be given, the directory writable.
    """
    groups = {path.name for path in configs.iterdir() if path.is_dir()}
    chosen = [o for o in overrides if re.split("[@=]", o)[0].lstrip("+~") in groups]
    for override in chosen:
        unknown = _unknown_option(configs, override)
        if unknown:
            return unknown
    for override in overrides:
        try:
            OverridesParser.create().parse_override(override)
        except HydraException as error:
            if "=" in override:
                return (
                    f"{override!r} cannot be read: {str(error).splitlines()[0]}. Quote values with brackets or commas."
                )
    try:
        with initialize_config_dir(str(configs), version_base="1.3"):
            base = compose(name, chosen)
            known = {key for key, _ in walk(OmegaConf.to_container(base))}
            for override in overrides:
                key = override.split("=")[0]
                if override in chosen or key.startswith(("+", "~", "hydra.", "hydra/")):
                    continue
                if "=" not in override:
                    listed = ", ".join(sorted(groups))
                    return (
                        f"{override!r} is not an override: write KEY=VALUE, or GROUP=OPTION with a group of {listed}."
                    )
                if key not in known:
                    return f"{key} is not a configuration key: {nearest(key, known | groups)}"
            config = compose(name, overrides)
            secret = exposed(config)
            if secret:
                return secret
            if not keeps:
                return None
            missing = next((key for key, value in walk(OmegaConf.to_container(config)) if value == "???"), None)
            if missing:
                return f"{missing} must be given: {missing}=VALUE."
            whole = compose(name, overrides, return_hydra_config=True)
            return _unwritable(Path(whole.hydra.run.dir))
    except (HydraException, OmegaConfBaseException) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return re.sub(r"\s+", " ", " ".join(lines[:2]))
    finally:
        GlobalHydra.instance().clear()


def _unwritable(directory: Path) -> str | None:
    """An error message if a run's directory cannot be made or written, or None."""
    existing = next(path for path in (directory.absolute(), *directory.absolute().parents) if path.exists())
    if existing.is_dir() and os.access(existing, os.W_OK | os.X_OK):
        return None
    reason = f"{existing} is read-only for you" if existing.is_dir() else f"{existing} is a file"
    return f"The run cannot be written to {directory}: {reason}. Choose another directory (hydra.run.dir=DIR)."
