"""Training steps on the same batches with one row per sequence and with packed rows: time, padding and losses.

    python -m benchmarks.speed.packing
    python -m benchmarks.speed.packing --pack-to 512 1024 --batch-size 4

The stages are those of the configurations: `opd` (visited anchors, Draft-OPD's loss) and `sft` (random anchors, cross
entropy). A step is the batch's replay, its loss and the backward pass. All settings take turns on each batch. CPU
seconds are those of the process, over all threads; they are more reliable than the clock where other programs use the
machine. Results go to benchmarks/results/packing.json.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

from hydra.utils import instantiate
from omegaconf import OmegaConf

from benchmarks.common import ROOT, Pair, keep, pair_parser, show
from draftopd.decoding.sampling import Sampling
from draftopd.losses.base import Loss
from draftopd.replay.replay import replay
from draftopd.rollout.anchors import AnchorPolicy
from draftopd.rollout.buffer import BufferWriter
from draftopd.rollout.rollouts import SpeculativeRollout
from draftopd.training.loader import ReplayDataset, ReplayLoader, ReplaySampler

#: By stage: its loss, its anchors, and the maximum number of anchors per sequence.
STAGES = {"opd": ("asymmetric_kl", "visited", 64), "sft": ("cross_entropy", "random", 32)}


class Run:
    """One way of filling rows: its loader, and the measurements of its steps."""

    def __init__(self, buffer: Path, stage: str, slots: int, pack_to: int | None, options: argparse.Namespace) -> None:
        _, choice, limit = STAGES[stage]
        sampler = ReplaySampler(options.steps + 1, options.batch_size, seed=0)
        policy = AnchorPolicy(choice, limit, slots)  # type: ignore[arg-type]
        self.batches = iter(ReplayLoader(ReplayDataset(buffer), sampler, policy, pad=0, pack_to=pack_to))
        self.stage, self.pack_to = stage, pack_to
        self.seconds = self.cpu_seconds = 0.0
        self.tokens = self.positions = self.rows = 0
        self.losses: list[float] = []

    def step(self, pair: Pair, loss: Loss, counts: bool) -> None:
        """One training step without an optimizer; measured if it ``counts``."""
        batch = next(self.batches)
        pair.drafter.zero_grad()
        began, cpu_began = time.perf_counter(), time.process_time()
        blocks = replay(
            pair.target, pair.drafter, batch, Sampling(), pair.stop, loss.scope, propose=loss.uses_proposals
        )
        value = loss(blocks).loss
        value.backward()
        if counts:
            self.seconds += time.perf_counter() - began
            self.cpu_seconds += time.process_time() - cpu_began
            self.losses.append(float(value.detach()))
            self.tokens += int(batch.lengths.sum())
            self.positions += batch.ids.numel()
            self.rows += len(batch.ids)

    def result(self, unpacked: Run, steps: int) -> dict[str, Any]:
        """Means per step, and ratios to the run with one row per sequence."""
        return {
            "stage": self.stage,
            "pack_to": self.pack_to,
            "rows_per_batch": self.rows / steps,
            "padding": 1 - self.tokens / self.positions,
            "seconds": self.seconds / steps,
            "cpu_seconds": self.cpu_seconds / steps,
            "ratio": self.seconds / unpacked.seconds,
            "cpu_ratio": self.cpu_seconds / unpacked.cpu_seconds,
            "loss_difference": max(abs(a / b - 1) for a, b in zip(self.losses, unpacked.losses, strict=True)),
        }


def main() -> None:
    parser = pair_parser(__doc__, "packing.json", prompts=256)
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--pack-to", type=int, nargs="+", default=[512, 8192], help="tokens per packed row")
    parser.add_argument("--batch-size", type=int, default=16, help="sequences per step")
    parser.add_argument("--steps", type=int, default=16)
    options = parser.parse_args()
    pair = Pair.load(options)
    rows = []
    with tempfile.TemporaryDirectory() as name:
        buffer = Path(name) / "buffer"
        with BufferWriter(buffer, 0, 0) as writer:
            request = pair.request(pair.prompts(options.prompts, "train"), options.tokens)
            for batch in SpeculativeRollout(max_new_tokens=options.tokens).collect(request):
                writer.add(batch)
        for stage in options.stages:
            loss = instantiate(OmegaConf.load(ROOT / "configs" / "loss" / f"{STAGES[stage][0]}.yaml"))
            runs = [Run(buffer, stage, pair.drafter.num_proposals, n, options) for n in (None, *options.pack_to)]
            for number in range(options.steps + 1):
                for turn in range(len(runs)):
                    # The first step only warms up.
                    runs[(number + turn) % len(runs)].step(pair, loss, counts=number > 0)
            rows += [run.result(runs[0], options.steps) for run in runs]
    show(
        f"Steps of {options.batch_size} sequences, mean of {options.steps}",
        ("stage", "pack_to", "rows", "padding", "seconds", "ratio", "CPU s", "ratio", "loss differs by"),
        [
            (
                r["stage"], str(r["pack_to"]), f"{r['rows_per_batch']:.1f}", f"{r['padding']:.2%}",
                f"{r['seconds']:.3f}", f"x{r['ratio']:.3f}", f"{r['cpu_seconds']:.3f}", f"x{r['cpu_ratio']:.3f}",
                f"{r['loss_difference']:.1e}",
            )
            for r in rows
        ],
    )  # fmt: skip
    keep(options.results, options, {"rows": rows})


if __name__ == "__main__":
    main()
