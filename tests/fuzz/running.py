"""One mutation and what came of it."""

from __future__ import annotations

import resource
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from draftopd.errors import DraftOPDError
from tests.fuzz.subjects import Subject

#: One mutation takes no longer, in seconds, and no more memory, in bytes.
SECONDS, BYTES = 10, 512 * 2**20


class Hang(BaseException):
    """It took too long. No Exception, so that nothing mistakes it for a fault of the input."""


@contextmanager
def limited(seconds: int) -> Iterator[None]:
    def late(*_: object) -> None:
        raise Hang(f"more than {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def outcome(subject: Subject, data: bytes) -> str:
    """``read`` or ``refused``.

    Raises:
        AssertionError: if it took too much memory.
        BaseException: whatever else than a refusal the subject raised, hangs included.
    """
    before = _peak()
    try:
        with limited(SECONDS):
            subject.read(data)
        found = "read"
    except (DraftOPDError, *subject.refusals):
        found = "refused"
    assert _peak() - before < BYTES, f"took {_peak() - before} bytes"
    return found


def _peak() -> int:
    """The most memory this process ever held, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
