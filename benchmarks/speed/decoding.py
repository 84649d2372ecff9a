"""Tokens per second of plain and of speculative decoding, by batch size, and of the public DFlash code.

    python -m benchmarks.speed.decoding
    python -m benchmarks.speed.decoding --reference DFLASH/dflash/model.py --reference-python PYTHON

The reference is z-lab's model code, unmodified, with the same weights in float32 and the same prompts, greedy, at batch
size 1. It needs an interpreter of its own with transformers 4.57. Rounds of the reference and of this package take
turns. A rate is all tokens divided by all seconds, and the median over rounds counts. Texts must be equal. Results go
to benchmarks/results/decoding.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.common import Pair, case, keep, pair_parser
from draftopd.decoding.generate import Decoded, Decoder
from draftopd.io.hub import resolve

PUBLIC = "public DFlash code, batch 1"


def timed(decoder: Decoder, prompts: list[list[int]], batch_size: int) -> tuple[list[Decoded], float]:
    """Texts and tokens per second."""
    decoder.target.tap(decoder.drafter.target_layer_ids if decoder.drafter else ())
    began = time.perf_counter()
    decoded = [d for batch in decoder.decode(prompts, batch_size) for d in batch]
    return decoded, sum(len(d.response) for d in decoded) / (time.perf_counter() - began)


def reference(
    options: argparse.Namespace, directory: Path, stop: list[int], prompts: list[list[int]]
) -> tuple[list[list[int]], float]:
    """Texts and tokens per second of the public code."""
    (directory / "prompts.json").write_text(json.dumps({"prompts": prompts, "stop": stop}))
    found = case([
        options.reference_python, str(Path(__file__).with_name("dflash_reference.py")), options.reference,
        resolve(options.target), str(directory / "drafter"), str(directory / "prompts.json"), str(options.tokens),
    ])  # fmt: skip
    return found["texts"], sum(map(len, found["texts"])) / sum(found["seconds"])


def ratios_of(medians: dict[str, float], batches: list[int]) -> dict[str, float]:
    """Speculative decoding over plain decoding, over the public code, and by batch size."""
    ratios = {}
    for suffix in ("", ", compiled"):
        own = medians[f"speculative{suffix}, batch {batches[0]}"]
        ratios[f"over plain{suffix}, batch {batches[0]}"] = own / medians[f"plain{suffix}, batch {batches[0]}"]
        if PUBLIC in medians:
            ratios[f"over the public code{suffix}, batch {batches[0]}"] = own / medians[PUBLIC]
        for batch in batches[1:]:
            name = f"batch {batch} over batch {batches[0]}{suffix}"
            ratios[name] = medians[f"speculative{suffix}, batch {batch}"] / own
    return ratios


def main() -> None:
    parser = pair_parser(__doc__, "decoding.json", prompts=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--reference", help="the public code's model.py")
    parser.add_argument("--reference-python", default="python", help="interpreter that can import it")
    options = parser.parse_args()

    pair = Pair.load(options)
    prompts = pair.prompts(options.prompts)
    decoders = {
        f"{kind}{', compiled' * compiled}": pair.decoder(options.tokens, kind == "speculative", compiled)
        for compiled in (False, True)
        for kind in ("plain", "speculative")
    }
    rates: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as name:
        pair.drafter.save(Path(name) / "drafter", torch.float32)
        began = time.perf_counter()
        for decoder in decoders.values():
            for batch in options.batch_sizes:
                timed(decoder, prompts, batch)
        print(f"compiled and warmed up in {time.perf_counter() - began:.0f} s")
        for _ in range(options.rounds):
            texts = None
            for batch in options.batch_sizes:
                for kind, decoder in decoders.items():
                    decoded, rate = timed(decoder, prompts, batch)
                    rates.setdefault(f"{kind}, batch {batch}", []).append(rate)
                    texts = texts or [d.response for d in decoded]
                    assert texts == [d.response for d in decoded], f"{kind} decoding at batch {batch} differs"
            if options.reference:
                public, rate = reference(options, Path(name), sorted(pair.stop), prompts)
                rates.setdefault(PUBLIC, []).append(rate)
                assert public == texts, "the public code's texts differ"
    medians = {name: statistics.median(values) for name, values in rates.items()}
    ratios = ratios_of(medians, options.batch_sizes)
    for name, rate in medians.items():
        print(f"{name:40} {rate:8.0f} tokens/s")
    for name, ratio in ratios.items():
        print(f"{name:40} {ratio:8.2f} x")
    keep(options.results, options, {"rates": rates, "medians": medians, "ratios": ratios})


if __name__ == "__main__":
    main()
