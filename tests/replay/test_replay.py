"""Replay: the identity between recorded and replayed blocks, the scope's states, the streams."""

from __future__ import annotations

import pytest
import torch
from tests.support.batches import as_batch, decode, replay
from tests.support.models import DRAFTERS, KINDS, MakeDrafter, MakeTarget

from draftopd.decoding.generate import Decoder
from draftopd.decoding.rules import Rules
from draftopd.decoding.sampling import Sampling
from draftopd.losses.cross_entropy import CrossEntropy
from draftopd.losses.distilled import Distilled
from draftopd.losses.divergence import forward_kl
from draftopd.replay.batch import ReplayBatch
from draftopd.replay.blocks import Blocks, Scope
from draftopd.targets.target import Target


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("drafts", DRAFTERS)
def test_replay_at_visited_anchors_repeats_the_rollout(
    kind: str, drafts: str, make_target: MakeTarget, make_any: MakeDrafter
) -> None:
    target = make_target(kind)
    drafter = make_any(drafts, target)
    decoded = decode(target, drafter)
    blocks = replay(target, drafter, as_batch(decoded), Sampling(), frozenset())
    proposals = [p for d in decoded for p in d.proposals]
    assert blocks.proposals.tolist() == proposals
    lengths = [(n, e) for d in decoded for n, e in zip(d.accepted, d.emitted, strict=True)]
    whole = [i for i, (n, e) in enumerate(lengths) if e == n + 1]
    assert [int(blocks.accepted[i]) for i in whole] == [lengths[i][0] for i in whole]


def test_replay_repeats_the_rollout_of_the_bundled_pair(bundled_pair) -> None:
    """The same where acceptance really happens."""
    target, drafter, prompts, stop = bundled_pair
    decoded = Decoder(target, drafter, Rules(stop=stop, max_new_tokens=160)).decode_batch(prompts)
    blocks = replay(target, drafter, as_batch(decoded), Sampling(), stop)
    flat = [(p, n, e) for d in decoded for p, n, e in zip(d.proposals, d.accepted, d.emitted, strict=True)]
    assert blocks.proposals.tolist() == [p for p, _, _ in flat]
    whole = [i for i, (_, n, e) in enumerate(flat) if e == n + 1]
    assert [int(blocks.accepted[i]) for i in whole] == [flat[i][1] for i in whole]
    assert sum(flat[i][1] for i in whole) > len(whole)
    # Against recorded tokens alone the same lengths follow, wherever all slots are recorded.
    cheap = replay(target, drafter, as_batch(decoded), Sampling(), stop, scope="none")
    assert cheap.target_states is None
    sure = cheap.recorded.all(-1)
    assert torch.equal(cheap.accepted[sure], blocks.accepted[sure])
    # Up to the first rejection the recorded text's states are those on the drafter's own tokens.
    prefix = replay(target, drafter, as_batch(decoded), Sampling(), stop, scope="until_fail")
    assert prefix.target_states is not None and blocks.target_states is not None
    assert torch.equal(prefix.valid, blocks.valid & blocks.recorded & blocks.until_fail())
    torch.testing.assert_close(
        prefix.target_states[prefix.valid], blocks.target_states[prefix.valid], rtol=1e-3, atol=1e-3
    )
    for options in ({"accept_until_fail": True}, {"include_correction": True, "rejected_weight": 0.0}):
        loss = Distilled(accepted=forward_kl, **options)
        assert loss.scope == "until_fail"
        kept = Blocks(**{**blocks.__dict__, "valid": blocks.valid & blocks.recorded})
        torch.testing.assert_close(loss(prefix).loss, loss(kept).loss, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("drafts", DRAFTERS)
def test_target_states_are_those_on_prefix_and_proposals(drafts: str, target: Target, make_any: MakeDrafter) -> None:
    drafter = make_any(drafts, target)
    decoded = decode(target, drafter, count=3)
    blocks = replay(target, drafter, as_batch(decoded, blocks=4), Sampling(), frozenset())
    assert blocks.target_states is not None
    index = 0
    for d in decoded:
        for anchor in d.anchors[:4]:
            text = [*d.tokens[: anchor + 1], *blocks.proposals[index].tolist()]
            reading = target.read(torch.tensor([text]), target.new_cache(len(text)))
            expected = reading.hidden[0, anchor : anchor + drafter.num_proposals]
            torch.testing.assert_close(blocks.target_states[index], expected, rtol=1e-4, atol=1e-5)
            index += 1


@pytest.mark.parametrize("drafts", DRAFTERS)
def test_gradients_reach_the_drafter_only(drafts: str, target: Target, make_any: MakeDrafter) -> None:
    drafter = make_any(drafts, target)
    blocks = replay(target, drafter, as_batch(decode(target, drafter)), Sampling(), frozenset())
    blocks.head.logits(blocks.draft_states).logsumexp(-1).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in drafter.parameters())
    assert all(p.grad is None for p in target.parameters())


def test_slots_after_a_proposed_stop_do_not_count(target: Target, make_drafter: MakeDrafter) -> None:
    drafter = make_drafter(target)
    batch = as_batch(decode(target, drafter))
    free = replay(target, drafter, batch, Sampling(), frozenset())
    assert free.valid.all()
    token = int(free.proposals[:, 0].mode().values)
    blocks = replay(target, drafter, batch, Sampling(), frozenset({token}))
    for row, valid in zip(blocks.proposals.tolist(), blocks.valid.tolist(), strict=True):
        end = row.index(token) if token in row else len(row)
        assert valid == [k <= end for k in range(len(row))]


def test_recorded_slots_end_with_the_text(target: Target, make_drafter: MakeDrafter) -> None:
    drafter = make_drafter(target)
    decoded = decode(target, drafter, count=2)
    blocks = replay(target, drafter, as_batch(decoded), Sampling(), frozenset())
    index = 0
    for d in decoded:
        for anchor in d.anchors:
            rest = d.tokens[anchor + 1 : anchor + drafter.block_size]
            kept = blocks.recorded[index]
            assert int(kept.sum()) == len(rest)
            assert blocks.labels[index][kept].tolist() == rest
            index += 1


@pytest.mark.parametrize("drafts", DRAFTERS)
def test_target_states_on_the_recorded_text(drafts: str, target: Target, make_any: MakeDrafter) -> None:
    """Its states are those before each recorded token; an autoregressive drafter goes on from recorded tokens."""
    drafter = make_any(drafts, target)
    decoded = decode(target, drafter, count=3)
    batch = as_batch(decoded)
    blocks = replay(target, drafter, batch, Sampling(), frozenset({5}), scope="recorded")
    assert blocks.target_states is not None
    assert torch.equal(blocks.valid, blocks.recorded & blocks.head.covers(blocks.labels))
    index = 0
    for d in decoded:
        ids = torch.tensor([d.tokens])
        reading = target.read(ids, target.new_cache(ids.shape[1]))
        for anchor in d.anchors:
            count = min(drafter.num_proposals, len(d.tokens) - 1 - anchor)
            torch.testing.assert_close(
                blocks.target_states[index, :count], reading.hidden[0, anchor : anchor + count], rtol=1e-4, atol=1e-5
            )
            taken: list[torch.Tensor] = []

            def led(hidden: torch.Tensor, anchor: int = anchor, text: torch.Tensor = ids, taken: list = taken):
                begin = anchor + 1 + sum(t.shape[-1] for t in taken)
                places = torch.arange(begin, begin + hidden.shape[2]).clamp_max(text.shape[1] - 1)
                taken.append(text[0, places][None, None])
                return taken[-1]

            draft = drafter.replay(target, reading.features, ids, torch.tensor([[anchor]]), led)
            torch.testing.assert_close(
                blocks.draft_states[index, :count], draft.hidden[0, 0, :count], rtol=1e-4, atol=1e-4
            )
            index += 1
    assert index == len(blocks.draft_states)


@pytest.mark.parametrize("drafts", DRAFTERS)
@pytest.mark.parametrize("scope", ["proposals", "until_fail", "recorded", "none"])
def test_what_is_measured_is_scored_whatever_is_learnt(
    scope: Scope, drafts: str, target: Target, make_any: MakeDrafter
) -> None:
    drafter = make_any(drafts, target)
    batch = as_batch(decode(target, drafter, count=4))
    seen = replay(target, drafter, batch, Sampling(), frozenset({5}), scope, measured=True)
    alone = replay(target, drafter, batch, Sampling(), frozenset({5}), scope)
    torch.testing.assert_close(seen.draft_states, alone.draft_states)
    own = replay(target, drafter, batch, Sampling(), frozenset({5}))
    assert seen.target_states is not None and own.target_states is not None
    assert torch.equal(seen.accepted, own.accepted)  # the accepted prefix is the same, whatever is fed after it
    if scope in ("proposals", "until_fail") or not drafter.autoregressive:
        torch.testing.assert_close(seen.target_states, own.target_states)


def test_slots_whose_token_the_vocabulary_lacks_are_not_learnt(target: Target, make_any: MakeDrafter) -> None:
    drafter = make_any("eagle3_reduced", target)
    batch = as_batch(decode(target, drafter))
    blocks = replay(target, drafter, batch)
    assert blocks.target_states is not None
    lacking = target.head.logits(blocks.target_states).argmax(-1) % 3 == 1
    assert 0.1 < lacking.float().mean() < 0.9
    assert torch.equal(blocks.valid, ~lacking)
    assert replay(target, drafter, batch, measured=True).valid.all()


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_acceptance_above_temperature_zero(
    small_vocabulary_target: Target, make_drafter: MakeDrafter, temperature: float
) -> None:
    """First-slot acceptance of many replays of one anchor has the rate ``sum_v min(p, q)``."""
    target, many, sampling = small_vocabulary_target, 6000, Sampling(temperature)
    drafter = make_drafter(target, block_size=3, target_layer_ids=(0, 1))
    target.tap(drafter.target_layer_ids)
    ids = torch.tensor([[1, 2, 3, 0, 4]])
    anchors = torch.full((1, many), 4)
    one, mask = torch.tensor([5]), torch.ones(1, many, dtype=torch.bool)
    batch = ReplayBatch(ids, one - 1, one, anchors, mask, torch.zeros(1, dtype=torch.long))
    blocks = replay(target, drafter, batch, sampling, frozenset(), generator=torch.Generator().manual_seed(0))
    assert blocks.target_states is not None
    q = sampling.probabilities(blocks.head.logits(blocks.draft_states[0, 0].detach()))
    p = sampling.probabilities(blocks.head.logits(blocks.target_states[0, 0]))
    expected = float(torch.minimum(p, q).sum())
    rate = float((blocks.accepted > 0).float().mean())
    assert 0.05 < expected < 0.95
    assert abs(rate - expected) < 4 * (expected * (1 - expected) / many) ** 0.5
    shares = torch.bincount(blocks.proposals[:, 0], minlength=6) / many
    torch.testing.assert_close(shares, q, atol=0.03, rtol=0)


@pytest.mark.parametrize("temperature", [0.7, 1.5])
def test_target_only_verification_in_replay(
    small_vocabulary_target: Target, make_drafter: MakeDrafter, temperature: float
) -> None:
    """The drafter's best tokens are proposed, and accepted as often as the target draws them."""
    target, many, sampling = small_vocabulary_target, 6000, Sampling(temperature)
    drafter = make_drafter(target, block_size=3, target_layer_ids=(0, 1))
    target.tap(drafter.target_layer_ids)
    one, mask = torch.tensor([5]), torch.ones(1, many, dtype=torch.bool)
    batch = ReplayBatch(
        torch.tensor([[1, 2, 3, 0, 4]]), one - 1, one, torch.full((1, many), 4), mask, torch.zeros(1, dtype=torch.long)
    )
    generator = torch.Generator().manual_seed(0)
    blocks = replay(
        target, drafter, batch, sampling, frozenset(), generator=generator, verification="target_only"
    )  # fmt: skip
    assert blocks.target_states is not None
    best = blocks.head.logits(blocks.draft_states.detach()).argmax(-1)
    assert torch.equal(blocks.proposals, best) and (best == best[:1]).all()
    expected = float(sampling.probabilities(blocks.head.logits(blocks.target_states[0, 0]))[best[0, 0]])
    rate = float((blocks.accepted > 0).float().mean())
    assert abs(rate - expected) < 4 * (expected * (1 - expected) / many) ** 0.5 + 1e-9


@pytest.mark.parametrize("drafts", DRAFTERS)
def test_cross_entropy_is_the_same_without_proposals(
    drafts: str, make_target: MakeTarget, make_any: MakeDrafter
) -> None:
    """Where both streams are alike no slot's weight depends on what was proposed."""
    target = make_target("qwen3")
    drafter = make_any(drafts, target)
    batch, loss = as_batch(decode(target, drafter)), CrossEntropy()
    assert not loss.uses_proposals and CrossEntropy(accept_until_fail=True).uses_proposals
    with_them, without = (
        loss(replay(target, drafter, batch, Sampling(), frozenset(), scope="none", propose=propose)).loss
        for propose in (True, False)
    )
    torch.testing.assert_close(without, with_them)


@pytest.mark.parametrize("drafts", DRAFTERS)
def test_activation_checkpointing_keeps_less_and_changes_no_gradient(
    drafts: str, make_target: MakeTarget, make_any: MakeDrafter
) -> None:
    target = make_target("qwen3")
    drafter = make_any(drafts, target)
    batch = as_batch(decode(target, drafter))

    def step() -> tuple[int, list[torch.Tensor]]:
        """Elements kept for the way back, and the gradients."""
        kept = 0

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal kept
            kept += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = CrossEntropy()(replay(target, drafter, batch, Sampling(), frozenset(), scope="none")).loss
        return kept, list(torch.autograd.grad(loss, list(drafter.parameters()), allow_unused=True))

    kept, gradients = step()
    drafter.activation_checkpointing = True
    fewer, same = step()
    assert fewer < 0.8 * kept
    for found, expected in zip(same, gradients, strict=True):
        assert (found is None) == (expected is None)
        if found is not None and expected is not None:
            torch.testing.assert_close(found, expected)
