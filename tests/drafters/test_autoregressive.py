"""EAGLE-3 and MTP against a dense float64 reference written out token by token."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tests.support.reference import close, rms_norm, rotate
from torch import Tensor

from draftopd.drafters import attention
from draftopd.drafters.base import Draft, Drafter
from draftopd.drafters.draft_vocabulary import frequent_tokens
from draftopd.drafters.eagle3 import Eagle3Drafter, default_target_layers
from draftopd.drafters.mtp import MTPDrafter
from draftopd.errors import DrafterError
from draftopd.targets.target import Target

MakeAny = Callable[..., Drafter]
BATCH, LENGTH = 2, 19
ANCHORS = torch.tensor([[1, 2, 18, 7, 7, 12], [5, 17, 11, 1, 3, 10]])
KINDS = ["eagle3", "eagle3_reduced", "eagle3_residual", "mtp"]


def build(make_any: MakeAny, kind: str, target: Target, **options: object) -> Drafter:
    if kind == "eagle3_residual":
        return make_any("eagle3", target, norm_before_residual=True, **options)
    return make_any(kind, target, **options)


def joined(drafter: Drafter, w: dict[str, Tensor], embedded: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """What one entry attends with, and what the layer adds to."""
    if isinstance(drafter, Eagle3Drafter):
        normed = rms_norm(state, w["hidden_norm.weight"])
        residual = normed if drafter.config.norm_before_residual else state
        return torch.cat([rms_norm(embedded, w["input_layernorm.weight"]), normed]), residual
    both = torch.cat([rms_norm(embedded, w["token_layernorm.weight"]), rms_norm(state, w["hidden_layernorm.weight"])])
    residual = w["input_proj.weight"] @ both
    return rms_norm(residual, w["input_layernorm.weight"]), residual


def reference(drafter: Drafter, target: Target, features: Tensor, ids: Tensor, anchor: int) -> tuple[Tensor, list[int]]:
    """One block's states ``[K, hidden]`` and proposals, from ``features [n, taps * hidden]`` and ``ids [n]``."""
    eagle = isinstance(drafter, Eagle3Drafter)
    prefix = "midlayer." if eagle else "mtp_layers.0."
    every = {name: t.double() for name, t in drafter.state_dict().items()}
    w = {name.removeprefix(prefix): t for name, t in every.items() if name.startswith(prefix)}
    final = every["norm.weight"] if eagle else w["final_layernorm.weight"]
    head = every["lm_head.weight"] if eagle else target.head.weight.double()
    states = [f.double() for f in features[:anchor]]
    if eagle:
        states = [every["fc.weight"] @ s for s in states]
    tokens = ids[1 : anchor + 1].tolist()
    theta, size = drafter.config.layers.rope_parameters["rope_theta"], drafter.config.layers.head_dim
    heads, groups = drafter.config.layers.num_attention_heads, drafter.config.layers.num_key_value_heads
    hidden, proposals = [], []
    for _ in range(drafter.num_proposals):
        pairs = zip(tokens, states, strict=True)
        entries = [joined(drafter, w, target.embed(torch.tensor(t)).double(), s) for t, s in pairs]
        seen, residual = torch.stack([e for e, _ in entries]), entries[-1][1]
        positions = torch.arange(len(seen))
        outputs = []
        for h in range(heads):
            own = slice(h * size, (h + 1) * size)
            shared = slice(h // (heads // groups) * size, (h // (heads // groups) + 1) * size)
            query, key = seen[-1:] @ w["self_attn.q_proj.weight"][own].T, seen @ w["self_attn.k_proj.weight"][shared].T
            if not eagle:
                query, key = rms_norm(query, w["self_attn.q_norm.weight"]), rms_norm(key, w["self_attn.k_norm.weight"])
            query, key = rotate(query, positions[-1:], theta), rotate(key, positions, theta)
            value = seen @ w["self_attn.v_proj.weight"][shared].T
            outputs.append((query @ key.T / size**0.5).softmax(-1) @ value)
        output = residual + w["self_attn.o_proj.weight"] @ torch.cat(outputs, -1)[0]
        normed = rms_norm(output, w["post_attention_layernorm.weight"])
        gate = torch.nn.functional.silu(w["mlp.gate_proj.weight"] @ normed)
        output = output + w["mlp.down_proj.weight"] @ (gate * (w["mlp.up_proj.weight"] @ normed))
        ready = rms_norm(output, final)
        best = int((head @ ready).argmax())
        if eagle and drafter.d2t is not None:
            best += int(drafter.d2t[best])
        hidden.append(ready)
        proposals.append(best)
        tokens.append(best)
        states.append(output if eagle else ready)
    return torch.stack(hidden).float(), proposals


class Setting:
    """A drafter, its target, and recorded sequences with the target's features."""

    def __init__(self, target: Target, drafter: Drafter) -> None:
        self.target, self.drafter = target.tap(drafter.target_layer_ids), drafter
        self.ids = torch.randint(64, (BATCH, LENGTH), generator=torch.Generator().manual_seed(0))
        self.features = target.read(self.ids, target.new_cache(LENGTH)).features

    def choose(self, hidden: Tensor) -> Tensor:
        return self.drafter.head(self.target).best_tokens(hidden)

    def replay(self, features: Tensor | None = None, ids: Tensor | None = None, anchors: Tensor = ANCHORS) -> Draft:
        features, ids = self.features if features is None else features, self.ids if ids is None else ids
        return self.drafter.replay(self.target, features, ids, anchors, self.choose)


@pytest.mark.parametrize("block_size", [2, 5])
@pytest.mark.parametrize("queries", [1, 7, 128])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_replay_equals_the_reference(
    kind: str, target: Target, make_any: MakeAny, block_size: int, queries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "MAX_QUERIES", queries)
    setting = Setting(target, build(make_any, kind, target, block_size=block_size))
    draft = setting.replay()
    assert draft.hidden.shape == (*ANCHORS.shape, block_size - 1, 32)
    for b, row in enumerate(ANCHORS.tolist()):
        for i, anchor in enumerate(row):
            hidden, tokens = reference(setting.drafter, target, setting.features[b], setting.ids[b], anchor)
            assert close(draft.hidden[b, i], hidden)
            assert draft.tokens[b, i].tolist() == tokens


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_replay_equals_drafting_block_by_block(kind: str, target: Target, make_any: MakeAny) -> None:
    """With a state that grows by uneven steps, holds rejected proposals, and loses rows."""
    drafter = build(make_any, kind, target)
    setting = Setting(target, drafter)
    replayed = setting.replay()
    for b in range(BATCH):
        for i, anchor in enumerate(ANCHORS[b].tolist()):
            state = drafter.start(LENGTH + 8)
            step = max(1, anchor // 3)
            for start in range(0, anchor, step):
                kept = slice(start, min(start + step, anchor))
                width = kept.stop - kept.start
                block, ids = torch.randn(BATCH, 8, setting.features.shape[-1]), torch.zeros(BATCH, 8, dtype=torch.long)
                block[:, :width], ids[:, :width] = setting.features[:, kept], setting.ids[:, kept]
                drafter.observe(target, state, block, ids, torch.arange(start, start + 8).expand(BATCH, -1))
            drafter.select(state, torch.tensor([b]))
            tokens = setting.ids[b, anchor][None]
            draft = drafter.draft(target, state, torch.tensor([anchor]), tokens, anchor, setting.choose)
            assert close(draft.hidden[0, 0], replayed.hidden[b, i])
            assert torch.equal(draft.tokens[0, 0], replayed.tokens[b, i])


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_rows_at_different_anchors_draft_together(kind: str, target: Target, make_any: MakeAny) -> None:
    drafter = build(make_any, kind, target)
    setting = Setting(target, drafter)
    state = drafter.start(LENGTH + 3)
    drafter.observe(target, state, setting.features, setting.ids, torch.arange(LENGTH).expand(BATCH, -1))
    replayed = setting.replay()
    for i in range(ANCHORS.shape[1]):
        anchors = ANCHORS[:, i]
        tokens = setting.ids.gather(1, anchors[:, None])[:, 0]
        # More is shown than either row may see.
        draft = drafter.draft(target, state, anchors, tokens, LENGTH + 3, setting.choose)
        assert close(draft.hidden[:, 0], replayed.hidden[:, i])


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_block_sees_what_stands_before_it(kind: str, target: Target, make_any: MakeAny) -> None:
    """Features strictly before the anchor, tokens up to it; but not the first token, which follows nothing."""
    setting = Setting(target, build(make_any, kind, target))
    anchors = torch.tensor([[7], [7]])
    drafted = setting.replay(anchors=anchors).hidden
    for position in range(LENGTH):
        features, ids = setting.features.clone(), setting.ids.clone()
        features[:, position] = torch.randn(features[:, position].shape)
        changed = setting.replay(features, anchors=anchors).hidden
        assert torch.equal(changed, drafted) if position >= 7 else not close(changed, drafted, 1e-4)
        ids[:, position] = (ids[:, position] + 1) % 64
        changed = setting.replay(ids=ids, anchors=anchors).hidden
        assert torch.equal(changed, drafted) if position > 7 or position == 0 else not close(changed, drafted, 1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_every_weight_learns_and_the_target_does_not(kind: str, target: Target, make_any: MakeAny) -> None:
    setting = Setting(target, build(make_any, kind, target))
    draft = setting.replay()
    setting.drafter.head(target).logits(draft.hidden).logsumexp(-1).sum().backward()
    for name, parameter in setting.drafter.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
    assert all(parameter.grad is None for parameter in target.parameters())


@torch.no_grad()
def test_a_chooser_can_lead_the_way(target: Target, make_any: MakeAny) -> None:
    """The tokens it gives are the ones that the next slots follow, as in SFT."""
    setting = Setting(target, make_any("eagle3", target, block_size=4))
    anchors = torch.tensor([[7], [7]])
    texts = setting.ids[:, None, 8:11]
    slot = iter(range(3))
    drafter = setting.drafter
    led = drafter.replay(target, setting.features, setting.ids, anchors, lambda _: texts[..., next(slot)][..., None])
    assert torch.equal(led.tokens, texts)
    own = setting.replay(anchors=anchors)
    assert close(led.hidden[:, :, 0], own.hidden[:, :, 0]) and not close(led.hidden, own.hidden, 1e-3)


class TestVocabulary:
    def test_proposals_come_from_it(self, target: Target, make_any: MakeAny) -> None:
        setting = Setting(target, make_any("eagle3_reduced", target))
        assert (setting.replay().tokens % 3 != 1).all()
        logits = setting.drafter.head(target).target_logits(torch.randn(5, 32))
        assert logits.shape == (5, 64)
        assert torch.equal(logits.isinf(), (torch.arange(64) % 3 == 1).expand(5, -1))

    def test_the_most_frequent_tokens(self) -> None:
        texts = [[5, 5, 5, 2, 2, 9], [9, 2, 7]]
        assert frequent_tokens(iter(texts), 3, 10).tolist() == [2, 5, 9]
        assert frequent_tokens(iter(texts), 6, 10).tolist() == [0, 1, 2, 5, 7, 9]

    @pytest.mark.parametrize(("texts", "size"), [([[1]], 0), ([[1]], 11), ([], 3)])
    def test_refusals(self, texts: list[list[int]], size: int) -> None:
        with pytest.raises(DrafterError, match="draft_vocab_size"):
            frequent_tokens(texts, size, 10)

    def test_build_takes_it_from_the_texts(self, target: Target, tokenizer) -> None:
        drafter = Eagle3Drafter.build(target, tokenizer, lambda: [[4, 4, 6]], draft_vocab_size=2)
        assert drafter.t2d is not None and drafter.t2d.nonzero()[:, 0].tolist() == [4, 6]
        assert drafter.d2t is not None and drafter.d2t.tolist() == [4, 5]
        assert torch.equal(drafter.lm_head.weight, target.head.weight[[4, 6]])
        with pytest.raises(DrafterError, match="no"):
            Eagle3Drafter.build(target, tokenizer, draft_vocab_size=2)


@pytest.mark.parametrize(
    ("layers", "expected"), [(36, (1, 17, 32)), (24, (1, 11, 20)), (7, (1, 2, 3)), (6, (0, 3, 5)), (2, (0, 1))]
)
def test_default_target_layers(layers: int, expected: tuple[int, ...]) -> None:
    assert default_target_layers(layers) == expected


def test_an_mtp_head_begins_as_the_targets_last_layer(target: Target) -> None:
    drafter = MTPDrafter.build(target, None)
    last = dict(target.body.layers[-1].named_parameters())
    own = dict(drafter.layer.named_parameters())
    assert all(torch.equal(own[name], last[name]) for name in last)
    fresh = MTPDrafter.build(target, None, intermediate_size=20)
    assert fresh.layer.mlp.gate_proj.weight.shape == (20, 32)
    assert drafter.target_layer_ids == (4,)


@torch.no_grad()
def test_the_layer_after_the_last_is_the_final_norm(target: Target) -> None:
    ids = torch.arange(9)[None]
    target.tap((4, 1))
    reading = target.read(ids, target.new_cache(9))
    assert torch.equal(reading.features[..., :32], reading.hidden)
    torch.testing.assert_close(target.read_features(ids), reading.features)
