"""One training step of a public DFlash training core, timed on this CPU: random weights, arbitrary shapes.

    PYTHON training_peer.py specforge   CHECKOUT [options]
    PYTHON training_peer.py dpace       CHECKOUT [options]
    PYTHON training_peer.py speculators -        [options]     (the installed package; or a checkout, put before it)

CHECKOUT is a work tree or any git directory, bare too: then its HEAD is laid out in a temporary folder. Nothing of the
peers is copied here, only imported. The last line printed is JSON.

A step is the peer's own: sampling anchors, building the mask, the drafter's forward, its loss and metrics over the
frozen LM head, and backward. The target's forward isn't part of it (ids and tapped states are given), nor is an
optimizer, gradient clipping or data loading. One step warms up.

Attention. All three train with FlexAttention on GPUs. It can't be used here: torch's `flex_attention` refuses inputs
that require gradients on a CPU, compiled or not ("FlexAttention does not support backward on CPU", checked with torch
2.13). Each peer has `sdpa` and `eager` as settings of its own, with a dense boolean mask, queries by keys:

    auto   sdpa, for all three. The quickest and leanest here: torch's fused CPU attention takes the mask.
    sdpa   the same.
    eager  works for specforge (it turns its boolean mask into an additive one) and for speculators (its mask is a
           float one). dpace runs but WRONGLY: it adds its boolean mask to the scores as 0/1, so nothing is masked;
           refused unless --force.
    flex   to see it fail.

What is set, apart from that:

    specforge, dpace  Their packages' `__init__` files import sglang, yunchang, EAGLE-3 and so on, which the DFlash core
                      doesn't use. Empty packages with the same search path stand in for those; the modules of
                      the core are loaded from the checkout, unmodified.
    speculators       `loss_implementation="eager"`: the default, "fused", is Triton's and needs a GPU. Its own
                      `conditional_torch_compile` leaves `forward` uncompiled where there's no CUDA. It has no batch
                      dimension: a batch is one packed sequence with document ids, and gets batch x anchors anchors.
    bfloat16          specforge, dpace: all weights, as their scripts do. speculators: float32 weights under autocast,
                      as its trainer does.

The block's labels: specforge and dpace take the text's tokens, speculators the argmax of the verifier's logits, which
its step computes from given last hidden states with one more LM head matmul.
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import importlib
import importlib.metadata
import io
import json
import math
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from torch import Tensor, nn

STUBS = {
    "specforge": ["", "core", "modeling", "modeling.draft", "algorithms", "algorithms.common"],
    "dpace": ["", "core", "modeling", "modeling.draft"],
}
MODULES = {  # the drafter's, the training model's
    "specforge": ("specforge.modeling.draft.dflash", "specforge.algorithms.common.dflash_family_model"),
    "dpace": ("specforge.modeling.draft.dflash", "specforge.core.dflash"),
}
STD = 0.02


@dataclass
class Peer:
    """What's timed, and what tells about it."""

    loss: Callable[[], Tensor]
    plain: Callable[[], Tensor]
    """The mean cross-entropy over the blocks, each position counting the same: near log(vocabulary)."""
    trained: nn.Module
    version: str
    notes: dict[str, Any]


def laid_out(checkout: str, folder: str) -> tuple[Path, str]:
    """A work tree of the checkout, and its commit where it's known."""
    path = Path(checkout).resolve()

    def git(*arguments: str) -> bytes:
        command = ["git", "-c", "safe.directory=*", "-C", str(path), *arguments]
        return subprocess.run(command, capture_output=True, check=True).stdout

    commit = ""
    with contextlib.suppress(subprocess.CalledProcessError, FileNotFoundError):
        if not (path / folder).is_dir() or (path / ".git").exists():  # not of a repository that merely lies above
            commit = git("rev-parse", "--short=12", "HEAD").decode().strip()
    if (path / folder).is_dir():
        return path, commit
    if not commit:
        raise SystemExit(f"{checkout}: neither a folder with {folder!r} in it nor a git directory")
    tree = Path(tempfile.mkdtemp(prefix="training_peer_"))
    atexit.register(shutil.rmtree, tree, ignore_errors=True)
    with tarfile.open(fileobj=io.BytesIO(git("archive", "HEAD"))) as archive:
        archive.extractall(tree, filter="data")
    return tree, commit


def described(name: str, number: str, commit: str) -> str:
    libraries = ", ".join(f"{package} {importlib.metadata.version(package)}" for package in ("torch", "transformers"))
    return f"{name} {number}{f' ({commit})' if commit else ''}, {libraries}"


def qwen(options: argparse.Namespace, **more: Any) -> Any:
    """The drafter's config."""
    from transformers import Qwen3Config

    return Qwen3Config(
        vocab_size=options.vocab,
        hidden_size=options.hidden,
        intermediate_size=options.intermediate,
        num_hidden_layers=options.layers,
        num_attention_heads=options.heads,
        num_key_value_heads=options.kv_heads,
        head_dim=options.head_dim,
        max_position_embeddings=max(4096, options.length * options.batch + options.block),
        attention_bias=False,
        attention_dropout=0.0,
        tie_word_embeddings=False,
        use_sliding_window=False,
        **more,
    )


def randomised(weight: Tensor) -> None:
    with torch.no_grad():
        weight.normal_(std=STD)


def given(options: argparse.Namespace, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Input ids, without the mask token, and tapped states."""
    ids = torch.randint(options.vocab - 1, (options.batch, options.length))
    states = torch.empty(options.batch, options.length, options.taps * options.hidden, dtype=dtype).normal_()
    return ids, states


def specforge(options: argparse.Namespace) -> Peer:
    """SpecForge, and D-PACE, which is built on an earlier one."""
    tree, commit = laid_out(options.checkout, "specforge")
    for stub in STUBS[options.peer]:
        name = f"specforge.{stub}".rstrip(".")
        package = types.ModuleType(name)
        package.__path__ = [str(tree / Path(*name.split(".")))]
        sys.modules[name] = package
    drafting, training = (importlib.import_module(module) for module in MODULES[options.peer])

    dtype = getattr(torch, options.dtype)
    config = qwen(
        options,
        block_size=options.block,
        num_target_layers=max(36, options.taps),
        dflash_config={"target_layer_ids": list(range(options.taps)), "mask_token_id": options.vocab - 1},
    )
    config._attn_implementation = options.backend
    drafter = drafting.DFlashDraftModel(config)
    head = nn.Linear(options.hidden, options.vocab, bias=False)
    embedding = nn.Embedding(options.vocab, options.hidden)
    for weight in (head.weight, embedding.weight):
        randomised(weight)
        weight.requires_grad_(False)
    chunks = {} if options.chunk_blocks is None else {"objective_chunk_blocks": options.chunk_blocks}
    model = training.OnlineDFlashModel(
        draft_model=drafter,
        target_lm_head=head,
        target_embed_tokens=embedding,
        mask_token_id=options.vocab - 1,
        block_size=options.block,
        attention_backend=options.backend,
        num_anchors=options.anchors,
        loss_decay_gamma=options.gamma,
        loss_type=options.loss,
        **chunks,
    ).to(dtype)
    drafter.train()
    ids, states = given(options, dtype)
    mask = torch.ones(options.batch, options.length)

    def loss() -> Tensor:
        return model(input_ids=ids, hidden_states=states, loss_mask=mask)[0]

    def plain() -> Tensor:
        model.loss_type, model.loss_decay_gamma = "dflash", None
        return loss()

    number = (tree / "version.txt").read_text().strip() if (tree / "version.txt").exists() else "?"
    chunk = getattr(model, "objective_chunk_blocks", None)
    width = model._sample_anchor_positions(options.length, mask, ids.device)[0].shape[1]
    notes = {"blocks": options.batch * width, "loss_chunk_blocks": chunk}
    return Peer(loss, plain, drafter, described(options.peer, number, commit), notes)


def speculators(options: argparse.Namespace) -> Peer:
    commit = ""
    if options.checkout != "-":
        tree, commit = laid_out(options.checkout, "src/speculators")
        sys.path.insert(0, str(tree / "src"))
    from speculators.losses import resolve_loss_config
    from speculators.models.dflash import DFlashSpeculatorConfig
    from speculators.models.dflash.core import DFlashDraftModel

    if options.chunk_blocks is not None:
        raise SystemExit("speculators doesn't chunk its loss")
    layers = qwen(options)
    layers._attn_implementation = options.backend
    model = DFlashDraftModel(
        DFlashSpeculatorConfig(
            transformer_layer_config=layers,
            draft_vocab_size=options.vocab,
            block_size=options.block,
            aux_hidden_state_layer_ids=list(range(options.taps)),
            mask_token_id=options.vocab - 1,
        )
    )
    # Its weights of the verifier are NaN until they're loaded, and all three are frozen already.
    for weight in (model.embed_tokens.weight, model.lm_head.weight):
        randomised(weight)
    with torch.no_grad():
        model.verifier_lm_head.weight.copy_(model.lm_head.weight)
    model.train()

    dtype = getattr(torch, options.dtype)
    ids, states = given(options, dtype)
    count = ids.numel()
    batch = {
        "input_ids": ids.view(1, count),
        "hidden_states": states.view(1, count, -1),
        "verifier_last_hidden_states": torch.empty(1, count, options.hidden, dtype=dtype).normal_(),
        "loss_mask": torch.ones(1, count, dtype=torch.bool),
        "document_ids": torch.arange(options.batch).repeat_interleave(options.length).unsqueeze(0),
        "position_ids": torch.arange(options.length).repeat(options.batch).unsqueeze(0),
    }
    weighting = "dpace" if options.loss == "dpace" else "fixed-exp-decay"

    def loss(gamma: float = options.gamma, weighting: str = weighting) -> Tensor:
        with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
            return model(
                **batch,
                loss_config=resolve_loss_config("ce", "eager"),
                gamma=gamma,
                max_anchors=options.anchors * options.batch,
                per_position_loss_weight=weighting,
            )[1]

    number = "from the checkout" if commit else importlib.metadata.version("speculators")
    notes = {"blocks": options.anchors * options.batch, "loss_chunk_blocks": None}
    plain = lambda: loss(1e9, "fixed-exp-decay")  # noqa: E731
    return Peer(loss, plain, model, described("speculators", number, commit), notes)


PEERS = {"specforge": specforge, "dpace": specforge, "speculators": speculators}
LOSS = {"specforge": "dflash", "dpace": "dpace", "speculators": "dflash"}
GAMMA = {"specforge": 7.0, "dpace": None, "speculators": 4.0}  # of their recipes for blocks of 16, or their defaults


def high() -> float:
    """The most this process held so far, MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def resident() -> float:
    """What it holds now, MiB."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def measure(options: argparse.Namespace) -> dict[str, Any]:
    torch.manual_seed(options.seed)
    peer = PEERS[options.peer](options)
    before, held = high(), resident()
    seconds: list[float] = []
    for number in range(options.rounds + 1):
        peer.trained.zero_grad(set_to_none=True)
        began = time.perf_counter()
        value = peer.loss()
        value.backward()
        if number:  # the first warms up
            seconds.append(time.perf_counter() - began)
    peak = high()
    gradients = [p.grad for p in peer.trained.parameters() if p.requires_grad]
    missing = sum(gradient is None for gradient in gradients)
    norm = math.sqrt(sum(float(gradient.float().square().sum()) for gradient in gradients if gradient is not None))
    with torch.no_grad():
        plain = float(peer.plain())
    return {
        "peer": options.peer,
        "seconds": statistics.median(seconds),
        "all_seconds": seconds,
        "peak_mib": peak - before,
        "held_mib": held,
        "peak_over_held_mib": peak - held,  # more than peak_mib only where building the model took a peak of its own
        "loss": float(value.detach()),
        "loss_kind": options.loss,
        "plain_cross_entropy": plain,
        "log_vocab": math.log(options.vocab),
        "gradient_norm": norm,
        "without_gradient": missing,
        "trained_parameters": sum(p.numel() for p in peer.trained.parameters() if p.requires_grad),
        "tokens": options.batch * options.length,
        "anchors": options.anchors,
        **peer.notes,
        "attention": options.backend,
        "dtype": options.dtype,
        "threads": torch.get_num_threads(),
        "version": peer.version,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peer", choices=PEERS)
    parser.add_argument("checkout", help="a work tree or git directory; - is the installed package")
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--kv-heads", type=int, default=4)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--intermediate", type=int, default=3072)
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--block", type=int, default=16)
    parser.add_argument("--anchors", type=int, default=64, help="for each sequence")
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--taps", type=int, default=2)
    parser.add_argument("--target-hidden", type=int, help="these peers want it to be --hidden")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--attention", choices=["auto", "sdpa", "eager", "flex"], default="auto")
    parser.add_argument("--loss", choices=["dflash", "dpace"], help="the position weighting; default: the peer's own")
    parser.add_argument("--gamma", type=float, help="of the exponential weighting; default: the peer's recipe's")
    parser.add_argument("--chunk-blocks", type=int, help="specforge only: blocks in a chunk of the loss; 0: no chunks")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--force", action="store_true", help="run even what is known to be wrong")
    options = parser.parse_args()

    if options.target_hidden not in (None, options.hidden):
        parser.error("all three project taps x --hidden, and use the target's embedding: --target-hidden isn't free")
    if options.checkout == "-" and options.peer != "speculators":
        parser.error(f"{options.peer} isn't installed from a registry: name a checkout")
    if options.chunk_blocks is not None and options.peer == "dpace":
        parser.error("dpace doesn't chunk its loss")
    if options.peer == "dpace" and options.attention == "eager" and not options.force:
        parser.error("dpace's eager attention ignores its boolean mask (see above); --force runs it all the same")
    options.loss = options.loss or LOSS[options.peer]
    options.gamma = options.gamma if options.gamma is not None else GAMMA[options.peer]
    flex = "simple_flex_attention" if options.peer == "speculators" else "flex_attention"
    options.backend = {"auto": "sdpa", "flex": flex}.get(options.attention, options.attention)
    print(json.dumps(measure(options)))


if __name__ == "__main__":
    main()
