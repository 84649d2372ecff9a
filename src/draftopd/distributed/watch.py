"""Ends the processes of a distributed run once one of them is lost: has died, was stopped, or cannot be reached.

What ranks do together waits for a lost one until the process group's timeout, which must leave room for rollouts of
unequal length. So each rank gives a sign of life every second, in the store through which the ranks met: a number that
it raises. The first rank looks after all others, these after the first.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from subprocess import Popen, TimeoutExpired
from types import FrameType
from typing import NoReturn

import lightning as L
import torch.distributed as dist
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.utilities.exceptions import SIGTERMException

from draftopd.errors import CONTINUES, ConfigError, RanksError

#: In the environment of the processes that the first rank starts: its process id.
_STARTED_BY = "DRAFTOPD_STARTED_BY"
#: Where Lightning tells that such a process ended, just before it kills them all and itself.
_OBSERVER = logging.getLogger("lightning.fabric.strategies.launchers.subprocess_script")
#: How long a process that fails may take to say why, in seconds.
_LAST_WORDS = 5.0


@contextmanager
def watched(trainer: L.Trainer, lost_after: float) -> Iterator[None]:
    """Around all that the ranks of a run do together; left by all of them at once.

    Where a rank is lost, the others end with exit status 1 and a message, within ``lost_after`` seconds and a few more.
    So do the processes that the first rank started, even stopped ones, and the first rank itself where it hangs.

    Args:
        trainer: not yet running.
        lost_after: seconds without a sign of life; the time that a rank was itself stopped for does not count.

    Raises:
        ConfigError: if this is not above 0.
        RanksError: in place of what a collective said, where it found the others gone.
    """
    if type(lost_after) not in (int, float) or lost_after <= 0:
        raise ConfigError(f"ranks.lost_after must be a number of seconds above 0, found {lost_after!r}.")
    if trainer.world_size == 1:
        yield
        return
    watch = _Watch(trainer, lost_after)
    watch.start()
    try:
        yield
        trainer.strategy.barrier()
    except RuntimeError as error:
        found = (
            f"{watch.ended() or _UNREACHED.format(_first_line(error))} {CONTINUES}" if _of_the_group(error) else None
        )
        watch.kill_others()
        if found is None:
            raise
        raise RanksError(found) from error
    except SIGTERMException:
        watch.leave()
        raise
    except BaseException:
        watch.kill_others()
        raise
    finally:
        watch.stop()


_FIRST_ENDED = "Rank 0, which started this process, has ended."
_UNREACHED = "Another process of this run ended, hangs or cannot be reached any more ({})."


def _first_line(error: RuntimeError) -> str:
    return str(error).splitlines()[0][:200]


def _of_the_group(error: RuntimeError) -> bool:
    """Whether a collective failed, not a computation."""
    return isinstance(error, dist.DistError) or "gloo" in str(error).lower()


class _Watch:
    def __init__(self, trainer: L.Trainer, lost_after: float) -> None:
        self.trainer, self.lost_after = trainer, lost_after
        self.period = min(1.0, lost_after / 8)
        self._done = threading.Event()
        self._silent: dict[int, float] = {}
        by_lightning = isinstance(getattr(trainer.strategy, "cluster_environment", None), LightningEnvironment)
        self._starter = int(os.environ.setdefault(_STARTED_BY, str(os.getpid()))) if by_lightning else os.getpid()

    def start(self) -> None:
        _OBSERVER.addFilter(self._observed)
        # Lightning's own handler has ranks do something together wherever the signal finds each of them: they hang.
        self.trainer._signal_connector._sigterm_notifier_fn = self._sigterm  # type: ignore[assignment,method-assign]
        for work in (self._beat, self._judge):
            threading.Thread(target=work, name=f"ranks-{work.__name__.strip('_')}", daemon=True).start()

    def stop(self) -> None:
        self._done.set()
        _OBSERVER.removeFilter(self._observed)

    def _sigterm(self, number: int, frame: FrameType | None) -> None:
        """Pass the signal on, and have all ranks end after the same step."""
        module = self.trainer.lightning_module
        if not module.stop_asked:
            module.stop_asked = True  # type: ignore[assignment]
            for process in self._started:
                process.send_signal(number)

    def leave(self) -> None:
        """After SIGTERM, which the others got too: give them some seconds to finish."""
        self._done.set()
        until = time.monotonic() + _LAST_WORDS
        for process in self._started:
            with suppress(TimeoutExpired):
                process.wait(max(0.0, until - time.monotonic()))
        self.kill_others()

    def ended(self) -> str:
        """Which process ended, as a sentence, once one has; empty where that is not seen within some seconds."""
        if self._orphaned:
            return _FIRST_ENDED
        until = time.monotonic() + _LAST_WORDS
        while self._started and time.monotonic() < until:
            for rank, process in enumerate(self._started, start=1):
                with suppress(TimeoutExpired):
                    if process.wait(self.period / len(self._started)):
                        return _how(rank, process)
        return ""

    @property
    def _started(self) -> list[Popen[bytes]]:
        return getattr(self.trainer.strategy.launcher, "procs", [])

    @property
    def _orphaned(self) -> bool:
        return self._starter != os.getpid() and os.getppid() != self._starter

    def _observed(self, record: logging.LogRecord) -> bool:
        for rank, process in enumerate(self._started, start=1):
            if process.returncode:
                self._end(_how(rank, process))
        return True

    def _beat(self) -> None:
        """Give signs of life, and take those of others; may itself hang, where the store's process does."""
        store, heard = None, dict[int, int]()
        while not self._done.wait(self.period):
            if not dist.is_initialized():
                continue
            rank = self.trainer.global_rank
            others = [0] if rank else range(1, self.trainer.world_size)
            for other in others:
                self._silent.setdefault(other, 0.0)
            try:
                if store is None:
                    place = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
                    store = dist.TCPStore(*place, is_master=False, timeout=timedelta(seconds=self.lost_after))
                store.add(f"draftopd/life/{rank}", 1)
                for other in others:
                    sign = store.add(f"draftopd/life/{other}", 0)
                    if sign != heard.get(other):
                        heard[other], self._silent[other] = sign, 0.0
            except dist.DistError:
                store = None

    def _judge(self) -> None:
        while not self._done.wait(self.period):
            if self._orphaned:
                self._end(_FIRST_ENDED)
            for rank in list(self._silent):
                # Counted in turns, so that a machine that slept takes none for lost.
                self._silent[rank] += self.period
                if self._silent[rank] > self.lost_after:
                    self._end(
                        f"Rank {rank} has given no sign of life for {self.lost_after:g} seconds (ranks.lost_after): it "
                        "was stopped or killed, or its machine or the network is down or overloaded."
                    )

    def _end(self, what: str) -> NoReturn:
        """End this process, whatever it waits for."""
        if self._done.is_set():
            sys.exit()  # this thread only: here Lightning's, which would kill all
        os.write(2, f"Error: {what} {CONTINUES}\n".encode())
        self.kill_others()
        os._exit(1)

    def kill_others(self) -> None:
        """End the processes started here, and the one that started this if it hangs."""
        for process in self._started:
            process.kill()
        if self._starter == os.getppid() and self._hangs(0):
            os.kill(self._starter, signal.SIGKILL)

    def _hangs(self, rank: int) -> bool:
        return self._silent.get(rank, 0.0) > self.lost_after


def _how(rank: int, process: Popen[bytes]) -> str:
    status = process.returncode
    if status > 0:
        return f"Rank {rank} (process {process.pid}) ended with status {status}; what it said stands above."
    return f"Rank {rank} (process {process.pid}) was killed by {signal.Signals(-status).name}" + (
        ", perhaps by the kernel for want of memory (dmesg tells)." if -status == signal.SIGKILL else "."
    )
