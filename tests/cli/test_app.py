"""How the commands' processes end."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

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


ENDED = "import sys; from draftopd.cli import app; print('said'); app._leave(0)"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_output_that_could_not_be_written_is_told() -> None:
    command, env = [sys.executable, "-c", ENDED], {**os.environ, "PYTHONUNBUFFERED": ""}
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, env=env, timeout=60, check=False)
    assert done.returncode == 1 and "could not be written: [Errno 28]" in done.stderr


def test_streams_may_be_closed() -> None:
    done = subprocess.run(["sh", "-c", 'exec "$0" -c "$1" >&- 2>&-', sys.executable, ENDED], timeout=60, check=False)
    assert done.returncode == 0


def test_a_profiler_has_its_turn(tmp_path: Path) -> None:
    (tmp_path / "ends.py").write_text(ENDED)
    command = [sys.executable, "-m", "cProfile", "-o", str(tmp_path / "profile"), str(tmp_path / "ends.py")]
    assert subprocess.run(command, capture_output=True, timeout=60, check=False).returncode == 0
    assert (tmp_path / "profile").stat().st_size > 0
