"""``train.py`` in a child process that writes a line to a file, the trace, for each thing that a script watches."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from benchmarks.common import ROOT


class Trace:
    """Writes the lines, from within the child process."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def tell(self, *words: object) -> None:
        """Write one line."""
        os.write(self._file, (" ".join(map(str, words)) + "\n").encode())

    def watch(
        self, method: str, before: Callable[..., object] | None = None, after: Callable[..., object] | None = None
    ) -> None:
        """Call functions before and after every call of a method or function, with its positional arguments.

        Args:
            method: ``module:Class.method`` or ``module:function``.
        """
        module, _, path = method.partition(":")
        owner, _, name = path.rpartition(".")
        kind: Any = importlib.import_module(module)
        kind = getattr(kind, owner) if owner else kind
        watched = getattr(kind, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            if before:
                before(*args)
            try:
                return watched(*args, **kwargs)
            finally:
                if after:
                    after(*args)

        setattr(kind, name, call)


def train(watch: Callable[[Trace], None]) -> None:
    """The child's whole work: the trace and the overrides are its arguments."""
    _, trace, *overrides = sys.argv
    watch(Trace(Path(trace)))
    # Lightning starts further ranks with the command that it reads here.
    sys.argv = [str(ROOT / "train.py"), *overrides]
    import train

    train.main()


def start(module: str, trace: Path, overrides: list[str], output: IO[str] | int) -> subprocess.Popen[str]:
    """Start ``train.py`` with these overrides, watched by the function ``watch`` of ``module``.

    Args:
        trace: begun anew.
        output: where the child's messages go.
    """
    trace.write_text("")
    # As -c and not -m: with -m Lightning would start further ranks with this module and not with train.py.
    code = f"from {module} import watch; from benchmarks.faults import traced; traced.train(watch)"
    return subprocess.Popen(
        [sys.executable, "-c", code, str(trace), *overrides], cwd=ROOT, stdout=output, stderr=subprocess.STDOUT,
        text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )  # fmt: skip


def events(trace: Path) -> list[list[str]]:
    """The words of each line so far."""
    return [line.split() for line in trace.read_text().splitlines()] if trace.exists() else []
