"""How the commands' processes end."""

from __future__ import annotations

import subprocess
import sys

import pytest

SCRIPT = """
import atexit, threading, time
from draftopd.cli import app

class Slow:
    def __del__(self):
        time.sleep(120)

slow = Slow()
threading.Thread(target=lambda: (time.sleep(0.1), print("thread"))).start()
atexit.register(print, "handler")
app._leave({code!r})
"""


@pytest.mark.parametrize(
    ("code", "status", "said"), [(None, 0, ""), (0, 0, ""), (143, 143, ""), ("Stopped.", 1, "Stopped.\n")]
)
def test_threads_and_exit_handlers_are_waited_for_and_finalizers_are_not(
    code: str | int | None, status: int, said: str
) -> None:
    command = [sys.executable, "-c", SCRIPT.format(code=code)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr, done.stdout) == (status, said, "thread\nhandler\n")
