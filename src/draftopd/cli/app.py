"""The command line around Hydra: clear errors instead of tracebacks, nothing heavy imported early."""

from __future__ import annotations

import atexit
import errno
import logging
import os
import re
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import NoReturn

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, InstantiationException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from draftopd.errors import CONTINUES, DraftOPDError


def run(main: Callable[[], None], configs: Path, name: str) -> None:
    """Check the overrides of ``sys.argv``, then hand over to the Hydra application ``main``, and end the process.

    A wrong group option or key ends here with the nearest valid one.
    """
    problem = _foreseen(configs, name, sys.argv[1:])
    if problem:
        sys.exit(f"Error: {problem}")
    try:
        main()
    except SystemExit as ended:
        _leave(ended.code)
    _leave(None)


def _leave(code: str | int | None) -> NoReturn:
    """End the process as ``sys.exit(code)`` does, but leave its memory to the system.

    The interpreter would take all of torch down object by object: seconds of nothing to see, at whose beginning Ctrl-C
    has already said that it stopped the run. Under a profiler, which writes afterwards, the interpreter ends as usual.
    """
    if sys.getprofile() is not None:
        sys.exit(code)
    if isinstance(code, str):
        print(code, file=sys.stderr)
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]  # as the interpreter does: threads that are no daemons, then
    atexit._run_exitfuncs()  # what was registered
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:  # closed before the command began
                stream.flush()
        except OSError as error:
            code = code or 1
            if error.errno != errno.EPIPE and stream is not sys.stderr:  # else nobody reads any more
                print(f"Error: the output could not be written: {error}", file=sys.stderr)
    os._exit(code or 0)


#: What a system says of a disk that takes no more.
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)


def guarded(action: Callable[[DictConfig], None], config: DictConfig) -> None:
    """Run a command; an error the user can act on is printed as one message, with exit status 1."""
    from draftopd.cli.check import check
    from draftopd.distributed.ranks import is_first
    from draftopd.io.files import locked

    try:
        check(OmegaConf.to_container(config, resolve=True))
        # The other processes of a run work beside the first one in its directory; a plan has none.
        kept = HydraConfig.initialized() and is_first()
        with locked(Path(HydraConfig.get().runtime.output_dir)) if kept else nullcontext():
            action(config)
    except OmegaConfBaseException as error:
        sys.exit(f"Error: {str(error).splitlines()[0]}")
    except InstantiationException as error:
        # A part refused its arguments: what it said is the cause, Hydra's wrapping is not for users.
        cause = error.__cause__
        if isinstance(cause, DraftOPDError | ValueError) or type(cause).__name__ == "MisconfigurationException":
            sys.exit(f"Error: {cause}")
        raise
    except DraftOPDError as error:
        sys.exit(f"Error: {error}")
    except OSError as error:
        if error.errno not in _DISK:
            raise
        sys.exit(f"Error: {error}. Free space or choose another directory (hydra.run.dir=DIR). {CONTINUES}")
    except KeyboardInterrupt:
        sys.exit(f"Stopped. {CONTINUES}")
    except SystemExit as error:
        from lightning.pytorch.utilities.exceptions import SIGTERMException

        if not isinstance(error, SIGTERMException):
            raise
        print(f"Stopped by SIGTERM. {CONTINUES}", file=sys.stderr)
        sys.exit(128 + signal.SIGTERM)


def _foreseen(configs: Path, name: str, arguments: list[str]) -> str | None:
    """What is wrong with a command line, as far as can be said before Hydra reads it and writes anything; or None."""
    flags = {a.partition("=")[0] for a in arguments if a.startswith("-")}
    overrides = [a for a in arguments if not a.startswith("-")]
    if not flags:
        return _problem(configs, name, overrides)
    if flags <= {"-m", "--multirun"}:
        return _problem_of_sweep(configs, name, overrides)
    if flags <= {"-c", "--cfg", "--resolve"}:
        # What is to be shown stands among them: job, hydra or all.
        return _problem(configs, name, [o for o in overrides if "=" in o or o.startswith("~")], keeps=False)
    return None  # of Hydra's other flags some change where configurations lie


def _problem_of_sweep(configs: Path, name: str, overrides: list[str]) -> str | None:
    """An option that does not exist, or a key that would be written down, in the values of a sweep; or None."""
    from draftopd.cli.secrets import exposed

    first = []
    for override in overrides:
        try:
            parsed = OverridesParser.create().parse_override(override)
            swept = parsed.is_sweep_override() and not parsed.is_hydra_override()
            values = list(parsed.sweep_string_iterator()) if swept else []
        except HydraException:
            return None  # Hydra says what it cannot read
        given = [f"{parsed.get_key_element()}={value}" for value in values] or [override]
        for one in given:
            problem = _unknown_option(configs, one)
            if problem:
                return problem
        first.append(given[0])
    try:
        with initialize_config_dir(str(configs), version_base="1.3"):
            return exposed(compose(name, first))
    except (HydraException, OmegaConfBaseException):
        return None
    finally:
        GlobalHydra.instance().clear()


def _unknown_option(configs: Path, override: str) -> str | None:
    """The option of a group that ``override`` chooses and there is not; or None."""
    from draftopd.cli.nearest import nearest

    # A group's option may go to another place than the group's own: GROUP@PLACE=OPTION.
    place, _, option = override.lstrip("+~").partition("=")
    group = place.partition("@")[0]
    if "=" not in override or not (configs / group).is_dir() or "/" in group or not group:
        return None
    files = {p.relative_to(configs / group).with_suffix("") for p in (configs / group).rglob("*.yaml")}
    options = {str(file) for file in files if file.parts[0] != "base"}  # base/ holds keys that options share
    if option == "null":
        return f"{place}=null is not Hydra's way: write ~{place} to leave the group out."
    several = option.startswith("[") and option.endswith("]")
    for part in option[1:-1].split(",") if several else [option]:
        if part.strip() and part.strip() not in options and (several or "," not in part):
            return f"{place}={option} does not exist: {nearest(part.strip(), options)}"
    return None


def _problem(configs: Path, name: str, overrides: list[str], keeps: bool = True) -> str | None:
    """What is wrong with the overrides, or with the directory of a run that ``keeps`` something; or None."""
    from draftopd.cli.nearest import nearest
    from draftopd.cli.secrets import exposed

    groups = {path.name for path in configs.iterdir() if path.is_dir()}
    chosen = [o for o in overrides if re.split("[@=]", o)[0].lstrip("+~") in groups]
    for override in chosen:
        problem = _unknown_option(configs, override)
        if problem:
            return problem
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
            known = _keys(base)
            for override in overrides:
                key = override.split("=")[0]
                if override in chosen or key.startswith(("+", "~", "hydra.")):
                    continue
                if "=" not in override:
                    listed = ", ".join(sorted(groups))
                    return f"{override!r} is no override: write KEY=VALUE, or GROUP=OPTION with a group of {listed}."
                if key not in known:
                    return f"{key} is no configuration key: {nearest(key, known | groups)}"
            config = compose(name, overrides)
            problem = exposed(config)
            if problem:
                return problem
            if not keeps:
                return None
            missing = next(_missing(config), None)
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
    """Why a run's directory cannot be made or written, or None."""
    there = next(place for place in (directory.absolute(), *directory.absolute().parents) if place.exists())
    if there.is_dir() and os.access(there, os.W_OK | os.X_OK):
        return None
    reason = f"{there} is read-only for you" if there.is_dir() else f"{there} is a file"
    return f"The run cannot be kept in {directory}: {reason}. Choose another directory (hydra.run.dir=DIR)."


def _missing(config: DictConfig, prefix: str = "") -> Iterator[str]:
    """Dotted keys whose values must be given."""
    for key in map(str, config):
        if OmegaConf.is_missing(config, key):
            yield f"{prefix}{key}"
        elif not OmegaConf.is_interpolation(config, key) and isinstance(config[key], DictConfig):
            yield from _missing(config[key], f"{prefix}{key}.")


def _keys(config: DictConfig, prefix: str = "") -> set[str]:
    """All dotted keys of a configuration."""
    keys = set()
    for key in map(str, config):
        path = f"{prefix}{key}"
        keys.add(path)
        if not OmegaConf.is_interpolation(config, key) and not OmegaConf.is_missing(config, key):
            child = config[key]
            if isinstance(child, DictConfig):
                keys |= _keys(child, f"{path}.")
    return keys


def quiet() -> None:
    """No bars while weights are read, and no advice that does not apply: loaders read a local buffer without workers.

    In a notebook call it before other imports, which have advice too.
    """
    warnings.filterwarnings("ignore", ".*IProgress not found.*")
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    warnings.filterwarnings("ignore", ".*Checkpoint directory .* exists and is not empty.*")
    warnings.filterwarnings("ignore", ".*module\\(s\\) in eval mode.*")  # the target, by design
    warnings.filterwarnings("ignore", ".*smaller than the logging interval.*")
    warnings.filterwarnings("ignore", ".*isinstance\\(treespec, LeafSpec\\).*")
    import transformers

    transformers.utils.logging.disable_progress_bar()
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.pytorch.accelerators.cuda"):
        logging.getLogger(name).setLevel(logging.WARNING)
