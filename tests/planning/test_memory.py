"""The plan's bytes and operations against hand counts, real models, and measured peaks."""

from __future__ import annotations

import pytest
import torch
from hydra.utils import instantiate
from tests.support.losses import LOSSES, loss_config
from tests.support.models import KINDS, small_model
from torch import nn
from transformers import Qwen3Config, Qwen3ForCausalLM

from benchmarks.speed.peaks import _peaks, decoding_peak, step_peaks
from draftopd.drafters.dflash import DFlashDrafter
from draftopd.drafters.eagle3 import Eagle3Drafter
from draftopd.drafters.mtp import MTPDrafter
from draftopd.losses.base import Loss
from draftopd.losses.blend import Blend
from draftopd.losses.cross_entropy import CrossEntropy
from draftopd.losses.distilled import Distilled
from draftopd.losses.divergence import forward_kl, jensen_shannon
from draftopd.planning import work
from draftopd.planning.activations import linear, norm
from draftopd.planning.memory import (
    Decoding,
    Sharing,
    by_moment,
    decoding,
    resident,
    training_step,
)
from draftopd.planning.shapes import shape_of, target_of
from draftopd.planning.sizes import DrafterSize, Step, TargetSize
from draftopd.replay.batch import ReplayBatch
from draftopd.replay.blocks import Blocks
from draftopd.targets.head import LMHead
from draftopd.targets.target import Target


@pytest.mark.parametrize(
    "name, billions, active",
    [("Qwen3-4B", 4.02, 4.02), ("Qwen3-8B", 8.19, 8.19), ("Qwen3-30B-A3B-Thinking-2507", 30.53, 3.35)],
)
def test_known_shapes_have_the_published_number_of_weights(name: str, billions: float, active: float) -> None:
    size = target_of(shape_of(f"Qwen/{name}")[0])[1]
    assert size.elements / 1e9 == pytest.approx(billions, abs=0.005)
    assert (size.active_elements + size.other_elements) / 1e9 == pytest.approx(active, abs=0.005)
    assert size.width_bytes == 2


@pytest.mark.parametrize("kind", KINDS)
def test_sizes_are_those_of_the_model(kind: str) -> None:
    model = small_model(kind)
    size = TargetSize.of(Target(model), 4)
    assert size.elements == sum(p.numel() for p in model.parameters())
    experts = [p.numel() for n, p in model.named_parameters() if ".experts." in n]
    assert size.expert_elements == sum(experts)
    assert size.active_elements == size.layer_elements - sum(experts) / 2  # 2 of 4 experts


T = TargetSize(8, 2, 4, 2, 4, 100, 16, layer_elements=1000, other_elements=500, width_bytes=2)
D = DrafterSize("dflash", 8, 1, 4, 2, 4, 16, block=4, taps=1, last_tap=1, elements=300)


def test_what_is_always_held_by_hand() -> None:
    assert resident(T, D, Sharing(), 4) == {
        "target weights": 3000, "drafter weights": 1200, "optimizer states": 2400,
    }  # fmt: skip
    shared = resident(T, D, Sharing(shards=4), 4)
    assert shared["target weights"] == (250 + 500) * 2
    assert shared["gathered layers"] == 2 * 500 * 2
    assert resident(T, D, Sharing(buckets=True), 4)["gradient buckets"] == 1200


def test_rows_kept_for_the_backward_by_hand() -> None:
    mixed = Step(1, 10, 2, weight_bytes=4, compute_bytes=2)
    assert norm(8, 4) == 8 * (4 + 4) and norm(8, 2) == 8 * (4 + 2)
    assert linear(8, 4, Step(1, 10, 2), 3) == 8 * 4  # one tensor for all
    assert linear(8, 4, mixed, 3) == 3 * 8 * 2  # a copy for each


def test_operations_by_hand() -> None:
    forward = work.target_forward(T, tokens=10, keys=7, sharing=Sharing(shards=4))
    assert forward.operations == 2 * 1000 * 10 + 4 * 10 * 7 * 2 * 16
    assert forward.fetched == 1000 * 2 * 3 / 4
    experts = TargetSize(8, 2, 4, 2, 4, 100, 16, 1000, 500, expert_elements=800, top_k=2, experts=8)
    assert work.target_forward(experts, 10, 0, Sharing()).operations == 2 * (200 + 800 / 4) * 10
    assert work.touched(experts, 1) == pytest.approx(200 + 800 / 4)


def _pair(kind: str, bfloat16: bool) -> tuple[Target, DFlashDrafter | Eagle3Drafter | MTPDrafter, ReplayBatch]:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=2000, hidden_size=256, intermediate_size=768, num_attention_heads=4, num_key_value_heads=2,
        head_dim=64, num_hidden_layers=3, max_position_embeddings=1024, tie_word_embeddings=False,
    )  # fmt: skip
    target = Target(Qwen3ForCausalLM(config).to(torch.bfloat16 if bfloat16 else torch.float32))
    drafter: DFlashDrafter | Eagle3Drafter | MTPDrafter
    if kind == "dflash":
        drafter = DFlashDrafter.build(target, None, num_layers=3, block_size=8, mask_token_id=1999)
    else:
        drafter = (Eagle3Drafter if kind == "eagle3" else MTPDrafter).build(target, None, block_size=8)
    target.tap(drafter.target_layer_ids)
    ids, lengths = torch.randint(1999, (2, 384)), torch.full((2,), 384)
    anchors = torch.stack([torch.randperm(370)[:48].sort().values + 1 for _ in range(2)])
    return target, drafter, ReplayBatch(ids, lengths * 0, lengths, anchors, torch.ones_like(anchors).bool(), -lengths)


@pytest.mark.parametrize(
    "kind, bfloat16, checkpointing",
    [("dflash", False, False), ("dflash", True, True), ("eagle3", True, False), ("mtp", False, True)],
)
def test_a_step_is_planned_within_a_tenth(kind: str, bfloat16: bool, checkpointing: bool) -> None:
    target, drafter, batch = _pair(kind, bfloat16)
    drafter.activation_checkpointing = checkpointing
    loss = Distilled(accepted=forward_kl)
    measured = step_peaks(target, drafter, batch, loss, bfloat16)
    step = Step(
        2, 384, 48, 4, 2 if bfloat16 else 4, loss.scope, loss.logit_copies, checkpointing=checkpointing
    )  # fmt: skip
    planned = by_moment(training_step(TargetSize.of(target, target.dtype.itemsize), DrafterSize.of(drafter), step))
    assert max(planned.values()) == pytest.approx(measured[""], rel=0.1)
    for name in ("read", "draft", "score", "loss", "backward"):
        assert planned[name] == pytest.approx(measured[name], rel=0.2), name


def test_decoding_is_planned_within_a_tenth() -> None:
    target, drafter, batch = _pair("dflash", False)
    prompts = [batch.ids[0].tolist()] * 4
    planned = decoding("", TargetSize.of(target, 4), DrafterSize.of(drafter), Decoding(4, 384, 16)).peak.bytes
    assert planned == pytest.approx(decoding_peak(target, drafter, prompts, 16), rel=0.1)


def equally_weighted(name: str) -> Loss:
    config = loss_config(name)
    if "rejected_weight" in config:
        config.rejected_weight = 1.0
    return instantiate(config)


BLEND = Blend(first=CrossEntropy(), second=Distilled(accepted=jensen_shannon))


@pytest.mark.parametrize("loss", [*map(equally_weighted, LOSSES), BLEND], ids=[*LOSSES, "blend_with_jsd"])
def test_losses_hold_the_copies_that_are_planned(loss: Loss) -> None:
    head = nn.Linear(8, 20_000, bias=False).requires_grad_(False)
    tokens, every = torch.zeros(16, 4, dtype=torch.long), torch.ones(16, 4, dtype=torch.bool)
    states = torch.randn(2, 16, 4, 8)
    blocks = Blocks(
        states[0].requires_grad_(), states[1], LMHead(head), tokens, tokens, torch.zeros(16, dtype=torch.long), every,
        every,
    )  # fmt: skip
    copies = _peaks(lambda: loss(blocks).loss)[""] / (tokens.numel() * 20_000 * 4)
    planned = loss.logit_copies
    assert copies <= planned + 0.1
    assert not getattr(loss, "same_on_both", True) or copies > planned - 0.5  # else a stream's slots alone
