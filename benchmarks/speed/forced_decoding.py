"""The time of a decoding step with a fixed number of accepted proposals; a part of :mod:`benchmarks.speed.gpu`."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, Qwen3Config

from benchmarks.speed.device import fresh_peak, held, wait
from draftopd.decoding.generate import Decoder
from draftopd.decoding.rules import Rules
from draftopd.drafters.base import Chooser, Draft
from draftopd.drafters.dflash import DFlashDrafter
from draftopd.targets.target import Target

#: How many proposals the target accepts in every timed step.
FORCED = 4


class ForcedDrafter(DFlashDrafter):
    """Drafts as usual, then proposes tokens of which a :func:`counting_target` accepts the first :data:`FORCED`."""

    shift: int

    def draft(
        self, target: Target, state: Any, anchors: Tensor, anchor_tokens: Tensor, visible: int, choose: Chooser
    ) -> Draft:
        drafted = super().draft(target, state, anchors, anchor_tokens, visible, choose)
        slots = torch.arange(1, self.block_size, device=anchors.device)
        wrong = (slots > FORCED).long()
        tokens = (anchor_tokens[:, None] + self.shift * slots + wrong) % target.vocab_size
        # The result depends on what was drafted, so that the compiler cannot leave the drafting out.
        return Draft(drafted.hidden, torch.where(drafted.tokens < 0, drafted.tokens, tokens[:, None]))


def counting_target(shape: dict[str, Any], positions: int, device: str, dtype: torch.dtype) -> tuple[Target, int]:
    """A random target whose best next token is the last token plus a shift, by a wide margin; and the shift.

    Its embeddings are much larger than what its layers add, and its head has the embeddings' rows, moved by the shift.
    """
    config = Qwen3Config(
        vocab_size=shape["vocabulary"], hidden_size=shape["hidden"], num_hidden_layers=shape["target_layers"],
        num_attention_heads=shape["heads"], num_key_value_heads=shape["kv_heads"], head_dim=shape["head_dim"],
        intermediate_size=shape["intermediate"], tie_word_embeddings=shape["tied"], max_position_embeddings=positions,
    )  # fmt: skip
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    shift = 0 if shape["tied"] else 1
    with torch.no_grad():
        embedding = model.get_input_embeddings().weight.normal_(0, 16)
        model.get_output_embeddings().weight.copy_(embedding.roll(shift, 0))
    return Target(model).to(device), shift


def decode(shape: dict[str, Any], sizes: dict[str, Any], device: str) -> dict[str, Any]:
    """Milliseconds per decoding step by kind and batch size: the difference between many steps and few, per step."""
    torch.manual_seed(0)
    counts = (sizes["first"], sizes["first"] + sizes["steps"])
    limits = {speed: [1 + speed * n for n in counts] for speed in (1, FORCED + 1)}
    room = sizes["prompt"] + max(limits[FORCED + 1]) + 2 * sizes["block"]
    target, shift = counting_target(shape, room, device, torch.bfloat16 if device == "cuda" else torch.float32)
    with torch.device(device):
        forced = ForcedDrafter.build(
            target, None, num_layers=sizes["layers"], block_size=sizes["block"], mask_token_id=shape["vocabulary"] - 1
        ).eval()
    forced.shift = shift
    found: dict[str, Any] = {}
    # The drafter's weights are in float32, as in training; the last kind shows what bfloat16 would change.
    kinds = [("plain", None, torch.float32), ("drafted", forced, torch.float32)]
    if device == "cuda":
        kinds.append(("drafted, bfloat16", forced, torch.bfloat16))
    for kind, drafter, dtype in kinds:
        if drafter is not None:
            drafter.to(dtype)
        for batch in sizes["batches"]:
            prompts = [[(7 * row + i) % shape["vocabulary"] for i in range(sizes["prompt"])] for row in range(batch)]
            texts = []
            # A CPU compiles for minutes; `decoding.py` measures compiled decoding there.
            for compiled in (False, True) if device == "cuda" else (False,):
                torch._dynamo.utils.counters.clear()
                times: dict[int, list[float]] = {count: [] for count in counts}
                fresh_peak(device)
                began = time.perf_counter()
                for turn in range(4):  # the first compiles, the second records
                    for count, limit in zip(counts, limits[FORCED + 1 if drafter else 1], strict=True):
                        decoder = Decoder(target, drafter, Rules(max_new_tokens=limit), compiled)
                        wait(device)
                        started = time.perf_counter()
                        decoded = decoder.decode_batch(prompts)
                        wait(device)
                        if turn > 1:
                            times[count].append(time.perf_counter() - started)
                        elif turn == 0 and count == counts[0]:
                            first = time.perf_counter() - began
                texts.append([d.response for d in decoded])
                whole = {n for d in decoded for n in d.accepted}
                assert whole == {FORCED if drafter else 0}, f"{kind}: {whole} proposals accepted, not {FORCED}"
                few, many = (statistics.median(times[count]) for count in counts)
                found[f"{kind}, {'compiled' if compiled else 'eager'}, batch {batch}"] = {
                    "step_ms": 1000 * (many - few) / sizes["steps"],
                    "tokens_per_second": batch * (FORCED + 1 if drafter else 1) * sizes["steps"] / (many - few),
                    "first_seconds": first,
                    "peak_mib": held(device) / 2**20,
                    "graphs_left_out": torch._dynamo.utils.counters["inductor"]["cudagraph_skips"],
                }
            assert texts[0] == texts[-1], f"{kind}, batch {batch}: compiled steps give other texts"
    return found
