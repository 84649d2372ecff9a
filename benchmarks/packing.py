"""Time training steps on the same batches with a row a sequence and packed, and compare padding and losses.

    python benchmarks/packing.py
    python benchmarks/packing.py --pack-to 512 1024 --batch-size 4

The stages are those of the configurations: `opd` (visited anchors, Draft-OPD's loss) and `sft` (random anchors, cross
entropy). A step is the batch's replay, its loss and the backward pass; each batch is taken by every setting in turns.
CPU seconds are the process's own, over all threads: they tell more than the clock where others use the machine.
Results go to benchmarks/results/packing.json.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from machine import arguments, describe
from rich.console import Console
from rich.table import Table

from draftopd.data.prompts import PromptEncoder, ReasoningPrompts
from draftopd.decoding.sampling import Sampling
from draftopd.drafters.base import Drafter
from draftopd.drafters.load import load_drafter
from draftopd.losses.base import Loss
from draftopd.replay.replay import replay
from draftopd.rollout.anchors import AnchorPolicy
from draftopd.rollout.buffer import BufferWriter
from draftopd.rollout.request import Request
from draftopd.rollout.rollouts import DecodeFreeRollout
from draftopd.rollout.trajectories import InProcessTrajectories
from draftopd.targets.load import load_target, load_tokenizer, stop_tokens
from draftopd.targets.target import Target
from draftopd.training.loader import ReplayDataset, ReplayLoader, ReplaySampler

#: By stage: its loss, its anchors, and how many of a sequence.
STAGES = {"opd": ("sharp_kl", "visited", 64), "sft": ("cross_entropy", "random", 32)}


class Run:
    """One way of filling rows: its loader, and what its steps came to."""

    def __init__(self, buffer: Path, stage: str, slots: int, pack_to: int | None, options: argparse.Namespace) -> None:
        _, choice, limit = STAGES[stage]
        sampler = ReplaySampler(options.steps + 1, options.batch_size, seed=0)
        policy = AnchorPolicy(choice, limit, slots)  # type: ignore[arg-type]
        self.batches = iter(ReplayLoader(ReplayDataset(buffer), sampler, policy, pad=0, pack_to=pack_to))
        self.stage, self.pack_to = stage, pack_to
        self.seconds = self.cpu_seconds = 0.0
        self.tokens = self.places = self.rows = 0
        self.losses: list[float] = []

    def step(self, target: Target, drafter: Drafter, loss: Loss, stop: frozenset[int], counts: bool) -> None:
        batch = next(self.batches)
        drafter.zero_grad()
        began, cpu_began = time.perf_counter(), time.process_time()
        blocks = replay(target, drafter, batch, Sampling(), stop, loss.scope, propose=loss.uses_proposals)
        value = loss(blocks).loss
        value.backward()
        if counts:
            self.seconds += time.perf_counter() - began
            self.cpu_seconds += time.process_time() - cpu_began
            self.losses.append(float(value.detach()))
            self.tokens += int(batch.lengths.sum())
            self.places += batch.ids.numel()
            self.rows += len(batch.ids)


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    target, tokenizer = load_target(options.target, dtype="float32"), load_tokenizer(options.target)
    drafter = load_drafter(options.drafter, target.num_layers)
    target.tap(drafter.target_layer_ids)
    stop = stop_tokens(target, tokenizer)
    prompts = PromptEncoder(tokenizer).take(ReasoningPrompts("train"), range(options.prompts))
    rows = []
    with tempfile.TemporaryDirectory() as place:
        buffer = Path(place) / "buffer"
        rollout = DecodeFreeRollout(InProcessTrajectories(f"{place}/texts"), max_new_tokens=options.max_new_tokens)
        request = Request(
            target, drafter, tokenizer, lambda: prompts, range(len(prompts)), stop, Sampling(),
            options.max_new_tokens, 512, seed=0,
        )  # fmt: skip
        with BufferWriter(buffer, 0, 0) as writer:
            for batch in rollout.collect(request):
                writer.add(batch)
        for stage in options.stages:
            with initialize_config_dir(str(Path(__file__).resolve().parents[1] / "configs"), version_base="1.3"):
                loss = instantiate(compose("train", [f"loss={STAGES[stage][0]}"]).loss)
            runs = [Run(buffer, stage, drafter.num_proposals, n, options) for n in (None, *options.pack_to)]
            for number in range(options.steps + 1):
                for turn in range(len(runs)):
                    # The first step only warms up.
                    runs[(number + turn) % len(runs)].step(target, drafter, loss, stop, counts=number > 0)
            rows += [result(run, runs[0], options) for run in runs]
    report(rows, options)


def result(run: Run, plain: Run, options: argparse.Namespace) -> dict[str, object]:
    return {
        "stage": run.stage,
        "pack_to": run.pack_to,
        "rows_a_batch": run.rows / options.steps,
        "padding": 1 - run.tokens / run.places,
        "seconds": run.seconds / options.steps,
        "cpu_seconds": run.cpu_seconds / options.steps,
        "ratio": run.seconds / plain.seconds,
        "cpu_ratio": run.cpu_seconds / plain.cpu_seconds,
        "loss_difference": max(abs(a / b - 1) for a, b in zip(run.losses, plain.losses, strict=True)),
    }


def report(rows: list[dict], options: argparse.Namespace) -> None:
    table = Table(title=f"Steps of {options.batch_size} sequences, mean of {options.steps}", title_justify="left")
    for heading in ("stage", "pack_to", "rows", "padding", "seconds", "ratio", "CPU s", "ratio", "loss differs by"):
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(
            row["stage"], str(row["pack_to"]), f"{row['rows_a_batch']:.1f}", f"{row['padding']:.2%}",
            f"{row['seconds']:.3f}", f"x{row['ratio']:.3f}",
            f"{row['cpu_seconds']:.3f}", f"x{row['cpu_ratio']:.3f}", f"{row['loss_difference']:.1e}",
        )  # fmt: skip
    Console().print(table)
    path = options.results
    path.write_text(json.dumps({**describe(), "options": arguments(options), "rows": rows}, indent=2) + "\n")
    Console().print(f"kept in {path}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="bundled:tiny_target", help="directory in Hugging Face layout")
    parser.add_argument("--drafter", default="bundled:tiny_dflash", help="directory of a drafter's checkpoint")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--pack-to", type=int, nargs="+", default=[512, 8192])
    parser.add_argument("--prompts", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results" / "packing.json")
    return parser.parse_args()


if __name__ == "__main__":
    main()
