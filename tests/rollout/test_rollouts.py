"""Rollouts with and without decoding give the same records, and a batch finds its anchors afresh."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.support.batches import chosen_batch
from tests.support.models import MakeRequest

from draftopd.decoding.sampling import Sampling
from draftopd.replay.batch import ReplayBatch
from draftopd.replay.blocks import Scope
from draftopd.replay.fresh import FreshAnchors
from draftopd.replay.replay import replay
from draftopd.rollout.anchors import AnchorPolicy
from draftopd.rollout.buffer import Recorded
from draftopd.rollout.request import Request
from draftopd.rollout.rollouts import DecodeFreeRollout, Rollout, SpeculativeRollout, TargetRollout
from draftopd.rollout.trajectories import InProcessTrajectories
from draftopd.rollout.walk import text_seed


def flat(rollout: Rollout, request: Request) -> list[Recorded]:
    return [record for batch in rollout.collect(request) for record in batch]


@pytest.mark.parametrize("batch_size", [1, 5, 64])
def test_decode_free_records_are_those_of_speculative_decoding(
    batch_size: int, tmp_path: Path, make_request: MakeRequest
) -> None:
    request = make_request()
    decode_free = DecodeFreeRollout(InProcessTrajectories(str(tmp_path)), batch_size, max_new_tokens=20)
    assert decode_free.records_anchors and decode_free.walker is not None
    assert flat(decode_free, request) == flat(SpeculativeRollout(4, max_new_tokens=20), request)
    assert decode_free.counts()["generated"] == 12


def test_texts_only(tmp_path: Path, make_request: MakeRequest) -> None:
    request = make_request()
    texts = InProcessTrajectories(str(tmp_path))
    decode_free = DecodeFreeRollout(texts, max_new_tokens=20)
    plain = flat(decode_free.texts_only(), request)
    assert plain == flat(TargetRollout(texts, max_new_tokens=20), request)
    assert all(r.anchors == [] for r in plain)
    assert [r.tokens for r in plain] == [r.tokens for r in flat(decode_free, request)]


def test_a_text_keeps_its_draws_whatever_stands_beside_it(tmp_path: Path, make_request: MakeRequest) -> None:
    request = make_request(sampling=Sampling(1.0))
    rollout = DecodeFreeRollout(InProcessTrajectories(str(tmp_path)), 4, max_new_tokens=20, temperature=1.0)
    plain = flat(rollout.texts_only(), request)
    whole = rollout.anchored(request.target, request.drafter, plain, seed=1)
    assert [r.tokens for r in whole] == [r.tokens for r in plain]
    assert rollout.anchored(request.target, request.drafter, plain[3:8][::-1], seed=1) == whole[3:8][::-1]
    assert rollout.anchored(request.target, request.drafter, plain, seed=2) != whole
    assert text_seed(1, [1, 2]) != text_seed(1, [2, 1]) != text_seed(2, [2, 1])


@pytest.mark.parametrize("choice", ["visited", "error"])
@pytest.mark.parametrize("teacher", ["proposals", "until_fail", "none"])
def test_a_replay_with_fresh_anchors_is_one_at_recorded_anchors(
    choice: str, teacher: Scope, tmp_path: Path, make_request: MakeRequest
) -> None:
    request = make_request()
    rollout = DecodeFreeRollout(InProcessTrajectories(str(tmp_path)), max_new_tokens=20)
    policy = AnchorPolicy(choice, None, request.drafter.num_proposals)
    fresh = FreshAnchors(rollout.walker, policy)
    recorded = chosen_batch(flat(rollout, request), policy)
    bare = chosen_batch(flat(rollout.texts_only(), request), policy)
    assert not bare.anchor_mask.any()

    def find(batch: ReplayBatch, features: torch.Tensor, states: torch.Tensor | None) -> ReplayBatch:
        found = fresh.renew(request.target, request.drafter, batch, features, states, seed=0, step=9)
        assert found.made_at.tolist() == [9] * len(found.ids)
        return found

    common = request.target, request.drafter
    expected = replay(*common, recorded, Sampling(), request.stop, teacher)
    blocks = replay(*common, bare, Sampling(), request.stop, teacher, reanchor=find)
    assert torch.equal(blocks.proposals, expected.proposals) and torch.equal(blocks.accepted, expected.accepted)
    torch.testing.assert_close(blocks.draft_states, expected.draft_states)
    assert blocks.draft_states.requires_grad and (blocks.target_states is None) == (teacher == "none")


def test_fresh_anchors_above_temperature_zero(tmp_path: Path, make_request: MakeRequest) -> None:
    request = make_request(sampling=Sampling(1.0))
    rollout = DecodeFreeRollout(InProcessTrajectories(str(tmp_path)), max_new_tokens=20, temperature=1.0)
    policy = AnchorPolicy("visited", 3, request.drafter.num_proposals)
    fresh = FreshAnchors(rollout.walker, policy)
    bare = chosen_batch(flat(rollout.texts_only(), request), policy)

    def replayed(seed: int) -> list[list[int]]:
        chosen = []

        def find(batch: ReplayBatch, features: torch.Tensor, states: torch.Tensor | None) -> ReplayBatch:
            assert states is not None
            found = fresh.renew(request.target, request.drafter, batch, features, states, seed, step=0)
            chosen.extend(a[m].tolist() for a, m in zip(found.anchors, found.anchor_mask, strict=True))
            return found

        generator = torch.Generator().manual_seed(0)
        replay(
            request.target, request.drafter, bare, Sampling(1.0), request.stop, "none", generator, reanchor=find,
            with_states=True,
        )  # fmt: skip
        return chosen

    first = replayed(0)
    assert first == replayed(0) != replayed(1)
    assert max(map(len, first)) == 3
