"""What SIGTERM does: a training step is finished and kept, all else ends at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from lightning.pytorch.utilities.exceptions import SIGTERMException


@contextmanager
def ends_at_once() -> Iterator[None]:
    """For work that nothing is kept of until it is whole, and that may take long: rollouts and validation.

    Raises:
        SIGTERMException: at SIGTERM, after the handler that stood before.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)

    def end(number: int, frame: FrameType | None) -> None:
        if callable(before):
            before(number, frame)
        raise SIGTERMException

    signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
