"""Tokens per second of rollouts as a refresh of the anchors runs them, into the buffer on disk; and their anchors.

    python -m benchmarks.speed.rollout
    python -m benchmarks.speed.rollout --target DIR --drafter DIR --device cuda --dtype bfloat16 --batch-sizes 1 64

- speculative: decoding with the drafter (`rollout=speculative`);
- target: plain decoding, whose texts go into a store (`rollout=target trajectories.drafted=false`);
- decode_free: anchors on texts that the store already holds (`rollout=decode_free`).

Tokens are those of the responses. Seconds are split into decoding, finding anchors, reading or writing the store of
texts, and writing the buffer. The three take turns on the same prompts. `identical` counts the texts for which
decode_free found the anchors, accepted lengths and emitted counts of speculative decoding; above temperature 0 both
draw, so that they differ. Results go to benchmarks/results/rollout.json.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks.common import Pair, keep, pair_parser, show
from draftopd.drafters.base import Drafter
from draftopd.rollout.buffer import AnchorBuffer, BufferWriter, Recorded
from draftopd.rollout.request import Request, Trajectory
from draftopd.rollout.rollouts import DecodeFreeRollout, Rollout, SpeculativeRollout, TargetRollout
from draftopd.rollout.trajectories import InProcessTrajectories
from draftopd.targets.target import Target
from draftopd.training.stopwatch import Stopwatch

#: By engine: the part that is not timed by itself, and gets the rest of the time.
ENGINES = {"speculative": "decode", "target": "texts", "decode_free": "texts"}
PARTS = ("decode", "anchors", "texts", "buffer")


class TimedTexts(InProcessTrajectories):
    """Plain decoding, timed."""

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
    """Finding anchors without decoding, timed."""

    clock: Stopwatch

    def anchored(self, target: Target, drafter: Drafter, records: Sequence[Recorded], seed: int) -> list[Recorded]:
        with self.clock("anchors"):
            return super().anchored(target, drafter, records, seed)


class Refresh(NamedTuple):
    """One timed rollout: its figures, and its records by their tokens."""

    figures: dict[str, float]
    records: dict[tuple[int, ...], Recorded]


def rollout_of(
    engine: str, clock: Stopwatch, size: int, texts: Path, fresh: Path, options: argparse.Namespace
) -> Rollout:
    """An engine that decodes into ``fresh`` or reads the store ``texts``."""
    limit, temperature = options.tokens, options.temperature
    if engine == "speculative":
        return SpeculativeRollout(size, limit, temperature)
    if engine == "target":
        return TargetRollout(TimedTexts(clock, fresh / "texts", size), limit, temperature)
    store = InProcessTrajectories(str(texts))
    walk = TimedWalk(store, size, limit, temperature, parallel_below=options.parallel_below)
    walk.clock = clock
    return walk


def refresh(
    engine: str, pair: Pair, prompts: list[list[int]], size: int, place: Path, options: argparse.Namespace
) -> Refresh:
    """Roll out once into a new buffer: tokens, tokens per second, seconds by part, tau of the anchors (0 without)."""
    clock, records = Stopwatch(), []
    with tempfile.TemporaryDirectory(dir=place) as name:
        fresh = Path(name)
        rollout = rollout_of(engine, clock, size, place / "texts", fresh, options)
        request = pair.request(prompts, options.tokens, rollout.sampling)
        began = time.perf_counter()
        with clock("whole"), BufferWriter(fresh / "anchors", 0, 0) as writer:
            for batch in rollout.collect(request):
                records += batch
                with clock("buffer"):
                    writer.add(batch)
            written = time.perf_counter()
        # Leaving the writer has put the last shard and the manifest on the disk.
        clock.seconds["buffer"] += time.perf_counter() - written
        seconds = time.perf_counter() - began
        rest = ENGINES[engine]
        clock.seconds[rest] = clock.seconds.pop("whole") - sum(clock.seconds[part] for part in PARTS if part != rest)
        tau = AnchorBuffer.latest(fresh / "anchors").manifest.tau if rollout.records_anchors else 0.0
    tokens = sum(len(record.tokens) - record.prompt_length for record in records)
    figures = {"tokens": tokens, "rate": tokens / seconds, "seconds": seconds, "tau": tau, **clock.seconds}
    return Refresh(figures, {tuple(record.tokens): record for record in records})


def row(size: int, engine: str, found: list[Refresh], speculative: Refresh) -> dict[str, object]:
    """The medians over rounds."""
    figures = [refresh.figures for refresh in found]
    whole: dict[str, object] = {"batch_size": size, "engine": engine}
    whole |= {
        name: statistics.median(f.get(name, 0.0) for f in figures) for name in ("rate", "seconds", *PARTS)
    }  # fmt: skip
    whole |= {"tokens": figures[0]["tokens"], "prompts": len(found[0].records), "tau": figures[0]["tau"]}
    if engine == "decode_free":
        whole["identical"] = sum(found[-1].records.get(k) == record for k, record in speculative.records.items())
    return whole


def main() -> None:
    parser = pair_parser(__doc__, "rollout.json", prompts=128)
    parser.add_argument("--prompts-at-batch-1", type=int, default=32, help="fewer, where decoding is slowest")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8, 32, 64])
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--parallel-below", type=int, default=8, help="0: walk only; a large number: never walk")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    pair = Pair.load(options)
    every = pair.prompts(options.prompts)
    rounds: dict[tuple[int, str], list[Refresh]] = {}
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        refresh("decode_free", pair, every, 64, place, options)  # the store of texts, made once
        for number in range(options.rounds + 1):
            for size in options.batch_sizes:
                prompts = every[: options.prompts_at_batch_1] if size == 1 else every
                for engine in ENGINES if number % 2 else reversed(ENGINES):
                    found = refresh(engine, pair, prompts if number else prompts[: 2 * size], size, place, options)
                    if number:  # the first, shorter, warms up
                        rounds.setdefault((size, engine), []).append(found)
    rows = [
        row(size, engine, rounds[size, engine], rounds[size, "speculative"][-1])
        for size in options.batch_sizes
        for engine in ENGINES
    ]
    show(
        "Rollouts: tokens per second, and where the time goes (medians)",
        ("batch", "engine", "tokens/s", "tokens", *PARTS, "identical"),
        [
            (
                str(r["batch_size"]), str(r["engine"]), f"{r['rate']:,.0f}", f"{r['tokens']:,}",
                *(f"{r[part] / r['seconds']:.1%}" for part in PARTS),
                f"{r['identical']} of {r['prompts']}" if "identical" in r else "",
            )
            for r in rows
        ],
    )  # fmt: skip
    rates = {f"{engine}, batch {size}": [r.figures["rate"] for r in found] for (size, engine), found in rounds.items()}
    keep(options.results, options, {"rows": rows, "rates": rates})


if __name__ == "__main__":
    main()
