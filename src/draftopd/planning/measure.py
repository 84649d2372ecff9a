"""The real peak of tensor memory of a training step on a CPU, by moment, to check the arithmetic against."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile, record_function

from draftopd.decoding.generate import Decoder
from draftopd.decoding.sampling import Sampling
from draftopd.drafters.base import Drafter
from draftopd.losses.base import Loss
from draftopd.metrics.agreement import slot_agreement
from draftopd.planning.sizes import Attention
from draftopd.replay.batch import ReplayBatch
from draftopd.replay.replay import replay
from draftopd.targets.target import Target
from draftopd.training.stopwatch import Stopwatch

_MARK = "moment:"


class _Marks(Stopwatch):
    """Marks replay's sections in the profile; the target's second one is the scoring."""

    def __init__(self) -> None:
        super().__init__()
        self.names = {"target": ["read", "score"], "drafter": ["draft"]}

    @contextmanager
    def __call__(self, section: str) -> Iterator[None]:
        with record_function(_MARK + self.names[section].pop(0)):
            yield


def step_peaks(
    target: Target,
    drafter: Drafter,
    batch: ReplayBatch,
    loss: Loss,
    autocast: bool = False,
    attention: Attention = "chunks",
    measured: bool = True,
) -> dict[str, int]:
    """Bytes that a first training step holds at most, in each of its moments, beyond what was held before it.

    Args:
        autocast: compute in bfloat16 where autocast does.
        attention: the kernel that attention is held to.
        measured: as at the steps that log how target and drafter agree.
    """
    marks = _Marks()
    kernel = sdpa_kernel(SDPBackend.MATH) if attention == "math" else nullcontext()

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast), kernel:
            blocks = replay(
                target, drafter, batch, Sampling(), frozenset(), teacher=loss.scope, clock=marks,
                measure=slot_agreement if measured else None,  # type: ignore[arg-type]
                propose=loss.uses_proposals,
            )  # fmt: skip
            with record_function(_MARK + "loss"):
                value = loss(blocks).loss
        del blocks
        with record_function(_MARK + "backward"):
            value.backward()

    return _peaks(step)


def decoding_peak(target: Target, drafter: Drafter, prompts: list[list[int]], max_new_tokens: int) -> int:
    """Bytes that decoding a batch holds at most, beyond what was held before."""
    decoder = Decoder(target, drafter, max_new_tokens=max_new_tokens)
    return _peaks(lambda: decoder.decode_batch(prompts))[""]


def _peaks(work: Callable[[], object]) -> dict[str, int]:
    """The most bytes held in each marked span, and under the empty name in all."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        work()
    spans: dict[str, tuple[int, int]] = {}
    changes: list[tuple[int, int]] = []
    for event in found.profiler.kineto_results.events():
        if event.name() == "[memory]":
            changes.append((event.start_ns(), event.nbytes()))
        elif event.name().startswith(_MARK):
            spans[event.name().removeprefix(_MARK)] = event.start_ns(), event.start_ns() + event.duration_ns()
    peaks, held = dict.fromkeys([*spans, ""], 0), 0
    for time, size in sorted(changes, key=lambda change: change[0]):
        held += size
        for name in ("", *(n for n, (begin, end) in spans.items() if begin <= time <= end)):
            peaks[name] = max(peaks[name], held)
    return peaks
