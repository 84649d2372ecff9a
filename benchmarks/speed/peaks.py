"""The real peak of tensor memory of a training step on a CPU, by moment, to check the arithmetic against."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile, record_function

from draftopd.decoding.generate import Decoder
from draftopd.decoding.rules import Rules
from draftopd.drafters.base import Drafter
from draftopd.losses.base import Loss
from draftopd.metrics.agreement import slot_agreement
from draftopd.planning.sizes import Attention
from draftopd.replay.batch import ReplayBatch
from draftopd.replay.blocks import Blocks
from draftopd.replay.replay import draft, read
from draftopd.targets.target import Target

_MARK = "moment:"


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
    kernel = sdpa_kernel(SDPBackend.MATH) if attention == "math" else nullcontext()

    def replayed() -> Blocks:
        scope = loss.scope
        with record_function(_MARK + "read"):
            reading = read(target, batch, states=scope != "none" or measured)
        with record_function(_MARK + "draft"):
            propose = loss.uses_proposals or scope != "none" or measured
            forced = scope in ("recorded", "none")
            drafts = draft(target, drafter, reading, batch, Rules(), forced=forced, propose=propose)
        with record_function(_MARK + "score"):
            blocks = drafts.blocks(scope)
            scored = drafts.scored() if measured else None
        if scored is not None:
            with record_function(_MARK + "measure"):
                slot_agreement(scored)
        return blocks

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast), kernel:
            blocks = replayed()
            with record_function(_MARK + "loss"):
                value = loss(blocks).loss
        del blocks
        with record_function(_MARK + "backward"):
            value.backward()

    return _peaks(step)


def decoding_peak(target: Target, drafter: Drafter, prompts: list[list[int]], max_new_tokens: int) -> int:
    """Bytes that decoding a batch holds at most, beyond what was held before."""
    decoder = Decoder(target, drafter, Rules(max_new_tokens=max_new_tokens))
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
