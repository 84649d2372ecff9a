"""Time and memory of the losses over the full vocabulary, computed in chunks and naively.

    python -m benchmarks.speed.loss                                     # 4,096 positions, vocabulary 152 K
    python -m benchmarks.speed.loss --positions 1024 --vocabulary 32000 --hidden 2048 --device cuda

The naive way computes all logits of drafter and target at once, then the divergence and its gradient. Every case runs
in a process of its own, which reports its peak memory beyond what it held before, and the median seconds of value and
gradient. On a GPU with liger-kernel installed, liger's cross entropy, which training then uses, is measured too.
Results go to benchmarks/results/loss.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from benchmarks.common import case, keep, parser
from benchmarks.speed.device import fresh_peak, held, wait
from draftopd.losses import liger
from draftopd.losses.cross_entropy import CrossEntropy
from draftopd.losses.distilled import Distilled
from draftopd.losses.divergence import forward_kl, reverse_kl
from draftopd.replay.blocks import Blocks
from draftopd.targets.head import LMHead

LOSSES = {"forward_kl": forward_kl, "reverse_kl": reverse_kl, "cross_entropy": None}
WAYS = ("chunked", "naive", "liger")
SLOTS = 8


def blocks_of(options: argparse.Namespace) -> Blocks:
    """Random states under a frozen head, the same in every process."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    device, dtype = options.device, getattr(torch, options.dtype)
    count = options.positions // SLOTS

    def states() -> Tensor:
        return torch.randn(count, SLOTS, options.hidden, generator=generator).to(device, dtype)

    head = nn.Linear(options.hidden, options.vocabulary, bias=False, device=device, dtype=dtype).requires_grad_(False)
    tokens = torch.randint(options.vocabulary, (count, SLOTS), generator=generator).to(device)
    every = torch.ones(count, SLOTS, dtype=torch.bool, device=device)
    return Blocks(
        draft_states=states().requires_grad_(), target_states=states(), head=LMHead(head), proposals=tokens,
        labels=tokens, accepted=torch.zeros(count, dtype=torch.long, device=device), valid=every, recorded=every,
    )  # fmt: skip


def step_of(options: argparse.Namespace, blocks: Blocks) -> Callable[[], Tensor]:
    """A function that computes the loss; its caller computes the gradient."""
    if options.way != "naive":
        loss = CrossEntropy(gamma=1e9) if options.loss == "cross_entropy" else Distilled(accepted=LOSSES[options.loss])

        def of_package() -> Tensor:
            # The package uses liger's wherever it fits, so the chunked one is measured by refusing it.
            with patch.object(liger, "fits", liger.fits if options.way == "liger" else lambda *_: False):
                return loss(blocks).loss

        return of_package
    head = blocks.head
    if options.loss == "cross_entropy":
        return lambda: nn.functional.cross_entropy(
            head.logits(blocks.draft_states).flatten(0, 1), blocks.labels.flatten()
        )
    divergence = LOSSES[options.loss]
    scored = blocks.target_states.flatten(0, 1)
    return lambda: divergence(
        head.logits(blocks.draft_states).flatten(0, 1), head.logits(scored).log_softmax(-1)
    ).mean()


def measure(options: argparse.Namespace) -> dict[str, float]:
    """Seconds and peak memory of one case, in this process."""
    blocks = blocks_of(options)
    step, before, seconds = step_of(options, blocks), fresh_peak(options.device), []
    for number in range(options.rounds + 1):
        blocks.draft_states.grad = None
        began = time.perf_counter()
        value = step()
        value.backward()
        wait(options.device)
        if number:  # the first warms up
            seconds.append(time.perf_counter() - began)
    gradient = blocks.draft_states.grad
    assert gradient is not None
    return {
        "seconds": statistics.median(seconds),
        "peak_mib": (held(options.device) - before) / 2**20,
        "value": float(value.detach()),
        "gradient_norm": float(gradient.float().norm()),
    }


def compare(options: argparse.Namespace, arguments: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Measurements by loss and way, each case in a process of its own.

    Args:
        arguments: those that ``options`` were parsed from.
    """
    found: dict[str, dict[str, Any]] = {}
    for loss in [options.loss] if options.loss else LOSSES:
        ways = WAYS if loss == "cross_entropy" and options.device == "cuda" and liger.installed() else WAYS[:2]
        found[loss] = {
            way: case([*arguments, "--way", way, "--loss", loss], "benchmarks.speed.loss") for way in ways
        }  # fmt: skip
    return found


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    made = parser(__doc__, "loss.json")
    made.add_argument("--positions", type=int, default=4096)
    made.add_argument("--vocabulary", type=int, default=151_936)
    made.add_argument("--hidden", type=int, default=256)
    made.add_argument("--device", default="cpu")
    made.add_argument("--dtype", default="float32")
    made.add_argument("--rounds", type=int, default=3)
    made.add_argument("--loss", choices=LOSSES, help="only this one")
    made.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    return made.parse_args(arguments)


def main() -> None:
    options = parse(sys.argv[1:])
    if options.way:
        print(json.dumps(measure(options)))
        return
    found = compare(options, sys.argv[1:])
    for loss, ways in found.items():
        chunked, naive = ways["chunked"], ways["naive"]
        time_ratio, memory_ratio = (chunked[what] / naive[what] for what in ("seconds", "peak_mib"))
        print(loss, f"(chunked over naive: time x{time_ratio:.2f}, memory {memory_ratio:.1%})")
        for way, measured in ways.items():
            print(f"  {way:8} {measured['seconds']:6.2f} s {measured['peak_mib']:7.0f} MiB")
    keep(options.results, options, {"liger": liger.installed(), "losses": found})


if __name__ == "__main__":
    main()
