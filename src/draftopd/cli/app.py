"""The commands ``train`` and ``eval`` around Hydra: errors without tracebacks, heavy imports as late as possible."""

from __future__ import annotations

import atexit
import errno
import os
import signal
import sys
import threading
from collections.abc import Callable
from contextlib import nullcontext
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from draftopd.errors import CONTINUES, DraftOPDError

if TYPE_CHECKING:
    from omegaconf import DictConfig


def configs() -> Path:
    """The directory of the configurations: in the installed package, or beside the sources in a checkout."""
    installed = Path(__file__).parents[1] / "configs"
    return installed if installed.is_dir() else Path(__file__).parents[3] / "configs"


def run(name: str, arguments: list[str] | None = None) -> NoReturn:
    """Run ``train`` or ``eval`` and end the process. A wrong option or key ends it with the nearest valid name.

    Args:
        arguments: overrides and Hydra's flags; by default those of the process.
    """
    given = sys.argv[1:] if arguments is None else arguments
    if given in (["--help"], ["-h"]):
        print(help_page(configs(), name))
        sys.exit()
    import hydra

    from draftopd.cli.overrides import foreseen

    problem = foreseen(configs(), name, given)
    if problem:
        sys.exit(f"Error: {problem}")
    whole = sys.argv

    def task(config: DictConfig) -> None:
        sys.argv = whole  # with the verb: Lightning starts the other processes of a run with the same command
        room = "draftopd.cli.training" if name == "train" else "draftopd.cli.evaluation"
        guarded(lambda checked: import_module(room).run(checked), config)

    task.__module__ = name  # Hydra names the job, and thereby its log file, after the module
    sys.argv = [whole[0], *given]
    try:
        hydra.main(version_base="1.3", config_path=str(configs()), config_name=name)(task)()
    except SystemExit as ended:
        _leave(ended.code)
    _leave(None)


def help_page(configs: Path, name: str) -> str:
    """The page that ``--help`` prints. Hydra would make the same page, but takes a second to list the groups."""
    from omegaconf import OmegaConf

    page = OmegaConf.create({"hydra": {"help": OmegaConf.load(configs / "hydra" / "help" / f"{name}.yaml")}})
    options: dict[str, list[str]] = {}
    for path in sorted(configs.glob("*/**/*.yaml")):
        options.setdefault(path.parent.relative_to(configs).as_posix(), []).append(path.stem)
    del options["hydra/help"]
    groups = "".join(f"{group}: {', '.join(names)}\n" for group, names in sorted(options.items()))
    return str(page.hydra.help.template).replace("$APP_CONFIG_GROUPS", groups)


def _leave(code: str | int | None) -> NoReturn:
    """End the process as ``sys.exit(code)`` does, but leave its memory to the system.

    The interpreter would free torch object by object, which takes seconds after the last message. Under a profiler,
    which writes at the end, the interpreter ends as usual.
    """
    if sys.getprofile() is not None:
        sys.exit(code)
    if isinstance(code, str):
        print(code, file=sys.stderr)
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]  # waits for threads, as the interpreter does
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:  # None: closed before the command began
                stream.flush()
        except OSError as error:
            code = code or 1
            if error.errno != errno.EPIPE and stream is not sys.stderr:  # EPIPE: the reader has ended
                print(f"Error: the output could not be written: {error}", file=sys.stderr)
    os._exit(code or 0)


#: Errors of a disk that cannot be written.
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)


def guarded(action: Callable[[DictConfig], None], config: DictConfig) -> None:
    """Run a command; an error the user can act on is printed as one message, with exit status 1."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.errors import InstantiationException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    from draftopd.cli.check import check
    from draftopd.distributed.ranks import is_first
    from draftopd.io.files import locked

    try:
        check(OmegaConf.to_container(config, resolve=True))
        # The first process of a run locks its directory for all; a plan has no directory.
        kept = HydraConfig.initialized() and is_first()
        with locked(Path(HydraConfig.get().runtime.output_dir)) if kept else nullcontext():
            action(config)
    except OmegaConfBaseException as error:
        sys.exit(f"Error: {str(error).splitlines()[0]}")
    except InstantiationException as error:
        # A part refused its arguments; users need its message without Hydra's wrapping.
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
