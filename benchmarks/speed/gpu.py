"""All measurements that need a GPU, in one command: whether results agree with plain arithmetic, and what they cost.

    python -m benchmarks.speed.gpu
    python -m benchmarks.speed.gpu --parts checks decode --targets qwen3_4b
    python -m benchmarks.speed.gpu --device cpu --small --results small.json    # the same parts with tiny shapes

Targets have the shapes of Qwen3-4B and 8B and random weights, drawn on the GPU in bfloat16; nothing is downloaded.

- checks: block attention compared with float64; liger's cross entropy compared with the chunked one; texts and anchors
  of the bundled pair, decoded plainly, speculatively and compiled, and found without decoding;
- attention: block attention of a training step with each of torch's kernels, and with the one that torch chooses;
- step: a Draft-OPD training step by part, its peak memory, and the fraction of it that the matrices' arithmetic needs;
- loss: `loss.py` at 4,096 positions over the target's vocabulary;
- decode: seconds per decoding step, eager and compiled, with a fixed number of accepted proposals.

Each case runs in a process of its own, and a case that fails is kept with its error. Exit status: 0 if all passed, 1 if
a check or a case failed (the results are written all the same), 2 without a CUDA GPU. Results go to
benchmarks/results/gpu.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from contextlib import nullcontext
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.common import Pair, case, keep, parser
from benchmarks.speed import loss
from benchmarks.speed.device import fresh_peak, held, multiplication_rate, wait
from benchmarks.speed.forced_decoding import decode
from draftopd.drafters.attention import View, block_attention
from draftopd.losses import liger
from draftopd.losses.cross_entropy import CrossEntropy
from draftopd.rollout.buffer import Recorded
from draftopd.rollout.rollouts import DecodeFreeRollout
from draftopd.rollout.trajectories import InProcessTrajectories

PARTS = ("checks", "attention", "step", "loss", "decode")
#: Hidden size, layers, heads, key/value heads, head size, MLP width, vocabulary, whether the head is the embedding.
SHAPE = ("hidden", "target_layers", "heads", "kv_heads", "head_dim", "intermediate", "vocabulary", "tied")
TARGETS = {
    "qwen3_4b": (2560, 36, 32, 8, 128, 9728, 151_936, True),
    "qwen3_8b": (4096, 36, 32, 8, 128, 12_288, 151_936, False),
}
SMALL = {"tiny_tied": (64, 8, 4, 2, 16, 96, 320, True), "tiny_untied": (64, 8, 4, 2, 16, 96, 320, False)}
#: Tokens and anchors of a training step, its drafter's layers and block; positions of the loss; prompt, batch sizes,
#: decoding steps left out and timed.
REAL_SIZES = {
    "length": 4096, "anchors": 512, "layers": 5, "block": 16, "positions": 4096, "prompt": 512, "batches": (1, 8),
    "first": 4, "steps": 32,
}  # fmt: skip
SMALL_SIZES = REAL_SIZES | {
    "length": 96, "anchors": 6, "positions": 64, "prompt": 24, "batches": (1, 2), "first": 1, "steps": 3
}  # fmt: skip


def plain_attention(query: Tensor, context: Any, block: Any, ends: Tensor) -> Tensor:
    """:func:`block_attention`, block by block, with every score written out."""
    groups = query.shape[1] // context[0].shape[1]
    outputs = []
    for i in range(ends.shape[1]):
        keys, values = (
            torch.cat([c, b[:, :, i]], 2).repeat_interleave(groups, 1) for c, b in zip(context, block, strict=True)
        )
        scores = query[:, :, i] @ keys.transpose(-1, -2) / query.shape[-1] ** 0.5
        places = torch.arange(context[0].shape[2], device=query.device)
        hidden = places >= ends[:, i, None]
        scores[..., : len(places)] = scores[..., : len(places)].masked_fill(hidden[:, None, None], -torch.inf)
        outputs.append(scores.softmax(-1) @ values)
    return torch.stack(outputs, 2)


def attention_inputs(
    shape: dict[str, Any], length: int, anchors: int, block: int, batch: int, device: str, dtype: torch.dtype
) -> tuple[list[Tensor], Tensor]:
    """Query, context keys and values, block keys and values, all with gradients; and the contexts' ends."""
    generator, size, kv = torch.Generator().manual_seed(0), shape["head_dim"], shape["kv_heads"]
    shapes = [
        (batch, shape["heads"], anchors, block, size), *[(batch, kv, length, size)] * 2,
        *[(batch, kv, anchors, block, size)] * 2,
    ]  # fmt: skip
    inputs = [torch.randn(s, generator=generator).to(device, dtype).requires_grad_() for s in shapes]
    return inputs, torch.randint(1, length, (batch, anchors), generator=generator).to(device)


def check_attention(shape: dict[str, Any], device: str, dtype: torch.dtype, flex: bool) -> dict[str, float]:
    """Largest errors of block attention's value and gradients, each relative to the largest exact entry."""
    length, anchors = (1000, 37) if device == "cuda" else (40, 21)
    inputs, ends = attention_inputs(shape, length, anchors, 16, 2, device, dtype)
    exact = [t.detach().double().requires_grad_() for t in inputs]
    view = View.by_flex(ends, None, 16, length) if flex else View.in_chunks(ends, None, 16)
    results = []
    for (query, ck, cv, bk, bv), attend in ((inputs, block_attention), (exact, plain_attention)):
        output = attend(query, (ck, cv), (bk, bv), view if attend is block_attention else ends)
        output.double().square().sum().backward()
        results.append([output, *(t.grad for t in (query, ck, cv, bk, bv))])
    errors = [float((a.double() - b).abs().max() / b.abs().max()) for a, b in zip(*results, strict=True)]
    return {"value": errors[0], "gradients": max(errors[1:])}


def check_liger(shape: dict[str, Any], sizes: dict[str, Any], device: str, dtype: str) -> dict[str, float]:
    """Relative errors of value and gradient of liger's cross entropy, weighted unevenly, to the chunked one."""
    blocks = loss.blocks_of(loss.parse(loss_arguments(shape, sizes["positions"] // 4, device, dtype)))
    results = []
    for fits in (liger.fits, lambda *_: False):
        blocks.draft_states.grad = None
        with patch.object(liger, "fits", fits):
            value = CrossEntropy(gamma=2.0)(blocks).loss
        (3 * value).backward()
        assert blocks.draft_states.grad is not None
        results.append((value.detach().double(), blocks.draft_states.grad.double()))
    (value, gradient), (other, right) = results
    return {"value": float((value - other).abs() / other), "gradient": float((gradient - right).norm() / right.norm())}


def check_bundled(device: str, compiled: bool) -> dict[str, bool]:
    """Whether all ways of decoding the bundled pair give the same text, and the walk finds decoding's anchors."""
    pair = Pair.load(argparse.Namespace(
        target="bundled:tiny_target", drafter="bundled:tiny_dflash", dtype="float32", device=device,
        threads=torch.get_num_threads(),
    ))  # fmt: skip
    prompts = pair.prompts(8 if device == "cuda" else 2)
    plain = pair.decoder(96, drafted=False).decode_batch(prompts)
    drafted = pair.decoder(96).decode_batch(prompts)
    records = [Recorded.of(d) for d in drafted]
    bare = [Recorded(r.tokens, r.prompt_length, [], [], []) for r in records]
    walked = DecodeFreeRollout(InProcessTrajectories("unused")).anchored(pair.request(prompts, 96), bare)
    same = {
        "speculative": [d.response for d in drafted] == [d.response for d in plain],
        "decode_free": walked == records,
    }
    if compiled:
        again = pair.decoder(96, compiled=True)
        # Three times: compiled, recorded, replayed.
        turns = [[(d.response, d.anchors) for d in again.decode_batch(prompts)] for _ in range(3)]
        same["compiled"] = turns == [[(d.response, d.anchors) for d in drafted]] * 3
    return same


def checks(shape: dict[str, Any], sizes: dict[str, Any], device: str) -> dict[str, Any]:
    """All comparisons, and the names of those that fail."""
    found: dict[str, Any] = {"bundled": check_bundled(device, compiled=device == "cuda")}
    failed = [f"bundled, {name}" for name, same in found["bundled"].items() if not same]
    allowed = {"float32": 1e-4, "bfloat16": 3e-2}
    for dtype, max_error in allowed.items():
        compared = {"attention": check_attention(shape, device, getattr(torch, dtype), flex=False)}
        if device == "cuda":  # FlexAttention has no backward on a CPU
            compared["FlexAttention"] = check_attention(shape, device, getattr(torch, dtype), flex=True)
        if device == "cuda" and liger.installed():
            compared["liger"] = check_liger(shape, sizes, device, dtype)
        for name, errors in compared.items():
            found[f"{name}, {dtype}"] = errors
            # Written so that a NaN fails too.
            failed += [f"{name}, {dtype}: {what}" for what, error in errors.items() if not error < max_error]
    if "liger, float32" not in found:
        found["liger"] = "left out: it needs a GPU and pip install -e '.[gpu]'"
    return found | {"failed": failed}


def attention(shape: dict[str, Any], sizes: dict[str, Any], device: str) -> dict[str, Any]:
    """Seconds and peak memory of one layer's block attention, forward and backward, by kernel."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    inputs, ends = attention_inputs(shape, sizes["length"], sizes["anchors"], sizes["block"], 1, device, dtype)
    query, ck, cv, bk, bv = inputs
    views = {False: View.in_chunks(ends, None, sizes["block"])}
    kernels: dict[str, Any] = {"torch's choice": None, "math": SDPBackend.MATH}
    if device == "cuda":
        views[True] = View.by_flex(ends, None, sizes["block"], sizes["length"])
        kernels |= {
            "FlexAttention": None,
            "efficient": SDPBackend.EFFICIENT_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION,
            "cudnn": SDPBackend.CUDNN_ATTENTION,
        }  # fmt: skip
    found: dict[str, Any] = {}
    for name, kernel in kernels.items():
        try:
            with sdpa_kernel(kernel) if kernel is not None else nullcontext():
                before, seconds = fresh_peak(device), []
                for _ in range(4):
                    wait(device)
                    began = time.perf_counter()
                    block_attention(query, (ck, cv), (bk, bv), views[name == "FlexAttention"]).sum().backward()
                    wait(device)
                    seconds.append(time.perf_counter() - began)
            found[name] = {
                "seconds": statistics.median(seconds[1:]),
                "peak_mib": (held(device) - before) / 2**20,
            }
        except RuntimeError as error:  # torch has no such kernel for a mask, or for grouped heads
            found[name] = {"error": str(error).splitlines()[0]}
    return found


def loss_arguments(shape: dict[str, Any], positions: int, device: str, dtype: str) -> list[str]:
    """Those of `loss.py` for a target's shape."""
    return [
        f"--positions={positions}", f"--vocabulary={shape['vocabulary']}", f"--hidden={shape['hidden']}",
        f"--device={device}", f"--dtype={dtype}", f"--rounds={3 if device == 'cuda' else 1}",
    ]  # fmt: skip


def step_arguments(shape: dict[str, Any], sizes: dict[str, Any], device: str, dtype: str) -> list[str]:
    """Those of `training.py` for a target's shape."""
    named = {name: shape[name] for name in SHAPE if name not in ("vocabulary", "tied")}
    named |= {"layers": sizes["layers"], "taps": sizes["layers"], "block": sizes["block"]}
    named |= {"device": device, "dtype": dtype, "rounds": 3 if device == "cuda" else 1, "loss": "asymmetric_kl"}
    return [
        *(f"--{name.replace('_', '-')}={value}" for name, value in named.items()), *["--tied"] * shape["tied"],
        "--optimizer", "--autocast", "--case", str(sizes["length"]), str(sizes["anchors"]), str(shape["vocabulary"]),
    ]  # fmt: skip


def measure(part: str, name: str, shape: dict[str, Any], sizes: dict[str, Any], device: str) -> dict[str, Any]:
    """The result of a case in a process of its own, or its error."""
    low = "bfloat16" if device == "cuda" else "float32"
    try:
        if part == "loss":
            arguments = loss_arguments(shape, sizes["positions"], device, low)
            return loss.compare(loss.parse(arguments), arguments)
        if part == "step":
            return case(step_arguments(shape, sizes, device, low), "benchmarks.speed.training")
        return case([*sys.argv[1:], "--case", part, name], "benchmarks.speed.gpu")
    except SystemExit as failed:
        lines = str(failed).splitlines()
        return {"error": lines[-1], "trace": lines[-12:]}


def parse() -> argparse.Namespace:
    made = parser(__doc__, "gpu.json")
    made.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    made.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS), help="ignored with --small")
    made.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    made.add_argument("--small", action="store_true", help="tiny shapes, to try the script itself")
    made.add_argument("--case", nargs=2, help=argparse.SUPPRESS)
    return made.parse_args()


def main() -> int:
    options = parse()
    if options.device == "cuda" and not torch.cuda.is_available():
        print(
            "No CUDA GPU: torch finds none, so nothing was measured. --device cpu --small tries the script itself.",
            file=sys.stderr,
        )
        return 2
    chosen = SMALL if options.small else {name: TARGETS[name] for name in options.targets}
    targets = {name: dict(zip(SHAPE, values, strict=True)) for name, values in chosen.items()}
    sizes, device = SMALL_SIZES if options.small else REAL_SIZES, options.device
    if options.case:
        part, name = options.case
        measured = {"checks": checks, "attention": attention, "decode": decode}[part]
        print(json.dumps(measured(targets[name], sizes, device)))
        return 0
    options.targets = list(targets)
    content: dict[str, Any] = {
        "sizes": sizes,
        "operations_per_second": {
            dtype: multiplication_rate(device, dtype, size=256 if options.small else None)
            for dtype in ("bfloat16", "float32")
        },
        "rows": [],
        "failed": [],
    }
    for part in options.parts:
        # Checks and attention depend on the heads alone, in which the targets agree.
        for name in list(targets)[:1] if part in ("checks", "attention") else targets:
            found = measure(part, name, targets[name], sizes, device)
            content["rows"].append({"part": part, "target": name, **found})
            content["failed"] += [f"{part} {name}: {found['error']}"] if "error" in found else []
            content["failed"] += [f"check: {what}" for what in found.get("failed", [])]
            print(f"\n{part}, {name}")
            show(part, found)
            # Written after every case, so that an interruption loses nothing.
            keep(options.results, options, content)
    for line in content["failed"]:
        print(f"FAILED {line}")
    return 1 if content["failed"] else 0


def show(part: str, found: dict[str, Any]) -> None:
    """Print one line per measurement."""
    if part == "step" and "error" not in found:
        floor = found["floor_seconds"] / found["seconds"]
        print(f"  {found['seconds']:.3f} s without the optimizer, {floor:.0%} of it the matrices' arithmetic")
        print(f"  peak {found['held_mib'] + found['peak_mib']:,.0f} MiB, {found['held_mib']:,.0f} of it the weights")
        found = found["parts"]
    for name, values in found.items():
        if isinstance(values, dict):
            texts = (f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in values.items())
            print(f"  {name:34}", ", ".join(texts))
        elif name != "trace":
            print(f"  {name:34}", f"{values:.4g} s" if isinstance(values, float) else values)


if __name__ == "__main__":
    sys.exit(main())
