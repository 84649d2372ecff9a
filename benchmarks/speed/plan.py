"""The plan's memory compared with the measured peak: a training step moment by moment, and decoding.

    python -m benchmarks.speed.plan
    python -m benchmarks.speed.plan --first 1     # only the base shape

Random targets and drafters of several shapes, kinds and precisions take one training step on a CPU under torch's
profiler, which reports every allocation. Weights, gradients and optimizer states are left out on both sides, because
their sizes are known exactly. Results go to benchmarks/results/plan.json.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from benchmarks.common import keep, parser
from benchmarks.speed.peaks import decoding_peak, step_peaks
from draftopd.drafters.base import Drafter
from draftopd.drafters.dflash import DFlashDrafter
from draftopd.drafters.eagle3 import Eagle3Drafter
from draftopd.drafters.mtp import MTPDrafter
from draftopd.losses.base import Loss
from draftopd.losses.cross_entropy import CrossEntropy
from draftopd.losses.distilled import Distilled
from draftopd.losses.divergence import forward_kl
from draftopd.planning.memory import Decoding, by_moment, decoding, training_step
from draftopd.planning.sizes import DrafterSize, Step, TargetSize
from draftopd.replay.batch import ReplayBatch
from draftopd.targets.target import Target

BASE: dict[str, Any] = {
    "kind": "dflash", "hidden": 512, "heads": 8, "kv_heads": 2, "intermediate": 1536, "target_layers": 4, "layers": 3,
    "experts": 0, "block": 8, "batch": 2, "tokens": 768, "anchors": 48, "vocabulary": 8000, "loss": "forward_kl",
    "bfloat16": False, "checkpointing": False, "attention": "chunks",
}  # fmt: skip
CASES: list[dict[str, Any]] = [
    {},
    {"checkpointing": True},
    {"bfloat16": True},
    {"bfloat16": True, "checkpointing": True, "vocabulary": 1000},
    {"loss": "cross_entropy"},
    {"vocabulary": 1000, "anchors": 128},
    {"vocabulary": 32000, "hidden": 1024, "intermediate": 3072, "batch": 1, "block": 16, "anchors": 64, "tokens": 1024},
    {"kv_heads": 8, "tokens": 1536, "batch": 1},
    {"experts": 8},
    {"attention": "math"},
    {"kind": "eagle3"},
    {"kind": "eagle3", "bfloat16": True, "vocabulary": 1000},
    {"kind": "eagle3", "checkpointing": True, "vocabulary": 1000, "anchors": 128},
    {"kind": "mtp"},
    {"kind": "mtp", "bfloat16": True, "vocabulary": 1000},
    {"kind": "mtp", "checkpointing": True, "vocabulary": 1000, "anchors": 128},
]


def build(case: dict[str, Any]) -> tuple[Target, Drafter, ReplayBatch, Loss]:
    """A random pair of this shape, one batch for it, and its loss."""
    torch.manual_seed(0)
    common = {
        "vocab_size": case["vocabulary"], "hidden_size": case["hidden"], "intermediate_size": case["intermediate"],
        "num_attention_heads": case["heads"], "num_key_value_heads": case["kv_heads"], "head_dim": 64,
        "num_hidden_layers": case["target_layers"], "max_position_embeddings": 4096, "tie_word_embeddings": False,
    }  # fmt: skip
    if case["experts"]:
        experts = {"num_experts": case["experts"], "num_experts_per_tok": 2, "moe_intermediate_size": 768}
        model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**common, **experts))
    else:
        model = Qwen3ForCausalLM(Qwen3Config(**common))
    target = Target(model.to(torch.bfloat16 if case["bfloat16"] else torch.float32))
    drafter: Drafter
    if case["kind"] == "dflash":
        drafter = DFlashDrafter.build(
            target, None, num_layers=case["layers"], block_size=case["block"], mask_token_id=case["vocabulary"] - 1
        )
    else:
        kind = Eagle3Drafter if case["kind"] == "eagle3" else MTPDrafter
        drafter = kind.build(target, None, block_size=case["block"])
    drafter.activation_checkpointing = case["checkpointing"]
    target.tap(drafter.target_layer_ids)
    rows, n = case["batch"], case["tokens"]
    ids = torch.randint(case["vocabulary"] - 1, (rows, n))
    positions = [torch.randperm(n - case["block"] - 1)[: case["anchors"]].sort().values + 1 for _ in range(rows)]
    anchors, lengths = torch.stack(positions), torch.full((rows,), n)
    batch = ReplayBatch(ids, torch.zeros_like(lengths), lengths, anchors, torch.ones_like(anchors).bool(), -lengths)
    return (
        target,
        drafter,
        batch,
        CrossEntropy(gamma=7.0) if case["loss"] == "cross_entropy" else Distilled(accepted=forward_kl),
    )


def compare(case: dict[str, Any]) -> dict[str, tuple[float, float]]:
    """MiB measured and planned, by moment, for the whole step (``step``) and for decoding (``decoding``)."""
    target, drafter, batch, loss = build(case)
    measured: dict[str, float] = dict(step_peaks(target, drafter, batch, loss, case["bfloat16"], case["attention"]))
    t = TargetSize.of(target, target.dtype.itemsize)
    d = DrafterSize.of(drafter)
    step = Step(
        case["batch"], case["tokens"], case["anchors"], 4, 2 if case["bfloat16"] else 4, loss.scope,
        3 if case["loss"] == "cross_entropy" else 6, checkpointing=case["checkpointing"], attention=case["attention"],
    )  # fmt: skip
    planned = by_moment(training_step(t, d, step))
    measured["step"], planned["step"] = measured.pop(""), max(planned.values())
    if case["attention"] == "math":
        # Here the target is restricted to plain operations as well, which it is not on a GPU.
        planned = {name: size for name, size in planned.items() if name in ("draft", "loss", "backward", "step")}
    run = Decoding(8, case["tokens"] // 2, 32)
    prompts = [batch.ids[0, : run.prompt].tolist()] * run.rows
    measured["decoding"] = decoding_peak(target, drafter, prompts, run.response)
    planned["decoding"] = decoding("decoding", t, d, run).peak.bytes
    return {name: (measured[name] / 2**20, planned[name] / 2**20) for name in planned if name in measured}


def main() -> None:
    made = parser(__doc__, "plan.json")
    made.add_argument("--first", type=int, default=len(CASES), help="how many of the cases to measure")
    options = made.parse_args()
    cases = []
    for changes in CASES[: options.first]:
        found = compare(BASE | changes)
        errors = {name: planned / measured - 1 for name, (measured, planned) in found.items()}
        print(changes or "the base shape", {name: f"{error:+.1%}" for name, error in errors.items()}, flush=True)
        cases.append({"changes": changes, "measured_and_planned_mib": found, "errors": errors})
    names = dict.fromkeys(name for case in cases for name in case["errors"])
    worst = {name: max((case["errors"].get(name, 0.0) for case in cases), key=abs) for name in names}
    print("largest errors", {name: f"{error:+.1%}" for name, error in worst.items()})
    keep(options.results, options, {"base": BASE, "rows": cases, "largest_errors": worst})


if __name__ == "__main__":
    main()
