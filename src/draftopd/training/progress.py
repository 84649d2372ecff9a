"""The rollout's progress bar."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


@contextmanager
def rollout_progress(prompts: int, label: str = "Rollout") -> Iterator[Callable[[int, int], None]]:
    """A bar over prompts with prompts and tokens per second and the time left; yields ``advance(prompts, tokens)``."""
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, transient=True) as progress:
        task = progress.add_task(label, total=prompts, rate="")
        tokens = 0

        def advance(done: int, more: int) -> None:
            nonlocal tokens
            tokens += more
            elapsed = progress.tasks[0].elapsed or 0
            prompts_done = progress.tasks[0].completed + done
            rate = f"{prompts_done / elapsed:.1f} prompts/s, {tokens / elapsed:.0f} tok/s" if elapsed else ""
            progress.update(task, advance=done, rate=rate)

        yield advance
