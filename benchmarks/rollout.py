"""Tokens a second of rollouts, as a refresh of the anchors runs them: through the engines, into the buffer on disk.

    python benchmarks/rollout.py
    python benchmarks/rollout.py --target DIR --drafter DIR --device cuda --dtype bfloat16 --batch-sizes 1 64

- speculative: decoding with the drafter (`rollout=speculative`);
- target: plain decoding, its texts kept in a store (`rollout=target trajectories.drafted=false`);
- decode_free: anchors on texts that the store already has (`rollout=decode_free`).

Tokens are those of the responses. Seconds are split into decoding, finding anchors, reading or writing the store of
texts, and writing the buffer. The three take turns. `decode_free.py` compares the anchors themselves, and times the
walk alone. Results go to benchmarks/results/rollout.json.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
from machine import keep
from rich.console import Console
from rich.table import Table

from draftopd.data.prompts import PromptEncoder, ReasoningPrompts
from draftopd.drafters.base import Drafter
from draftopd.drafters.load import load_for
from draftopd.rollout.buffer import AnchorBuffer, BufferWriter, Recorded
from draftopd.rollout.request import Request, Trajectory
from draftopd.rollout.rollouts import DecodeFreeRollout, Rollout, SpeculativeRollout, TargetRollout
from draftopd.rollout.trajectories import InProcessTrajectories
from draftopd.targets.load import load_target, load_tokenizer, stop_tokens
from draftopd.targets.target import Target
from draftopd.training.stopwatch import Stopwatch

RESULTS = Path(__file__).parent / "results" / "rollout.json"
ENGINES = ("speculative", "target", "decode_free")
PARTS = ("decode", "anchors", "texts", "buffer")


class TimedTexts(InProcessTrajectories):
    """Plain decoding on the clock."""

    def __init__(self, clock: Stopwatch, store: Path, batch_size: int) -> None:
        super().__init__(str(store), batch_size, drafted=False)
        self.clock = clock

    def generate(self, request: Request, prompts: list[list[int]]) -> Iterator[list[Trajectory]]:
        batches = super().generate(request, prompts)
        while True:
            with self.clock("decode"):
                batch = next(batches, None)
            if batch is None:
                return
            yield batch


class TimedWalk(DecodeFreeRollout):
    """Anchors found on the clock."""

    def __init__(self, clock: Stopwatch, trajectories: InProcessTrajectories, batch_size: int, limit: int) -> None:
        super().__init__(trajectories, batch_size, limit)
        self.clock = clock

    def anchored(self, target: Target, drafter: Drafter, records: Sequence[Recorded], seed: int) -> list[Recorded]:
        with self.clock("anchors"):
            return super().anchored(target, drafter, records, seed)


def refresh(rollout: Rollout, request: Request, root: Path, clock: Stopwatch, rest: str) -> tuple[int, float]:
    """Roll out into a buffer; response tokens, and seconds in all. What no other part of the clock has is `rest`'s."""
    began = time.perf_counter()
    tokens = 0
    with clock("whole"), BufferWriter(root, 0, 0) as writer:
        for batch in rollout.collect(request):
            tokens += sum(len(record.tokens) - record.prompt_length for record in batch)
            with clock("buffer"):
                writer.add(batch)
        written = time.perf_counter()
    # Leaving the writer has put the last shard and the manifest on the disk.
    clock.seconds["buffer"] += time.perf_counter() - written
    known = sum(clock.seconds[part] for part in PARTS if part != rest)
    clock.seconds[rest] = clock.seconds.pop("whole") - known
    return tokens, time.perf_counter() - began


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    target = load_target(options.target, dtype=options.dtype, device=options.device)
    tokenizer = load_tokenizer(options.target)
    drafter = load_for(target, options.drafter).to(target.device).eval()
    target.tap(drafter.target_layer_ids)
    every = PromptEncoder(tokenizer).take(ReasoningPrompts("validation"), range(options.prompts))
    limit, stop = options.tokens, stop_tokens(target, tokenizer)

    with tempfile.TemporaryDirectory() as name:
        place = Path(name)

        def measured(engine: str, size: int, prompts: list[list[int]]) -> dict[str, float]:
            """Tokens a second of one refresh, its parts in seconds, tau of its anchors (0 without)."""
            clock = Stopwatch()
            with tempfile.TemporaryDirectory(dir=place) as fresh:
                rollout: Rollout
                if engine == "speculative":
                    rollout, rest = SpeculativeRollout(size, limit), "decode"
                elif engine == "target":
                    rollout, rest = TargetRollout(TimedTexts(clock, Path(fresh) / "texts", size), limit), "texts"
                else:
                    texts = InProcessTrajectories(str(place / "texts"))
                    rollout, rest = TimedWalk(clock, texts, size, limit), "texts"
                request = Request(
                    target, drafter, tokenizer, partial(list, prompts), range(len(prompts)), stop, rollout.sampling,
                    limit, 512, seed=0,
                )  # fmt: skip
                tokens, seconds = refresh(rollout, request, Path(fresh) / "anchors", clock, rest)
                tau = AnchorBuffer.latest(Path(fresh) / "anchors").manifest.tau if rollout.records_anchors else 0.0
            return {"tokens": tokens, "rate": tokens / seconds, "seconds": seconds, "tau": tau, **clock.seconds}

        measured("decode_free", 64, every)  # the store of texts, made once
        rounds: dict[tuple[int, str], list[dict[str, float]]] = {}
        for number in range(options.rounds + 1):
            for size in options.batch_sizes:
                prompts = every[: options.prompts_at_batch_1] if size == 1 else every
                for engine in ENGINES if number % 2 else reversed(ENGINES):
                    found = measured(engine, size, prompts if number else prompts[: 2 * size])
                    if number:  # the first, shorter, warms up
                        rounds.setdefault((size, engine), []).append(found)
    rows = [
        {"batch_size": size, "engine": engine, "rate": statistics.median(f["rate"] for f in rounds[size, engine])}
        | {part: statistics.median(f.get(part, 0.0) for f in rounds[size, engine]) for part in ("seconds", *PARTS)}
        | {"tokens": rounds[size, engine][0]["tokens"], "tau": rounds[size, engine][0]["tau"]}
        for size in options.batch_sizes
        for engine in ENGINES
    ]
    report(rows)
    content = {
        "rows": rows,
        "rates": {f"{engine}, batch {size}": [f["rate"] for f in found] for (size, engine), found in rounds.items()},
    }
    keep(options, content)


def report(rows: list[dict]) -> None:
    table = Table(title="Rollouts: tokens a second, and where the time goes (medians)", title_justify="left")
    for heading in ("batch", "engine", "tokens/s", "tokens", *PARTS):
        table.add_column(heading, justify="left" if heading == "engine" else "right")
    for row in rows:
        shares = [f"{row[part] / row['seconds']:.1%}" for part in PARTS]
        table.add_row(str(row["batch_size"]), row["engine"], f"{row['rate']:,.0f}", f"{row['tokens']:,}", *shares)
    Console().print(table)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="bundled:tiny_target", help="directory in Hugging Face layout")
    parser.add_argument("--drafter", default="bundled:tiny_dflash", help="directory of a drafter's checkpoint")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default=None)
    parser.add_argument("--prompts", type=int, default=128)
    parser.add_argument("--prompts-at-batch-1", type=int, default=32, help="fewer, where decoding is slowest")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8, 32, 64])
    parser.add_argument("--tokens", type=int, default=256, help="response limit")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--results", type=Path, default=RESULTS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
