"""A training step's time and memory: by part, beside its arithmetic, and beside public DFlash training code.

    python benchmarks/training.py                                       # one shape
    python benchmarks/training.py --lengths 512 2048 8192 --anchors 32 256 --vocabularies 1000 32000 151936
    python benchmarks/training.py --peer specforge PYTHON CHECKOUT --peer speculators PYTHON -
    python benchmarks/training.py --peer specforge,--chunk-blocks=0 PYTHON CHECKOUT     # with options of its own

The core step is what a DFlash trainer does once the target's features are there: draft at random anchors, cross
entropy on the text's tokens, backward. Peers run theirs on the same shapes in processes of their own, in turns with
ours (see `training_peer.py`, which says what their steps hold). With `--target-layers N` a random Qwen3 target of N
layers reads the text first, and its time stands beside the others; `--loss asymmetric_kl` then lets it score the
proposals too, as Draft-OPD does. The floor is the matrix multiplications' operations by the rate that this machine
reaches in a large one. Results go to a JSON file. `gpu.py` runs this with the shapes of real targets.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path

import torch
from machine import fresh_peak, held, keep, multiplication_rate
from transformers import AutoModelForCausalLM, Qwen3Config

from draftopd.decoding.sampling import Sampling
from draftopd.drafters.dflash import DFlashConfig, DFlashDrafter, default_target_layers
from draftopd.losses.asymmetric_kl import AsymmetricKL
from draftopd.losses.base import Loss
from draftopd.losses.cross_entropy import CrossEntropy
from draftopd.replay.batch import ReplayBatch
from draftopd.replay.replay import replay
from draftopd.targets.shape import TargetShape
from draftopd.targets.target import Target
from draftopd.training.stopwatch import Stopwatch

RESULTS = Path(__file__).parent / "results" / "training.json"
SHAPE = ("hidden", "layers", "heads", "kv_heads", "head_dim", "intermediate", "block", "batch", "taps", "rounds")


LOSSES = {"cross_entropy": lambda: CrossEntropy(gamma=7.0), "asymmetric_kl": AsymmetricKL}


class Parts(Stopwatch):
    """The target's two passes apart: reading the text, then scoring the proposals."""

    @contextmanager
    def __call__(self, section: str) -> Iterator[None]:
        with super().__call__("scoring" if section == "target" and section in self.seconds else section):
            yield


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
        "max_position_embeddings": options.length + options.block, "tie_word_embeddings": options.tied,
    }  # fmt: skip
    depth = max(options.taps, options.target_layers)
    kind = Target if options.target_layers else GivenFeatures
    dtype = getattr(torch, options.dtype)
    taps = taps_of(options)
    with torch.device(options.device):
        shape = Qwen3Config(num_hidden_layers=depth, **common)
        target = kind(AutoModelForCausalLM.from_config(shape, dtype=dtype)).to(options.device)
        layers = Qwen3Config(num_hidden_layers=options.layers, **common)
        made_for = TargetShape(options.hidden, options.vocabulary, depth)
        drafter = DFlashDrafter(DFlashConfig(made_for, options.block, taps, layers, options.vocabulary - 1))
    target.tap(taps)
    ids = torch.randint(options.vocabulary - 1, (options.batch, options.length))
    anchors = torch.stack(
        [torch.randperm(options.length - options.block)[: options.anchors].sort().values for _ in range(options.batch)]
    )
    if isinstance(target, GivenFeatures):
        target.features = torch.randn(options.batch, options.length, len(taps) * options.hidden).to(
            options.device, dtype
        )
    lengths = torch.full((options.batch,), options.length)
    batch = ReplayBatch(ids, torch.zeros_like(lengths), lengths, anchors, torch.ones_like(anchors).bool(), -lengths)
    return target, drafter, ReplayBatch(*(t.to(options.device) for t in batch if isinstance(t, torch.Tensor)))


def taps_of(options: argparse.Namespace) -> tuple[int, ...]:
    """The lowest layers where the features are given or the target is shallow, else as the DFlash release taps."""
    deep = options.target_layers > options.taps + 2
    return default_target_layers(options.taps, options.target_layers) if deep else tuple(range(options.taps))


def measure(options: argparse.Namespace) -> dict[str, object]:
    """Seconds by part and peak memory of the core step, in this process."""
    target, drafter, batch = build(options)
    loss: Loss = LOSSES[options.loss]()
    optimizer = torch.optim.AdamW(drafter.parameters(), lr=1e-4)
    mixed = torch.autocast(options.device, torch.bfloat16, enabled=options.autocast)
    before, parts, steps = fresh_peak(options.device), [], []
    for _ in range(options.rounds + 1):
        clock = Parts()
        began = time.perf_counter()
        with mixed:
            blocks = replay(
                target, drafter, batch, Sampling(), frozenset(), teacher=loss.scope, clock=clock,
                propose=loss.uses_proposals,
            )  # fmt: skip
            with clock("loss"):
                value = loss(blocks).loss
        with clock("backward"):
            value.backward()
        steps.append(time.perf_counter() - began)
        peak = held(options.device)
        if options.optimizer:
            with clock("optimizer"):
                torch.nn.utils.clip_grad_norm_(drafter.parameters(), 1.0)
                optimizer.step()
        optimizer.zero_grad()
        parts.append(dict(clock.seconds))
    tokens = options.batch * options.length
    seconds = statistics.median(steps[1:])
    return {
        "seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "held_mib": before / 2**20,
        "peak_mib": (peak - before) / 2**20,
        "loss": float(value.detach()),
        "parts": {name: statistics.median(p[name] for p in parts[1:]) for name in parts[0]},
        "operations": operations(options),
        "floor_seconds": operations(options)
        / multiplication_rate(options.device, "bfloat16" if options.autocast else options.dtype),
    }


def operations(options: argparse.Namespace) -> float:
    """Multiplications and additions of the step's matrices; the scores of attention left out."""
    h, width, kv = options.hidden, options.heads * options.head_dim, options.kv_heads * options.head_dim
    tokens, slots = options.batch * options.length, options.batch * options.anchors * options.block
    layer = 2 * h * (width + 2 * kv) + 2 * width * h + 6 * h * options.intermediate
    context = 2 * len(taps_of(options)) * h * h + options.layers * 2 * h * 2 * kv
    head = 2 * h * options.vocabulary * (slots - options.batch * options.anchors)
    # Forward, and backward for states and weights; the frozen head has none for its weights.
    drafter = 3 * (tokens * context + slots * options.layers * layer) + 2 * head
    if options.loss == "cross_entropy":
        # Nothing above the last tapped layer is read.
        return drafter + bool(options.target_layers) * tokens * (taps_of(options)[-1] + 1) * layer
    # The text read and the blocks scored; the head once for the proposals, for verifying them and for the teacher.
    return drafter + (tokens + slots) * options.target_layers * layer + 3 * head


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
    parser.add_argument("--cases", nargs="+", metavar="LENGTH,ANCHORS,VOCABULARY", help="instead of all combinations")
    parser.add_argument("--target-layers", type=int, default=0)
    parser.add_argument("--loss", choices=LOSSES, default="cross_entropy")
    parser.add_argument("--tied", action="store_true", help="the target's head is its embedding")
    parser.add_argument("--autocast", action="store_true", help="bfloat16 where trainer.precision=bf16-mixed has it")
    parser.add_argument("--turns", type=int, default=1, help="of ours and of the peers'; the median counts")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", help="the target's; the drafter's is float32")
    parser.add_argument("--peer", nargs=3, action="append", default=[], metavar=("NAME", "PYTHON", "CHECKOUT"))
    parser.add_argument("--optimizer", action="store_true", help="time clipping and AdamW's step too")
    parser.add_argument("--case", type=int, nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    if options.loss != "cross_entropy" and not options.target_layers:
        parser.error(f"--loss {options.loss} asks the target: give --target-layers too.")
    if options.case:
        options.length, options.anchors, options.vocabulary = options.case
        print(json.dumps(measure(options)))
        return
    cases = []
    chosen = product(options.lengths, options.anchors, options.vocabularies)
    if options.cases:
        chosen = [tuple(map(int, case.split(","))) for case in options.cases]
    for case in chosen:
        length, anchors, vocabulary = map(str, case)
        ours = [sys.executable, __file__, *sys.argv[1:], "--case", length, anchors, vocabulary]
        shape = [*shape_of(options), "--length", length, "--anchors", anchors, "--vocab", vocabulary]
        peer = str(Path(__file__).with_name("training_peer.py"))
        commands = {"draftopd": ours}
        for name, python, where in options.peer:
            kind, *own = name.split(",")
            commands[name] = [python, peer, kind, where, *shape, *own]
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
    content = {"cases": cases}
    keep(options, content)


if __name__ == "__main__":
    main()
