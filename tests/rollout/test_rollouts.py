"""Rollouts with and without decoding give the same records, and a batch finds its anchors afresh."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.support.batches import chosen_batch, replay
from tests.support.models import MakeRequest

from draftopd.decoding.sampling import Sampling
from draftopd.replay.blocks import Scope
from draftopd.replay.fresh import FreshAnchors
from draftopd.replay.replay import draft, read
from draftopd.rollout.anchors import AnchorPolicy
from draftopd.rollout.buffer import Recorded
from draftopd.rollout.request import Request
from draftopd.rollout.rollouts import DecodeFreeRollout, FreshRollout, Rollout, SpeculativeRollout, TargetRollout
from draftopd.rollout.trajectories import InProcessTrajectories
from draftopd.rollout.walk import text_seed


def flat(rollout: Rollout, request: Request) -> list[Recorded]:
    return [record for batch in rollout.collect(request) for record in batch]


@pytest.mark.parametrize("batch_size", [1, 5, 64])
def test_decode_free_records_are_those_of_speculative_decoding(
    batch_size: int, tmp_path: Path, make_request: MakeRequest
) -> None:
    request = make_request()
    decode_free = DecodeFreeRollout(InProcessTrajectories(str(tmp_path)), batch_size)
    assert flat(decode_free, request) == flat(SpeculativeRollout(4), request)
    assert decode_free.counts()["generated"] == 12


def test_a_rollout_for_fresh_anchors_brings_texts_only(tmp_path: Path, make_request: MakeRequest) -> None:
    request = make_request()
    texts = InProcessTrajectories(str(tmp_path))
    plain = flat(FreshRollout(texts), request)
    assert plain == flat(TargetRollout(texts), request)
    assert all(r.anchors == [] for r in plain)
    assert [r.tokens for r in plain] == [r.tokens for r in flat(DecodeFreeRollout(texts), request)]


def test_a_text_keeps_its_draws_whatever_is_beside_it(tmp_path: Path, make_request: MakeRequest) -> None:
    request = make_request(sampling=Sampling(1.0))
    rollout = DecodeFreeRollout(InProcessTrajectories(str(tmp_path)), 4)
    plain = flat(FreshRollout(rollout.trajectories), request)

    def anchored(records: list[Recorded], seed: int) -> list[Recorded]:
        return rollout.anchored(replace(request, seed=seed), records)

    whole = anchored(plain, 1)
    assert [r.tokens for r in whole] == [r.tokens for r in plain]
    assert anchored(plain[3:8][::-1], 1) == whole[3:8][::-1]
    assert anchored(plain, 2) != whole
    assert text_seed(1, [1, 2]) != text_seed(1, [2, 1]) != text_seed(2, [2, 1])


@pytest.mark.parametrize("choice", ["visited", "error"])
@pytest.mark.parametrize("scope", ["proposals", "until_fail", "none"])
def test_a_replay_with_fresh_anchors_is_one_at_recorded_anchors(
    choice: str, scope: Scope, tmp_path: Path, make_request: MakeRequest
) -> None:
    request = make_request()
    texts = InProcessTrajectories(str(tmp_path))
    policy = AnchorPolicy(choice, None, request.drafter.num_proposals)
    fresh = FreshAnchors(FreshRollout(texts).walker(request.rules), policy)
    recorded = chosen_batch(flat(DecodeFreeRollout(texts), request), policy)
    bare = chosen_batch(flat(FreshRollout(texts), request), policy)
    assert not bare.anchor_mask.any()
    reading = read(request.target, bare, states=scope != "none")
    found = fresh.renew(request.target, request.drafter, bare, reading, seed=0, step=9)
    assert found.made_at.tolist() == [9] * len(found.ids)
    drafts = draft(request.target, request.drafter, reading, found, request.rules, forced=scope == "none")
    blocks = drafts.blocks(scope)
    expected = replay(request.target, request.drafter, recorded, Sampling(), request.rules.stop, scope)
    assert torch.equal(blocks.proposals, expected.proposals) and torch.equal(blocks.accepted, expected.accepted)
    torch.testing.assert_close(blocks.draft_states, expected.draft_states)
    assert blocks.draft_states.requires_grad and (blocks.target_states is None) == (scope == "none")


def test_fresh_anchors_above_temperature_zero(tmp_path: Path, make_request: MakeRequest) -> None:
    request = make_request(sampling=Sampling(1.0))
    rollout = FreshRollout(InProcessTrajectories(str(tmp_path)))
    policy = AnchorPolicy("visited", 3, request.drafter.num_proposals)
    fresh = FreshAnchors(rollout.walker(request.rules), policy)
    assert fresh.needs_states
    bare = chosen_batch(flat(rollout, request), policy)
    reading = read(request.target, bare)

    def chosen(seed: int) -> list[list[int]]:
        found = fresh.renew(request.target, request.drafter, bare, reading, seed, step=0)
        return [a[m].tolist() for a, m in zip(found.anchors, found.anchor_mask, strict=True)]

    first = chosen(0)
    assert first == chosen(0) != chosen(1)
    assert max(map(len, first)) == 3
