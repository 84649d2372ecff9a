"""What the losses over the full vocabulary cost: in chunks as here, and naively.

    python benchmarks/loss.py                                     # 4,096 positions, vocabulary 152 K
    python benchmarks/loss.py --positions 1024 --vocabulary 32000 --hidden 2048 --device cuda

Naively means: all logits of drafter and target at once, divergence, backward. Every case runs in a process of its own,
which reports its peak memory beyond what it held before, and the median seconds of value and gradient. On a GPU with
liger-kernel installed its cross entropy, which training then takes, is measured beside the chunked one. The results go
to a JSON file with machine and versions.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import torch
from machine import fresh_peak, held, keep, wait
from torch import Tensor, nn

from draftopd.losses import liger
from draftopd.losses.cross_entropy import CrossEntropy
from draftopd.losses.distilled import Distilled
from draftopd.losses.divergence import forward_kl, reverse_kl
from draftopd.replay.blocks import Blocks
from draftopd.targets.head import LMHead

RESULTS = Path(__file__).parent / "results" / "loss.json"
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
        student=states().requires_grad_(), teacher=states(), head=LMHead(head), proposals=tokens, labels=tokens,
        accepted=torch.zeros(count, dtype=torch.long, device=device), valid=every, recorded=every,
    )  # fmt: skip


def step_of(options: argparse.Namespace, blocks: Blocks) -> Callable[[], Tensor]:
    """Computes the loss; its caller takes the gradient."""
    if options.way != "naive":
        loss = CrossEntropy(gamma=1e9) if options.loss == "cross_entropy" else Distilled(accepted=LOSSES[options.loss])

        def of_package() -> Tensor:
            # The package takes liger's wherever it fits; the chunked one is measured by refusing it.
            with patch.object(liger, "fits", liger.fits if options.way == "liger" else lambda *_: False):
                return loss(blocks).loss

        return of_package
    head = blocks.head
    if options.loss == "cross_entropy":
        return lambda: nn.functional.cross_entropy(
            head.logits(blocks.draft_states).flatten(0, 1), blocks.labels.flatten()
        )
    divergence = LOSSES[options.loss]
    teacher = blocks.target_states.flatten(0, 1)
    return lambda: divergence(
        head.logits(blocks.draft_states).flatten(0, 1), head.logits(teacher).log_softmax(-1)
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--positions", type=int, default=4096)
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--loss", choices=LOSSES, help="only this one")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    if options.way:
        print(json.dumps(measure(options)))
        return
    found: dict[str, dict[str, dict[str, float]]] = {}
    for loss in [options.loss] if options.loss else LOSSES:
        found[loss] = {}
        for way in WAYS if loss == "cross_entropy" and options.device == "cuda" and liger.installed() else WAYS[:2]:
            command = [sys.executable, __file__, *sys.argv[1:], "--way", way, "--loss", loss]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            found[loss][way] = json.loads(done.stdout.splitlines()[-1])
        chunked, naive = found[loss]["chunked"], found[loss]["naive"]
        time_ratio, memory_ratio = (chunked[what] / naive[what] for what in ("seconds", "peak_mib"))
        print(
            f"{loss:14} chunked {chunked['seconds']:6.2f} s {chunked['peak_mib']:7.0f} MiB   "
            f"naive {naive['seconds']:6.2f} s {naive['peak_mib']:7.0f} MiB   "
            f"time x{time_ratio:.2f}, memory {memory_ratio:.1%}"
        )
        if fused := found[loss].get("liger"):
            print(f"{'':14} liger   {fused['seconds']:6.2f} s {fused['peak_mib']:7.0f} MiB")
    content = {"liger": liger.installed(), "losses": found}
    keep(options, content)


if __name__ == "__main__":
    main()
