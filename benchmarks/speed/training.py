"""A training step's time and memory: by part, compared with its arithmetic and with public DFlash training code.

    python -m benchmarks.speed.training                                  # one shape
    python -m benchmarks.speed.training --lengths 512 2048 8192 --anchors 32 256 --vocabularies 1000 32000 151936
    python -m benchmarks.speed.training --peer specforge PYTHON CHECKOUT --peer speculators PYTHON -
    python -m benchmarks.speed.training --peer specforge,--chunk-blocks=0 PYTHON CHECKOUT     # with options of its own

The core step is what a DFlash trainer does once the target's features are there: draft at random anchors, compute cross
entropy on the text's tokens, and go backward. Peers run their own step on the same shapes, in processes of their own
that take turns with ours; `training_peer.py` says what their steps contain. With `--target-layers N` a random Qwen3
target of N layers reads the text first, and its time is reported too; `--loss asymmetric_kl` then lets it score the
proposals as well, as Draft-OPD does. The floor is the number of operations in matrix multiplications divided by the
rate that this machine reaches in a large one. Results go to benchmarks/results/training.json. `gpu.py` runs this with
the shapes of real targets.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, Qwen3Config

from benchmarks.common import case, keep, parser
from benchmarks.speed.device import fresh_peak, held, multiplication_rate
from draftopd.decoding.sampling import Sampling
from draftopd.drafters.dflash import DFlashDrafter, default_target_layers
from draftopd.losses.base import Loss
from draftopd.losses.cross_entropy import CrossEntropy
from draftopd.losses.distilled import Distilled
from draftopd.losses.divergence import forward_kl, reverse_kl
from draftopd.replay.batch import ReplayBatch
from draftopd.replay.replay import replay
from draftopd.targets.target import Target
from draftopd.training.stopwatch import Stopwatch

#: Options of the shape that peers share.
SHAPE = ("hidden", "layers", "heads", "kv_heads", "head_dim", "intermediate", "block", "batch", "taps", "rounds")


def paper_loss() -> Loss:
    return Distilled(accepted=forward_kl, rejected=reverse_kl, gamma=0.8, accepted_gamma=1.0, normalization="stream")


LOSSES = {"cross_entropy": lambda: CrossEntropy(gamma=7.0), "asymmetric_kl": paper_loss}


class Parts(Stopwatch):
    """Times the target's two passes separately: reading the text, and scoring the proposals."""

    @contextmanager
    def __call__(self, section: str) -> Iterator[None]:
        with super().__call__("scoring" if section == "target" and section in self.seconds else section):
            yield


class GivenFeatures(Target):
    """A target with given features, so that only the drafter's side is timed."""

    features: torch.Tensor

    def read_features(self, ids: torch.Tensor, begins: torch.Tensor | None = None) -> torch.Tensor:
        return self.features


def build(options: argparse.Namespace) -> tuple[Target, DFlashDrafter, ReplayBatch]:
    """A random target and drafter of the shape, and one batch of random tokens and anchors."""
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
        config = Qwen3Config(num_hidden_layers=options.layers, **common)
        drafter = DFlashDrafter(config, options.block, taps, options.vocabulary - 1, depth)
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
    """The DFlash release's choice of layers; the lowest layers if the target is shallow or its features are given."""
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
    """Multiplications and additions of the step's matrices, without the scores of attention."""
    h, width, kv = options.hidden, options.heads * options.head_dim, options.kv_heads * options.head_dim
    tokens, slots = options.batch * options.length, options.batch * options.anchors * options.block
    layer = 2 * h * (width + 2 * kv) + 2 * width * h + 6 * h * options.intermediate
    context = 2 * len(taps_of(options)) * h * h + options.layers * 2 * h * 2 * kv
    head = 2 * h * options.vocabulary * (slots - options.batch * options.anchors)
    # Forward, and backward for states and weights; the frozen head has no gradient of its weights.
    drafter = 3 * (tokens * context + slots * options.layers * layer) + 2 * head
    if options.loss == "cross_entropy":
        # The target stops after the last tapped layer.
        return drafter + bool(options.target_layers) * tokens * (taps_of(options)[-1] + 1) * layer
    # The target reads the text and scores the blocks; its head is used for proposing, verifying and the loss.
    return drafter + (tokens + slots) * options.target_layers * layer + 3 * head


def shape_of(options: argparse.Namespace) -> list[str]:
    return [text for name in SHAPE for text in (f"--{name.replace('_', '-')}", str(getattr(options, name)))]


def parse() -> argparse.Namespace:
    made = parser(__doc__, "training.json")
    defaults = (1024, 2, 8, 4, 128, 3072, 16, 1, 2, 3)
    for name, value in zip(SHAPE, defaults, strict=True):
        made.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)
    made.add_argument("--lengths", type=int, nargs="+", default=[1024])
    made.add_argument("--anchors", type=int, nargs="+", default=[64], help="per sequence")
    made.add_argument("--vocabularies", type=int, nargs="+", default=[32000])
    made.add_argument("--cases", nargs="+", metavar="LENGTH,ANCHORS,VOCABULARY", help="instead of all combinations")
    made.add_argument("--target-layers", type=int, default=0)
    made.add_argument("--loss", choices=LOSSES, default="cross_entropy")
    made.add_argument("--tied", action="store_true", help="the target's head is its embedding")
    made.add_argument("--autocast", action="store_true", help="bfloat16 where trainer.precision=bf16-mixed uses it")
    made.add_argument("--turns", type=int, default=1, help="of ours and of the peers'; the median counts")
    made.add_argument("--device", default="cpu")
    made.add_argument("--dtype", default="float32", help="the target's; the drafter's is float32")
    made.add_argument("--peer", nargs=3, action="append", default=[], metavar=("NAME", "PYTHON", "CHECKOUT"))
    made.add_argument("--optimizer", action="store_true", help="time gradient clipping and AdamW's step too")
    made.add_argument("--case", type=int, nargs=3, help=argparse.SUPPRESS)
    options = made.parse_args()
    if options.loss != "cross_entropy" and not options.target_layers:
        made.error(f"--loss {options.loss} needs a target: give --target-layers too.")
    return options


def compare(length: int, anchors: int, vocabulary: int, options: argparse.Namespace) -> dict[str, object]:
    """One row: ours and the peers', in turns."""
    texts = [str(length), str(anchors), str(vocabulary)]
    ours = [sys.executable, "-m", "benchmarks.speed.training", *sys.argv[1:], "--case", *texts]
    shape = [*shape_of(options), "--length", texts[0], "--anchors", texts[1], "--vocab", texts[2]]
    peer = str(Path(__file__).with_name("training_peer.py"))
    commands = {"draftopd": ours}
    for name, python, where in options.peer:
        kind, *own = name.split(",")
        commands[name] = [python, peer, kind, where, *shape, *own]
    turns = [{name: case(command) for name, command in commands.items()} for _ in range(options.turns)]
    seconds, memory = (
        {name: statistics.median(turn[name][what] for turn in turns) for name in commands}
        for what in ("seconds", "peak_mib")
    )
    floor = statistics.median(turn["draftopd"]["floor_seconds"] for turn in turns)
    print(f"{length} tokens, {anchors} anchors, vocabulary {vocabulary}: floor {floor:.2f} s")
    for name, taken in seconds.items():
        print(f"  {name:12} {taken:7.2f} s {memory[name]:7.0f} MiB   ours x{taken / seconds['draftopd']:.2f} as fast")
    print("  ", {name: round(value, 3) for name, value in turns[-1]["draftopd"]["parts"].items()}, flush=True)
    return {
        "length": length, "anchors": anchors, "vocabulary": vocabulary, "turns": turns, "seconds": seconds,
        "peak_mib": memory, "floor_share": floor / seconds["draftopd"],
    }  # fmt: skip


def main() -> None:
    options = parse()
    if options.case:
        options.length, options.anchors, options.vocabulary = options.case
        print(json.dumps(measure(options)))
        return
    shapes = list(product(options.lengths, options.anchors, options.vocabularies))
    if options.cases:
        shapes = [tuple(map(int, text.split(","))) for text in options.cases]
    keep(options.results, options, {"rows": [compare(*shape, options) for shape in shapes]})


if __name__ == "__main__":
    main()
