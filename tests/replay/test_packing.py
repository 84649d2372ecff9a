"""Packed rows: every sequence once, little padding, and the blocks, losses and gradients of one row a sequence."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate
from lightning.fabric.utilities import move_data_to_device
from tests.support.batches import replay
from tests.support.losses import LOSSES, loss_config
from tests.support.models import DRAFTERS, KINDS, MakeDrafter, MakeTarget
from torch import Tensor

from draftopd.decoding.rules import Rules
from draftopd.decoding.sampling import Sampling
from draftopd.errors import TargetError
from draftopd.replay.batch import ReplayBatch
from draftopd.replay.blocks import Blocks, Scope
from draftopd.replay.fresh import FreshAnchors
from draftopd.replay.packing import pack
from draftopd.replay.replay import read
from draftopd.rollout.anchors import AnchorPolicy
from draftopd.rollout.buffer import Recorded
from draftopd.rollout.walk import Walker
from draftopd.targets.target import Target
from draftopd.training.datamodule import ReplayDataModule
from draftopd.training.loader import ReplayDataset, ReplayLoader, ReplaySampler

CAPACITY = 60


def test_every_sequence_is_packed_once() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(60):
        count, most = (int(torch.randint(1, high, (), generator=generator)) for high in (40, 200))
        lengths = torch.randint(1, most + 1, (count,), generator=generator).tolist()
        longest, order = max(lengths), torch.randperm(count, generator=generator).tolist()
        shuffled = [lengths[i] for i in order]
        for capacity in (1, most, 4 * most, sum(lengths)):
            rows = pack(lengths, capacity)
            assert sorted(i for row in rows for i in row) == list(range(count))
            widest = max(sum(lengths[i] for i in row) for row in rows)
            assert longest <= widest <= max(capacity, longest)
            assert len(rows) * widest <= count * longest
            met = sorted(sorted(lengths[i] for i in row) for row in rows)
            assert sorted(sorted(shuffled[i] for i in row) for row in pack(shuffled, capacity)) == met
        assert len(rows) * widest == sum(lengths)  # where one row holds all, nothing is padding


def test_of_equal_paddings_the_shortest_rows() -> None:
    assert pack([5, 5, 5, 5], 100) == [[0], [1], [2], [3]]
    assert pack([1, 9, 5, 5, 3, 7], 100) == [[0, 1], [2, 3], [4, 5]]


def records(seed: int = 0) -> list[Recorded]:
    """Nine texts of 9 to 33 tokens, whose anchors are some of their response positions."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for length in (31, 9, 14, 33, 11, 27, 16, 22, 12):
        tokens = torch.randint(0, 60, (length,), generator=generator).tolist()
        anchors = torch.arange(4, length - 1)[torch.rand(length - 5, generator=generator) < 0.6].tolist()
        found.append(Recorded(tokens, 4, anchors, [0] * len(anchors), [1] * len(anchors), step=3))
    return found


def batches(texts: list[Recorded], choice: str = "visited", limit: int | None = 6) -> tuple[ReplayBatch, ReplayBatch]:
    """The same texts and anchors, a row each and packed."""

    def collate(pack_to: int | None) -> ReplayBatch:
        policy = AnchorPolicy(choice, limit, 3)
        loader = ReplayLoader(ReplayDataset(Path()), ReplaySampler(1, 9, 0), policy, pad=7, pack_to=pack_to)
        return loader.collate(texts, torch.Generator().manual_seed(0))

    plain, packed = collate(None), collate(CAPACITY)
    assert plain.layout is None and packed.layout is not None and len(packed.ids) < len(plain.ids)
    return plain, packed


def order(plain: ReplayBatch, packed: ReplayBatch) -> Tensor:
    """For each block of the packed batch its place among the other's."""
    assert packed.layout is not None
    counts = plain.anchor_mask.sum(1).tolist()
    own = torch.arange(sum(counts)).split(counts)

    return torch.cat([own[i] for i in packed.layout.rows.argsort(stable=True).tolist()])


def load(make_target: MakeTarget, kind: str) -> Target:
    # Experts are multiplied in float32 at most.
    return make_target(kind, dtype="float32" if kind in ("qwen3_moe", "gpt_oss") else "float64")


def same(found: Blocks, expected: Blocks, places: Tensor) -> None:
    """The same blocks but for their order, wherever they count."""
    for name in ("proposals", "accepted", "valid", "recorded"):
        assert torch.equal(getattr(found, name), getattr(expected, name)[places])
    near = {"rtol": 1e-4, "atol": 1e-4} if found.draft_states.dtype == torch.float32 else {"rtol": 1e-7, "atol": 1e-7}
    torch.testing.assert_close(found.draft_states, expected.draft_states[places], **near)
    recorded = found.recorded
    assert torch.equal(found.labels[recorded], expected.labels[places][recorded])
    assert (found.target_states is None) == (expected.target_states is None)
    if found.target_states is not None and expected.target_states is not None:
        torch.testing.assert_close(
            found.target_states[found.valid], expected.target_states[places][found.valid], **near
        )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("drafts", ["dflash", "mtp"])
@pytest.mark.parametrize("scope", ["proposals", "recorded", "none"])
def test_packed_blocks_are_the_same_with_every_target(
    scope: Scope, drafts: str, kind: str, make_target: MakeTarget, make_any: MakeDrafter
) -> None:
    target = load(make_target, kind)
    drafter = make_any(drafts, target).to(target.dtype)
    target.tap(drafter.target_layer_ids)
    plain, packed = batches(records())
    expected, found = (
        replay(target, drafter, batch, Sampling(), frozenset({5}), scope) for batch in (plain, packed)
    )  # fmt: skip
    assert len(found.draft_states) == int(plain.anchor_mask.sum()) > 30
    same(found, expected, order(plain, packed))


@pytest.mark.parametrize("drafts", DRAFTERS)
@pytest.mark.parametrize("choice", ["visited", "random"])
def test_packed_losses_and_gradients_are_the_same(
    choice: str, drafts: str, make_target: MakeTarget, make_any: MakeDrafter
) -> None:
    """Every loss as configured; with random anchors on the recorded text."""
    target = load(make_target, "qwen3")
    drafter = make_any(drafts, target).to(target.dtype)
    target.tap(drafter.target_layer_ids)
    both = batches(records(), choice)
    for name in LOSSES:
        loss = instantiate(loss_config(name, choice == "random"))
        values = [
            loss(
                replay(target, drafter, batch, Sampling(), frozenset({5}), loss.scope, propose=loss.uses_proposals)
            ).loss
            for batch in both
        ]
        # Losses are computed in float32.
        torch.testing.assert_close(values[1], values[0], rtol=1e-5, atol=1e-6, msg=name)
        weights = [p for p in drafter.parameters() if p.requires_grad]
        expected, found = (torch.autograd.grad(value, weights, allow_unused=True) for value in values)
        for a, b in zip(found, expected, strict=True):
            assert (a is None) == (b is None)
            if a is not None and b is not None:
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("kind", ["qwen3", "gemma3"])
@pytest.mark.parametrize("drafts", DRAFTERS)
def test_a_sequence_does_not_see_its_neighbours(
    drafts: str, kind: str, make_target: MakeTarget, make_any: MakeDrafter
) -> None:
    target = load(make_target, kind)
    drafter = make_any(drafts, target).to(target.dtype)
    target.tap(drafter.target_layer_ids)
    _, batch = batches(records())
    assert batch.layout is not None
    kept = int(batch.layout.rows.bincount().argmax())  # sequences in the row that holds most
    members = (batch.layout.rows == kept).nonzero()[:, 0].tolist()
    assert len(members) >= 3
    middle = members[1]
    begin = int(batch.layout.offsets[middle])
    end = begin + int(batch.lengths[middle])
    ids = (batch.ids + 1) % 60
    ids[kept, begin:end] = batch.ids[kept, begin:end]
    own = (batch.anchors[kept] >= begin) & (batch.anchors[kept] < end) & batch.anchor_mask[kept]
    mask = torch.zeros_like(batch.anchor_mask)
    mask[kept] = own
    assert own.sum() > 3
    for scope in ("proposals", "recorded", "none"):
        found, changed = (
            replay(target, drafter, b, Sampling(), frozenset(), scope)
            for b in (batch._replace(anchor_mask=mask), batch._replace(ids=ids, anchor_mask=mask))
        )
        same(changed, found, torch.arange(int(own.sum())))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("drafts", ["dflash", "eagle3"])
def test_fresh_anchors_are_the_same(
    drafts: str, temperature: float, make_target: MakeTarget, make_any: MakeDrafter
) -> None:
    target, sampling = load(make_target, "gemma3"), Sampling(temperature)
    drafter = make_any(drafts, target).to(target.dtype)
    target.tap(drafter.target_layer_ids)
    fresh = FreshAnchors(Walker(Rules(sampling), parallel_below=3), AnchorPolicy("visited", 5, 3))
    chosen = [fresh.renew(target, drafter, batch, read(target, batch), seed=4, step=9) for batch in batches(records())]
    expected, found = (replay(target, drafter, batch) for batch in chosen)
    same(found, expected, order(chosen[0], chosen[1]))
    assert len(found.draft_states) > 20
    assert chosen[1].made_at.tolist() == [9] * 9


def test_a_packed_batch_has_little_padding_and_the_same_sequences() -> None:
    plain, packed = batches(records())
    padding = [1 - int(b.lengths.sum()) / b.ids.numel() for b in (plain, packed)]
    assert padding[0] > 0.3 and padding[1] < 0.03
    assert torch.equal(packed.unpacked(packed.ids)[0, :31], plain.ids[0, :31])
    for name in ("starts", "lengths", "made_at"):
        assert torch.equal(getattr(packed, name), getattr(plain, name))
    chosen = [a[m] for a, m in zip(plain.anchors, plain.anchor_mask, strict=True)]
    again = packed.at(chosen, 3)
    assert torch.equal(again.anchors, packed.anchors) and torch.equal(again.anchor_mask, packed.anchor_mask)
    for batch in (plain, packed):  # as the trainer hands it on
        moved = move_data_to_device(batch, torch.device("meta"))
        assert moved.ids.is_meta and (batch.layout is None or moved.layout.rows.is_meta)
        assert (moved.layout is None) == (batch.layout is None)


def test_a_target_that_attends_its_own_way_is_refused(target: Target) -> None:
    """Its attention would see the neighbours."""
    attention = target.body.layers[1].self_attn
    attention.config = copy.deepcopy(attention.config)
    ids, begins = torch.zeros(1, 6, dtype=torch.long), torch.tensor([[0, 0, 0, 3, 3, 3]])
    for taps, refused in (((0,), False), ((2,), True)):
        target.tap(taps)
        with pytest.raises(TargetError, match="pack_to=null") if refused else nullcontext():
            target.read_features(ids, begins)
    with pytest.raises(TargetError, match="3 of 4 attend"):
        target.read(ids, target.new_cache(6), begins=begins)
    assert target.config._attn_implementation == "sdpa"


def test_rows_of_no_tokens_are_refused() -> None:
    with pytest.raises(ValueError, match="pack_to must be 1 or more"):
        ReplayDataModule(None, None, 1, 1, pack_to=0)
