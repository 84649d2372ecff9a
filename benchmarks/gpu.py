"""Everything that is to be known of a GPU, in one command: what agrees with plain arithmetic, and what it costs.

    python benchmarks/gpu.py
    python benchmarks/gpu.py --parts checks decode --targets qwen3_4b
    python benchmarks/gpu.py --device cpu --small --results small.json    # the same walk over tiny shapes

Targets have the shapes of Qwen3-4B and 8B and random weights, drawn on the GPU in bfloat16; nothing is downloaded.

- checks: block attention beside float64; liger's cross entropy beside the chunked one; texts and anchors of the
  bundled pair, decoded plainly, speculatively, compiled and walked without decoding;
- attention: block attention of a training step by each of torch's kernels, and by the one that torch chooses;
- step: a Draft-OPD training step by part, peak memory, and the share of it that the matrices' arithmetic needs;
- loss: `loss.py` at 4,096 positions over the target's vocabulary;
- decode: seconds a decoding step, eager and compiled, with a drafter of which a fixed number of proposals is accepted.

Each case runs in a process of its own; one that fails is kept with its error. Exit status: 0 when all passed, 1 when a
check or a case failed (the results are written all the same), 2 without a CUDA GPU. Results go to
benchmarks/results/gpu.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from forced_decoding import decode
from loss import blocks_of
from machine import describe, fresh_peak, held, multiplication_rate, wait
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from draftopd.data.prompts import PromptEncoder, ReasoningPrompts
from draftopd.decoding.generate import Decoder
from draftopd.drafters.attention import View, block_attention
from draftopd.drafters.load import load_for
from draftopd.losses import liger
from draftopd.losses.cross_entropy import CrossEntropy
from draftopd.rollout.buffer import Recorded
from draftopd.rollout.rollouts import DecodeFreeRollout
from draftopd.rollout.trajectories import InProcessTrajectories
from draftopd.targets.load import load_target, load_tokenizer, stop_tokens

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "gpu.json"
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
    """Query, context keys and values, block keys and values, with gradients; ends."""
    generator, size, kv = torch.Generator().manual_seed(0), shape["head_dim"], shape["kv_heads"]
    shapes = [
        (batch, shape["heads"], anchors, block, size), *[(batch, kv, length, size)] * 2,
        *[(batch, kv, anchors, block, size)] * 2,
    ]  # fmt: skip
    inputs = [torch.randn(s, generator=generator).to(device, dtype).requires_grad_() for s in shapes]
    return inputs, torch.randint(1, length, (batch, anchors), generator=generator).to(device)


def check_attention(shape: dict[str, Any], device: str, dtype: torch.dtype, flex: bool) -> dict[str, float]:
    """Largest errors of block attention's value and gradients, each by the largest entry of what they should be."""
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
    """Liger's cross entropy beside the chunked one, weighted unevenly: relative errors of value and gradient."""
    options = argparse.Namespace(
        positions=sizes["positions"] // 4, vocabulary=shape["vocabulary"], hidden=shape["hidden"], device=device,
        dtype=dtype,
    )  # fmt: skip
    blocks, results = blocks_of(options), []
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
    """Whether all ways of decoding the bundled pair give one text, and the walk finds decoding's anchors."""
    target = load_target("bundled:tiny_target", dtype="float32", device=device)
    tokenizer = load_tokenizer("bundled:tiny_target")
    drafter = load_for(target, "bundled:tiny_dflash").to(device).eval()
    prompts = PromptEncoder(tokenizer).take(ReasoningPrompts("validation"), range(8 if device == "cuda" else 2))
    options = {"max_new_tokens": 96, "stop": stop_tokens(target, tokenizer)}
    plain = Decoder(target, None, **options).decode_batch(prompts)
    drafted = Decoder(target, drafter, **options).decode_batch(prompts)
    records = [Recorded(d.tokens, len(d.prompt), d.anchors, d.accepted, d.emitted) for d in drafted]
    bare = [Recorded(r.tokens, r.prompt_length, [], [], []) for r in records]
    walked = DecodeFreeRollout(InProcessTrajectories("unused"), max_new_tokens=96).anchored(target, drafter, bare, 0)
    same = {
        "speculative": [d.response for d in drafted] == [d.response for d in plain],
        "decode_free": walked == records,
    }
    if compiled:
        again = Decoder(target, drafter, **options, compiled=True)
        # Three times: compiled, recorded, replayed.
        turns = [[(d.response, d.anchors) for d in again.decode_batch(prompts)] for _ in range(3)]
        same["compiled"] = turns == [[(d.response, d.anchors) for d in drafted]] * 3
    return same


def checks(shape: dict[str, Any], sizes: dict[str, Any], device: str) -> dict[str, Any]:
    """All comparisons, and the names of those that fail."""
    found: dict[str, Any] = {"bundled": check_bundled(device, compiled=device == "cuda")}
    failed = [f"bundled, {name}" for name, same in found["bundled"].items() if not same]
    allowed = {"float32": 1e-4, "bfloat16": 3e-2}
    for dtype, most in allowed.items():
        compared = {"attention": check_attention(shape, device, getattr(torch, dtype), flex=False)}
        if device == "cuda":  # it has no backward on a CPU
            compared["FlexAttention"] = check_attention(shape, device, getattr(torch, dtype), flex=True)
        if device == "cuda" and liger.installed():
            compared["liger"] = check_liger(shape, sizes, device, dtype)
        for name, errors in compared.items():
            found[f"{name}, {dtype}"] = errors
            # A NaN is no less than anything, so it fails too.
            failed += [f"{name}, {dtype}: {what}" for what, error in errors.items() if not error < most]
    if "liger, float32" not in found:
        found["liger"] = "left out: it wants a GPU and pip install -e '.[gpu]'"
    return found | {"failed": failed}


def attention(shape: dict[str, Any], sizes: dict[str, Any], device: str) -> dict[str, Any]:
    """Seconds and peak memory of one layer's block attention, there and back, by kernel."""
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


def command_of(part: str, shape: dict[str, Any], sizes: dict[str, Any], device: str, kept: Path) -> list[str]:
    """The process of a part that another script measures."""
    low = "bfloat16" if device == "cuda" else "float32"
    if part == "loss":
        names = {"positions": sizes["positions"], "vocabulary": shape["vocabulary"], "hidden": shape["hidden"]}
        command = [str(HERE / "loss.py"), "--results", str(kept)]
    else:
        names = {name: shape[name] for name in SHAPE if name not in ("vocabulary", "tied")}
        names |= {"layers": sizes["layers"], "taps": sizes["layers"], "block": sizes["block"]}
        case = [str(value) for value in (sizes["length"], sizes["anchors"], shape["vocabulary"])]
        command = [str(HERE / "training.py"), "--loss", "asymmetric_kl", "--optimizer", "--autocast", "--case", *case]
        command += ["--tied"] if shape["tied"] else []
    for name, value in names.items():
        command += [f"--{name.replace('_', '-')}", str(value)]
    return [sys.executable, *command, "--device", device, "--dtype", low, "--rounds", "3" if device == "cuda" else "1"]


def run(command: list[str], kept: Path | None) -> dict[str, Any]:
    """What a case found, or its error."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"ended with status {done.returncode}"]
        return {"error": lines[-1], "trace": lines[-12:]}
    return json.loads(kept.read_text())["losses"] if kept else json.loads(done.stdout.splitlines()[-1])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS), help="ignored with --small")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", action="store_true", help="tiny shapes, to try the script itself")
    parser.add_argument("--case", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        print(
            "No CUDA GPU: torch sees none here, so nothing was measured. --device cpu --small tries the script itself.",
            file=sys.stderr,
        )
        return 2
    targets = SMALL if options.small else {name: TARGETS[name] for name in options.targets}
    sizes, device = SMALL_SIZES if options.small else REAL_SIZES, options.device
    if options.case:
        part, name = options.case
        shape = dict(zip(SHAPE, targets[name], strict=True))
        print(json.dumps({"checks": checks, "attention": attention, "decode": decode}[part](shape, sizes, device)))
        return 0
    content: dict[str, Any] = {
        "machine": describe(),
        "arguments": {"device": device, "small": options.small, "parts": options.parts, "targets": list(targets)},
        "sizes": sizes,
        "operations_per_second": {
            dtype: multiplication_rate(device, dtype, size=256 if options.small else None)
            for dtype in ("bfloat16", "float32")
        },
    }
    failed = []
    for part in options.parts:
        content[part] = {}
        # Checks and attention depend on the heads alone, in which the targets agree.
        for name in list(targets)[:1] if part in ("checks", "attention") else targets:
            shape = dict(zip(SHAPE, targets[name], strict=True))
            with tempfile.TemporaryDirectory() as place:
                kept = Path(place) / "kept.json" if part == "loss" else None
                if part in ("loss", "step"):
                    command = command_of(part, shape, sizes, device, Path(place) / "kept.json")
                else:
                    command = [sys.executable, __file__, *sys.argv[1:], "--case", part, name]
                found = content[part][name] = run(command, kept)
            failed += [f"{part} {name}: {found['error']}"] if "error" in found else []
            failed += [f"check: {what}" for what in found.get("failed", [])]
            print(f"\n{part}, {name}")
            show(part, found)
            # Written after every case, so that what was found outlives an interruption.
            content["failed"] = failed
            options.results.parent.mkdir(exist_ok=True)
            options.results.write_text(json.dumps(content, indent=2, default=str) + "\n")
    print(f"\nwrote {options.results}")
    for line in failed:
        print(f"FAILED {line}")
    return 1 if failed else 0


def show(part: str, found: dict[str, Any]) -> None:
    """One line a row."""
    if part == "step" and "error" not in found:
        share = found["floor_seconds"] / found["seconds"]
        print(f"  {found['seconds']:.3f} s without the optimizer, {share:.0%} of it the matrices' arithmetic")
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
