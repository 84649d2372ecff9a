"""Time real speculative rollouts against decode-free anchors on the same prompts, and compare what they find.

    python benchmarks/decode_free.py
    python benchmarks/decode_free.py --parallel-below 0
    python benchmarks/decode_free.py --target DIR --drafter DIR --prompts 64 --batch-sizes 1 16 64

Each batch size decodes and walks the same prompts in turns. The texts are the target's own and are produced once
before; what is timed is what a refresh of the anchors costs. Results go to benchmarks/results/decode_free.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from machine import describe
from rich.console import Console
from rich.table import Table

from draftopd.data.prompts import PromptEncoder, ReasoningPrompts
from draftopd.decoding.sampling import Sampling
from draftopd.drafters.load import load_drafter
from draftopd.rollout.buffer import Recorded
from draftopd.rollout.request import Request
from draftopd.rollout.rollouts import DecodeFreeRollout, SpeculativeRollout
from draftopd.rollout.trajectories import InProcessTrajectories
from draftopd.targets.load import load_target, load_tokenizer, stop_tokens


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    target = load_target(options.target, dtype=options.dtype, device=options.device)
    tokenizer = load_tokenizer(options.target)
    drafter = load_drafter(options.drafter).to(target.device).eval()
    target.tap(drafter.target_layer_ids)
    prompts = PromptEncoder(tokenizer).take(ReasoningPrompts("validation"), range(options.prompts))
    sampling, limit = Sampling(options.temperature), options.max_new_tokens

    def request(few: list[list[int]]) -> Request:
        return Request(
            target, drafter, tokenizer, lambda: few, range(len(few)), stop_tokens(target, tokenizer),
            sampling, limit, 512, seed=0,
        )  # fmt: skip

    rows = []
    with tempfile.TemporaryDirectory() as store:
        texts = InProcessTrajectories(store)
        list(texts.collect(request(prompts)))
        for size in options.batch_sizes:
            few = prompts[: max(options.prompts_at_batch_1, size)] if size == 1 else prompts
            speculative = SpeculativeRollout(size, limit, options.temperature)
            walking = DecodeFreeRollout(
                texts, size, limit, options.temperature, parallel_below=options.parallel_below
            )  # fmt: skip
            seconds: dict[str, list[float]] = {"speculative": [], "decode_free": []}
            found: dict[str, dict[tuple[int, ...], Recorded]] = {}
            warm = few[: 2 * size]
            for rollout in (speculative, walking):
                list(rollout.collect(request(warm)))
            # The walk alone: texts lie on disk, and reading them is no part of it.
            recorded = list(walking.texts_only().collect(request(few)))
            plain = [record for batch in recorded for record in batch]
            ways: list[tuple[str, Callable[[], list[Recorded]]]] = [
                ("speculative", lambda r=speculative, f=few: [x for b in r.collect(request(f)) for x in b]),
                ("decode_free", lambda w=walking, p=plain: w.anchored(target, drafter, p, 0)),
            ]
            for repeat in range(options.repeats):
                for name, collect in ways if repeat % 2 == 0 else reversed(ways):
                    began = time.perf_counter()
                    records = collect()
                    seconds[name].append((time.perf_counter() - began) / len(few))
                    found[name] = {tuple(record.tokens): record for record in records}
            equal = sum(found["decode_free"].get(key) == record for key, record in found["speculative"].items())
            rows.append(
                {
                    "batch_size": size,
                    "prompts": len(few),
                    "speculative_ms": 1000 * statistics.median(seconds["speculative"]),
                    "decode_free_ms": 1000 * statistics.median(seconds["decode_free"]),
                    "identical": equal,
                }
            )
    first = rows[0]["speculative_ms"]
    for row in rows:
        row["ratio"] = row["speculative_ms"] / row["decode_free_ms"]
        row["ratio_to_first"] = first / row["decode_free_ms"]
    report(rows, options)


def report(rows: list[dict], options: argparse.Namespace) -> None:
    table = Table(title="Anchors of one text, milliseconds (median)", title_justify="left")
    first = rows[0]["batch_size"]
    for heading in (
        "batch",
        "prompts",
        "speculative",
        "decode-free",
        "ratio",
        f"to speculative at {first}",
        "identical",
    ):
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(
            str(row["batch_size"]), str(row["prompts"]), f"{row['speculative_ms']:.2f}", f"{row['decode_free_ms']:.2f}",
            f"{row['ratio']:.1f}x", f"{row['ratio_to_first']:.1f}x", f"{row['identical']} of {row['prompts']}",
        )  # fmt: skip
    Console().print(table)
    if options.temperature:
        Console().print("Above temperature 0 both draw, so texts and anchors differ.")
    path = Path(__file__).parent / "results" / "decode_free.json"
    path.write_text(json.dumps({**describe(), "options": vars(options), "rows": rows}, indent=2) + "\n")
    Console().print(f"kept in {path}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="bundled:tiny_target", help="directory in Hugging Face layout")
    parser.add_argument("--drafter", default="bundled:tiny_dflash", help="directory of a DFlash checkpoint")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default=None)
    parser.add_argument("--prompts", type=int, default=128)
    parser.add_argument("--prompts-at-batch-1", type=int, default=32, help="fewer, where decoding is slowest")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--parallel-below", type=int, default=8, help="0 only walks, a large number never does")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    return parser.parse_args()


if __name__ == "__main__":
    main()
