"""A training step's time and memory: by part, beside its arithmetic, and beside public DFlash training code.

    python benchmarks/training.py                                       # one shape
    python benchmarks/training.py --lengths 512 2048 8192 --anchors 32 256 --vocabularies 1000 32000 151936
    python benchmarks/training.py --peer specforge PYTHON CHECKOUT --peer speculators PYTHON -

The core step is what a DFlash trainer does once the target's features are there: draft at random anchors, cross
entropy on the text's tokens, backward. Peers run theirs on the same shapes in processes of their own, in turns with
ours (see `training_peer.py`, which says what their steps hold). With `--target-layers N` a random Qwen3 target of N
layers reads the text first, and its time stands beside the others. The floor is the matrix multiplications' operations
by the rate that this machine reaches in a large one. Results go to a JSON file.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from itertools import product
from pathlib import Path

import torch
from machine import arguments, describe
from transformers import Qwen3Config, Qwen3ForCausalLM

from draftopd.decoding.sampling import Sampling
from draftopd.drafters.dflash import DFlashDrafter
from draftopd.losses.cross_entropy import CrossEntropy
from draftopd.replay import ReplayBatch, replay
from draftopd.stopwatch import Stopwatch
from draftopd.targets.target import Target

RESULTS = Path(__file__).parent / "results" / "training.json"
SHAPE = ("hidden", "layers", "heads", "kv_heads", "head_dim", "intermediate", "block", "batch", "taps", "rounds")


class GivenFeatures(Target):
    """A target whose features are given, so that only the drafter's side is timed."""

    features: torch.Tensor

    def read_features(self, ids: torch.Tensor, begins: torch.Tensor | None = None) -> torch.Tensor:
        return self.features


def build(options: argparse.Namespace) -> tuple[Target, DFlashDrafter, ReplayBatch]:
    torch.manual_seed(0)
    common = {
        "vocab_size": options.vocabulary, "hidden_size": options.hidden, "intermediate_size": options.intermediate,
        "num_attention_heads": options.heads, "num_key_value_heads": options.kv_heads, "head_dim": options.head_dim,
        "max_position_embeddings": options.length + options.block, "tie_word_embeddings": False,
    }  # fmt: skip
    depth = max(options.taps, options.target_layers)
    kind = Target if options.target_layers else GivenFeatures
    dtype = getattr(torch, options.dtype)
    target = kind(Qwen3ForCausalLM(Qwen3Config(num_hidden_layers=depth, **common)).to(options.device, dtype))
    config = Qwen3Config(num_hidden_layers=options.layers, **common)
    taps = tuple(range(options.taps))
    drafter = DFlashDrafter(config, options.block, taps, options.vocabulary - 1, depth).to(options.device)
    target.tap(taps)
    ids = torch.randint(options.vocabulary - 1, (options.batch, options.length))
    anchors = torch.stack(
        [torch.randperm(options.length - options.block)[: options.anchors].sort().values for _ in range(options.batch)]
    )
    if isinstance(target, GivenFeatures):
        target.features = torch.randn(options.batch, options.length, options.taps * options.hidden).to(
            options.device, dtype
        )
    lengths = torch.full((options.batch,), options.length)
    batch = ReplayBatch(ids, torch.zeros_like(lengths), lengths, anchors, torch.ones_like(anchors).bool(), -lengths)
    return target, drafter, ReplayBatch(*(t.to(options.device) for t in batch if isinstance(t, torch.Tensor)))


def measure(options: argparse.Namespace) -> dict[str, object]:
    """Seconds by part and peak memory of the core step, in this process."""
    target, drafter, batch = build(options)
    loss, optimizer = CrossEntropy(gamma=7.0), torch.optim.AdamW(drafter.parameters(), lr=1e-4)
    cuda = options.device == "cuda"

    def held() -> float:
        return torch.cuda.max_memory_allocated() if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    before, parts, steps = held(), [], []
    for _ in range(options.rounds + 1):
        clock = Stopwatch()
        began = time.perf_counter()
        blocks = replay(target, drafter, batch, Sampling(), frozenset(), teacher="none", clock=clock, propose=False)
        with clock("loss"):
            value = loss(blocks).loss
        with clock("backward"):
            value.backward()
        steps.append(time.perf_counter() - began)
        peak = held()
        if options.optimizer:
            with clock("optimizer"):
                optimizer.step()
        optimizer.zero_grad()
        parts.append(dict(clock.seconds))
    tokens = options.batch * options.length
    seconds = statistics.median(steps[1:])
    return {
        "seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "peak_mib": (peak - before) / 2**20,
        "loss": float(value.detach()),
        "parts": {name: statistics.median(p[name] for p in parts[1:]) for name in parts[0]},
        "floor_seconds": operations(options) / machine_rate(options),
    }


def operations(options: argparse.Namespace) -> float:
    """Multiplications and additions of the step's matrices; the scores of attention left out."""
    h, width, kv = options.hidden, options.heads * options.head_dim, options.kv_heads * options.head_dim
    tokens, slots = options.batch * options.length, options.batch * options.anchors * options.block
    layer = 2 * h * (width + 2 * kv) + 2 * width * h + 6 * h * options.intermediate
    context = 2 * options.taps * h * h + options.layers * 2 * h * 2 * kv
    head = 2 * h * options.vocabulary * (slots - options.batch * options.anchors)
    # Forward, and backward for states and weights; the frozen head has none for its weights.
    drafter = 3 * (tokens * context + slots * options.layers * layer) + 2 * head
    return drafter + tokens * options.target_layers * layer


def machine_rate(options: argparse.Namespace) -> float:
    """Operations a second of a large matrix multiplication here."""
    a = torch.randn(2048, 2048, device=options.device, dtype=getattr(torch, options.dtype))
    best = float("inf")
    for _ in range(5):
        began = time.perf_counter()
        a @ a
        if options.device == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - began)
    return 2 * 2048**3 / best


def run(command: list[str]) -> dict[str, float]:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def shape_of(options: argparse.Namespace) -> list[str]:
    return [text for name in SHAPE for text in (f"--{name.replace('_', '-')}", str(getattr(options, name)))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    defaults = (1024, 2, 8, 4, 128, 3072, 16, 1, 2, 3)
    for name, value in zip(SHAPE, defaults, strict=True):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024])
    parser.add_argument("--anchors", type=int, nargs="+", default=[64], help="for each sequence")
    parser.add_argument("--vocabularies", type=int, nargs="+", default=[32000])
    parser.add_argument("--target-layers", type=int, default=0)
    parser.add_argument("--turns", type=int, default=1, help="of ours and of the peers'; the median counts")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", help="the target's; the drafter's is float32")
    parser.add_argument("--peer", nargs=3, action="append", default=[], metavar=("NAME", "PYTHON", "CHECKOUT"))
    parser.add_argument("--optimizer", action="store_true", help="time AdamW's step too")
    parser.add_argument("--case", type=int, nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    if options.case:
        options.length, options.anchors, options.vocabulary = options.case
        print(json.dumps(measure(options)))
        return
    cases = []
    for case in product(options.lengths, options.anchors, options.vocabularies):
        length, anchors, vocabulary = map(str, case)
        ours = [sys.executable, __file__, *sys.argv[1:], "--case", length, anchors, vocabulary]
        shape = [*shape_of(options), "--length", length, "--anchors", anchors, "--vocab", vocabulary]
        peer = str(Path(__file__).with_name("training_peer.py"))
        commands = {"draftopd": ours} | {n: [python, peer, n, where, *shape] for n, python, where in options.peer}
        turns = [{name: run(command) for name, command in commands.items()} for _ in range(options.turns)]
        row = {"length": case[0], "anchors": case[1], "vocabulary": case[2], "turns": turns}
        seconds, memory = (
            {name: statistics.median(turn[name][what] for turn in turns) for name in commands}
            for what in ("seconds", "peak_mib")
        )
        floor = statistics.median(turn["draftopd"]["floor_seconds"] for turn in turns)
        row |= {"seconds": seconds, "peak_mib": memory, "floor_share": floor / seconds["draftopd"]}
        cases.append(row)
        print(f"{length} tokens, {anchors} anchors, vocabulary {vocabulary}: floor {floor:.2f} s")
        for name in commands:
            print(
                f"  {name:12} {seconds[name]:7.2f} s {memory[name]:7.0f} MiB"
                f"   ours x{seconds[name] / seconds['draftopd']:.2f} as fast"
            )
        print("  ", {name: round(value, 3) for name, value in turns[-1]["draftopd"]["parts"].items()}, flush=True)
    content = {"machine": describe(), "arguments": arguments(options), "cases": cases}
    options.results.parent.mkdir(exist_ok=True)
    options.results.write_text(json.dumps(content, indent=2, default=str) + "\n")
    print(f"wrote {options.results}")


if __name__ == "__main__":
    main()
