"""Tokens a second of plain and of speculative decoding, by batch size, and beside the public DFlash code.

    python benchmarks/decoding.py
    python benchmarks/decoding.py --reference DFLASH/dflash/model.py --reference-python PYTHON

The reference is z-lab's model code, unmodified, with the same weights in float32 and the same prompts, greedy, batch 1;
it needs an interpreter with transformers 4.57, its own. Rounds of it and of ours take turns; the rate is all tokens by
all seconds, and the median over rounds counts. Texts must be equal. The results go to a JSON file.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from machine import keep

from draftopd.data.prompts import PromptEncoder, ReasoningPrompts
from draftopd.decoding.generate import Decoded, Decoder
from draftopd.drafters.checkpoint import save_drafter
from draftopd.drafters.load import load_for
from draftopd.io.hub import resolve
from draftopd.targets.load import load_target, load_tokenizer, stop_tokens

RESULTS = Path(__file__).parent / "results" / "decoding.json"


def timed(decoder: Decoder, prompts: list[list[int]], batch_size: int) -> tuple[list[Decoded], float]:
    """Texts and tokens a second."""
    decoder.target.tap(decoder.drafter.target_layer_ids if decoder.drafter else ())
    began = time.perf_counter()
    decoded = [d for batch in decoder.decode(prompts, batch_size) for d in batch]
    return decoded, sum(len(d.response) for d in decoded) / (time.perf_counter() - began)


def reference(
    options: argparse.Namespace, directory: Path, stop: list[int], prompts: list[list[int]]
) -> dict[str, Any]:
    """Texts and tokens a second of the public code."""
    (directory / "prompts.json").write_text(json.dumps({"prompts": prompts, "stop": stop}))
    command = [
        options.reference_python, str(Path(__file__).with_name("dflash_reference.py")), options.reference,
        resolve(options.target), str(directory / "drafter"), str(directory / "prompts.json"), str(options.tokens),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    return {"texts": found["texts"], "rate": sum(map(len, found["texts"])) / sum(found["seconds"])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="bundled:tiny_target")
    parser.add_argument("--drafter", default="bundled:tiny_dflash")
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--reference", help="the public code's model.py")
    parser.add_argument("--reference-python", default="python", help="interpreter that can import it")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()

    target, tokenizer = load_target(options.target, dtype="float32"), load_tokenizer(options.target)
    drafter = load_for(target, options.drafter).eval()
    stop = stop_tokens(target, tokenizer)
    prompts = PromptEncoder(tokenizer).take(ReasoningPrompts("validation"), range(options.prompts))
    decoders = {"plain": Decoder(target, None, max_new_tokens=options.tokens, stop=stop)}
    decoders["speculative"] = Decoder(target, drafter, max_new_tokens=options.tokens, stop=stop)
    for kind in tuple(decoders):
        model = decoders[kind].drafter
        decoders[f"{kind}, compiled"] = Decoder(target, model, max_new_tokens=options.tokens, stop=stop, compiled=True)
    rates: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as name:
        save_drafter(drafter, Path(name) / "drafter", torch.float32)
        began = time.perf_counter()
        for decoder in decoders.values():
            for batch in options.batches:
                timed(decoder, prompts, batch)
        print(f"compiled and warmed up in {time.perf_counter() - began:.0f} s")
        for _ in range(options.rounds):
            texts = None
            for batch in options.batches:
                for kind, decoder in decoders.items():
                    decoded, rate = timed(decoder, prompts, batch)
                    rates.setdefault(f"{kind}, batch {batch}", []).append(rate)
                    texts = texts or [d.response for d in decoded]
                    assert texts == [d.response for d in decoded], f"{kind} decoding at batch {batch} differs"
            if options.reference:
                public = reference(options, Path(name), sorted(stop), prompts)
                rates.setdefault("public DFlash code, batch 1", []).append(public["rate"])
                assert public["texts"] == texts, "the public code's texts differ"
    medians = {name: statistics.median(values) for name, values in rates.items()}
    for name, rate in medians.items():
        print(f"{name:40} {rate:8.0f} tokens/s")
    ratios = {}
    for suffix in ("", ", compiled"):
        own = medians[f"speculative{suffix}, batch 1"]
        ratios[f"over plain{suffix}, batch 1"] = own / medians[f"plain{suffix}, batch 1"]
        if options.reference:
            ratios[f"over the public code{suffix}, batch 1"] = own / medians["public DFlash code, batch 1"]
        for batch in options.batches[1:]:
            ratios[f"batch {batch} over batch 1{suffix}"] = medians[f"speculative{suffix}, batch {batch}"] / own
    for name, ratio in ratios.items():
        print(f"{name:40} {ratio:8.2f} x")
    content = {
        "rates": rates,
        "medians": medians,
        "ratios": ratios,
    }
    keep(options, content)


if __name__ == "__main__":
    main()
