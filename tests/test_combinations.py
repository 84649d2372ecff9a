"""Every drafter with every loss, in both stages, under every verification rule: the table of docs/combinations.md."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from functools import cache
from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate

from draftopd.decoding.generate import Decoder
from draftopd.decoding.rules import Rules
from draftopd.decoding.sampling import Sampling
from draftopd.decoding.verify import Verification
from draftopd.drafters.base import Drafter
from draftopd.replay.batch import ReplayBatch
from draftopd.rollout.anchors import AnchorPolicy
from draftopd.targets.target import Target
from tests.support.batches import as_batch, replay
from tests.support.losses import LOSSES, loss_config
from tests.support.models import MakeDrafter, MakeTarget
from tests.support.paths import ROOT

DRAFTERS = ("dflash", "eagle3_reduced", "mtp")
RULES: dict[str, tuple[Sampling, Verification]] = {
    "greedy": (Sampling(), "rejection_sampling"),
    "rejection_sampling": (Sampling(1.0, top_p=0.95), "rejection_sampling"),
    "target_only": (Sampling(1.0, top_p=0.95), "target_only"),
}
#: Every drafter in both stages, each rule with two of them.
LEARNING = {
    ("dflash", "sft", "rejection_sampling"), ("eagle3_reduced", "sft", "greedy"), ("mtp", "sft", "target_only"),
    ("dflash", "opd", "target_only"), ("eagle3_reduced", "opd", "rejection_sampling"), ("mtp", "opd", "greedy"),
}  # fmt: skip
STEPS = 6

Prepare = Callable[[str, str, str], tuple[Target, Drafter, ReplayBatch]]


def texts(target: Target, drafter: Drafter, rule: str, stage: str) -> ReplayBatch:
    """Recorded sequences: the target's own with random anchors, or speculative decoding with visited ones."""
    sampling, verification = RULES[rule]
    prompts = [torch.randint(0, 60, (4 + i,), generator=torch.Generator().manual_seed(i)).tolist() for i in range(4)]
    generator = torch.Generator().manual_seed(2)
    decoder = Decoder(target, None if stage == "sft" else drafter, Rules(sampling, verification, max_new_tokens=24))
    decoded = decoder.decode_batch(prompts, generator)
    if stage == "sft":
        target.tap(drafter.target_layer_ids)
        policy = AnchorPolicy("random", 8, drafter.num_proposals)
        chosen = [policy.choose([], [], len(d.prompt), len(d.tokens), generator) for d in decoded]
        return as_batch(decoded).at(chosen, -1)
    return as_batch(decoded)


@pytest.fixture(scope="module")
def prepare(make_target: MakeTarget, make_any: MakeDrafter) -> Prepare:
    """``(drafts, stage, rule) -> (target, fresh drafter, batch)``; the texts are decoded once for all losses."""
    target = make_target("qwen3")

    @cache
    def once(drafts: str, stage: str, rule: str) -> tuple[Drafter, ReplayBatch]:
        drafter = make_any(drafts, target)
        return drafter, texts(target, drafter, rule, stage)

    def make(drafts: str, stage: str, rule: str) -> tuple[Target, Drafter, ReplayBatch]:
        drafter, batch = once(drafts, stage, rule)
        return target.tap(drafter.target_layer_ids), deepcopy(drafter), batch

    return make


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("stage", ["sft", "opd"])
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("drafts", DRAFTERS)
def test_each_combination_gives_every_weight_a_gradient(
    drafts: str, name: str, stage: str, rule: str, prepare: Prepare
) -> None:
    """Where the case is among :data:`LEARNING`, a few steps on the batch lower its loss too."""
    (target, drafter, batch), loss = prepare(drafts, stage, rule), instantiate(loss_config(name, stage == "sft"))
    sampling, verification = RULES[rule]
    optimizer = torch.optim.Adam(drafter.parameters(), lr=3e-3)
    values = []
    for _ in range(STEPS if (drafts, stage, rule) in LEARNING else 1):
        blocks = replay(
            target, drafter, batch, sampling, frozenset({5}), loss.scope,
            verification=verification, generator=torch.Generator().manual_seed(3),
        )  # fmt: skip
        value = loss(blocks).loss
        values.append(float(value.detach()))
        optimizer.zero_grad()
        value.backward()
        for weight, parameter in drafter.named_parameters():
            gradient = parameter.grad
            assert gradient is not None and gradient.isfinite().all() and gradient.any(), weight
        optimizer.step()
    assert len(values) == 1 or max(values[-3:]) < values[0], values


@pytest.mark.parametrize("drafts", DRAFTERS)
def test_each_drafter_is_lossless_after_learning(drafts: str, target: Target, make_any: Callable[..., Drafter]) -> None:
    """Trained on one text until it is accepted, then decoded token for token as without it."""
    drafter = make_any(drafts, target)
    batch = texts(target, drafter, "greedy", "opd")
    optimizer = torch.optim.Adam(drafter.parameters(), lr=3e-3)
    for _ in range(60):
        optimizer.zero_grad()
        loss = instantiate(loss_config("cross_entropy"))
        loss(replay(target, drafter, batch, Sampling(), frozenset(), loss.scope)).loss.backward()
        optimizer.step()
    prompts = [ids[:start].tolist() for ids, start in zip(batch.ids, batch.starts.tolist(), strict=True)]
    found = Decoder(target, drafter.eval(), Rules(max_new_tokens=24)).decode_batch(prompts)
    plain = Decoder(target, None, Rules(max_new_tokens=24)).decode_batch(prompts)
    assert [d.response for d in found] == [d.response for d in plain]
    accepted = sum(n for d in found for n in d.accepted) / sum(len(d.accepted) for d in found)
    assert accepted > 0.5


def test_the_table_in_the_docs_is_this_one() -> None:
    text = (ROOT / "docs" / "combinations.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("| `") and "yes" in line]
    assert [row.split("`")[1] for row in rows] == list(LOSSES)
    assert all(row.count("yes") == 2 * len(DRAFTERS) for row in rows)
    for kind in (Path(p).stem for p in (ROOT / "configs" / "drafter").glob("*.yaml")):
        assert f"`{kind}`" in text
