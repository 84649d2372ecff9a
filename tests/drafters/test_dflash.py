"""The DFlash drafter against a dense float64 reference written out block by block."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.support.models import MakeDrafter
from tests.support.reference import close, rms_norm, rotate
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from transformers import PreTrainedTokenizerFast, Starcoder2Config, Starcoder2ForCausalLM

from draftopd.drafters import attention
from draftopd.drafters.base import Draft
from draftopd.drafters.checkpoint import save_drafter
from draftopd.drafters.dflash import DFlashDrafter, default_target_layers, unused_token, usual_block_size
from draftopd.drafters.initial import final_norm_weight
from draftopd.errors import DrafterError
from draftopd.targets.load import load_target
from draftopd.targets.shape import TargetShape
from draftopd.targets.target import Target

BATCH, LENGTH = 2, 19
ANCHORS = torch.tensor([[1, 2, 18, 7, 7, 12], [5, 19, 11, 1, 3, 10]])


def reference(drafter: DFlashDrafter, target: Target, features: Tensor, anchor: int, token: int) -> Tensor:
    """One block's states ``[K, hidden]``: ``features [n, taps * hidden]`` before the anchor, then the block."""
    w = {name: tensor.double() for name, tensor in drafter.state_dict().items()}
    heads, groups, size = 4, 2, 16
    context = rms_norm(features[:anchor].double() @ w["fc.weight"].T, w["hidden_norm.weight"])
    ids = torch.tensor([token] + [drafter.config.mask_token_id] * (drafter.block_size - 1))
    block = target.embed(ids).double()
    positions = torch.arange(anchor + drafter.block_size)
    theta = drafter.config.layers.rope_parameters["rope_theta"]
    for i in range(len(drafter.layers)):
        layer = {name.removeprefix(f"layers.{i}."): t for name, t in w.items() if name.startswith(f"layers.{i}.")}
        normed = rms_norm(block, layer["input_layernorm.weight"])
        seen = torch.cat([context, normed])
        outputs = []
        for head in range(heads):
            own = slice(head * size, (head + 1) * size)
            shared = slice(head // (heads // groups) * size, (head // (heads // groups) + 1) * size)
            query = rms_norm(normed @ layer["self_attn.q_proj.weight"][own].T, layer["self_attn.q_norm.weight"])
            key = rms_norm(seen @ layer["self_attn.k_proj.weight"][shared].T, layer["self_attn.k_norm.weight"])
            value = seen @ layer["self_attn.v_proj.weight"][shared].T
            query, key = rotate(query, positions[anchor:], theta), rotate(key, positions, theta)
            outputs.append((query @ key.T / size**0.5).softmax(-1) @ value)
        block = block + torch.cat(outputs, -1) @ layer["self_attn.o_proj.weight"].T
        normed = rms_norm(block, layer["post_attention_layernorm.weight"])
        gate = torch.nn.functional.silu(normed @ layer["mlp.gate_proj.weight"].T)
        block = block + (gate * (normed @ layer["mlp.up_proj.weight"].T)) @ layer["mlp.down_proj.weight"].T
    return rms_norm(block[1:], w["norm.weight"]).float()


class Setting:
    """A drafter, its target, and recorded sequences with the target's features."""

    def __init__(self, target: Target, drafter: DFlashDrafter, anchors: Tensor = ANCHORS) -> None:
        self.target, self.drafter, self.anchors = target.tap(drafter.target_layer_ids), drafter, anchors
        generator = torch.Generator().manual_seed(0)
        self.ids = torch.randint(64, (BATCH, LENGTH + 1), generator=generator)
        cache = target.new_cache(LENGTH)
        self.features = target.read(self.ids[:, :LENGTH], cache).features

    def choose(self, hidden: Tensor) -> Tensor:
        return self.target.head.logits(hidden).argmax(-1)

    def replay(self, features: Tensor | None = None, anchors: Tensor | None = None) -> Draft:
        anchors = self.anchors if anchors is None else anchors
        features = self.features if features is None else features
        return self.drafter.replay(self.target, features, self.ids, anchors, self.choose)

    def expected(self) -> Tensor:
        rows = [
            [reference(self.drafter, self.target, self.features[b], a, int(self.ids[b, a])) for a in row]
            for b, row in enumerate(self.anchors.tolist())
        ]
        return torch.stack([torch.stack(row) for row in rows])


@pytest.fixture
def setting(target: Target, make_drafter: MakeDrafter) -> Setting:
    return Setting(target, make_drafter(target))


@pytest.mark.parametrize("block_size", [2, 5])
@pytest.mark.parametrize(("num_layers", "taps"), [(1, (2,)), (3, (2, 0, 1))])
@pytest.mark.parametrize("queries", [1, 7, 128])
@torch.no_grad()
def test_replay_equals_the_reference(
    target: Target,
    make_drafter: MakeDrafter,
    block_size: int,
    num_layers: int,
    taps: tuple[int, ...],
    queries: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(attention, "MAX_QUERIES", queries)
    drafter = make_drafter(target, num_layers, block_size, target_layer_ids=taps)
    setting = Setting(target, drafter, anchors=torch.cat([ANCHORS, torch.zeros(BATCH, 1, dtype=torch.long)], 1))
    draft, expected = setting.replay(), setting.expected()
    assert draft.hidden.shape == (BATCH, 7, block_size - 1, 32)
    assert close(draft.hidden, expected)
    assert torch.equal(draft.tokens, setting.choose(expected))


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:flex_attention called")
@pytest.mark.parametrize("begins", [None, torch.tensor([[0, 0, 3, 3, 7], [0, 2, 2, 2, 2]])])
def test_flex_attention_equals_scaled_dot_products(
    begins: torch.Tensor | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own plain path, forward only: on a CPU it has no backward, and its compiled one is a GPU's affair."""
    plainly = {"flex_attention": flex_attention, "create_block_mask": create_block_mask}
    monkeypatch.setattr(attention, "_compiled", plainly.__getitem__)
    generator = torch.Generator().manual_seed(0)
    ends = torch.tensor([[0, 2, 5, 9, 9], [1, 3, 4, 8, 11]])
    query = torch.randn(2, 4, 5, 3, 16, generator=generator)
    context, block = (
        (torch.randn(2, 2, *shape, 16, generator=generator), torch.randn(2, 2, *shape, 16, generator=generator))
        for shape in ((12,), (5, 3))
    )
    flex, plain = attention.View.by_flex(ends, begins, 3, 12), attention.View.in_chunks(ends, begins, 3)
    assert flex.mask is not None and plain.mask is None
    found, expected = (attention.block_attention(query, context, block, view) for view in (flex, plain))
    torch.testing.assert_close(found, expected)


@torch.no_grad()
def test_replay_equals_drafting_block_by_block(setting: Setting) -> None:
    """With a state that grows by uneven steps, holds rejected proposals' features, and loses rows."""
    drafter, target, replayed = setting.drafter, setting.target, setting.replay()
    for b in range(BATCH):
        for i, anchor in enumerate(setting.anchors[b].tolist()):
            state = drafter.start(LENGTH + 8)
            step = max(1, anchor // 3)
            for start in range(0, anchor, step):
                positions = torch.arange(start, start + 8).expand(BATCH, -1)
                block = torch.randn(BATCH, 8, setting.features.shape[-1])
                kept = setting.features[:, start : min(start + step, anchor)]
                block[:, : kept.shape[1]] = kept
                drafter.observe(target, state, block, positions, positions)
            for store in state:
                store.select(torch.tensor([b]))
            anchors, tokens = torch.tensor([anchor]), setting.ids[b, anchor][None]
            draft = drafter.draft(target, state, anchors, tokens, anchor, setting.choose)
            assert close(draft.hidden[0, 0], replayed.hidden[b, i])
            assert torch.equal(draft.tokens[0, 0], replayed.tokens[b, i])


@torch.no_grad()
def test_rows_at_different_anchors_draft_together(setting: Setting) -> None:
    state = setting.drafter.start(LENGTH + 3)
    positions = torch.arange(LENGTH).expand(BATCH, -1)
    setting.drafter.observe(setting.target, state, setting.features, setting.ids[:, :LENGTH], positions)
    replayed = setting.replay()
    for i in range(setting.anchors.shape[1]):
        anchors = setting.anchors[:, i]
        tokens = setting.ids.gather(1, anchors[:, None])[:, 0]
        # More is shown than either row may see.
        draft = setting.drafter.draft(setting.target, state, anchors, tokens, LENGTH + 3, setting.choose)
        assert close(draft.hidden[:, 0], replayed.hidden[:, i])


@torch.no_grad()
def test_context_ends_strictly_before_the_anchor(setting: Setting) -> None:
    anchors = torch.tensor([[7], [7]])
    drafted = setting.replay(anchors=anchors).hidden
    for position in range(LENGTH):
        features = setting.features.clone()
        features[:, position] = torch.randn(features[:, position].shape)
        changed = setting.replay(features, anchors).hidden
        assert torch.equal(changed, drafted) if position >= 7 else not close(changed, drafted, 1e-4)


@torch.no_grad()
def test_blocks_do_not_see_one_another(setting: Setting) -> None:
    together = setting.replay()
    for i in range(setting.anchors.shape[1]):
        assert close(setting.replay(anchors=setting.anchors[:, i : i + 1]).hidden[:, 0], together.hidden[:, i])


@torch.no_grad()
def test_attention_in_the_block_is_bidirectional(setting: Setting) -> None:
    """A longer block changes the earlier slots; under a causal mask it would not."""
    short = setting.replay().hidden
    setting.drafter.block_size += 1
    longer = setting.replay().hidden
    assert longer.shape[2] == short.shape[2] + 1
    assert ((longer[:, :, :-1] - short).abs().amax(-1) > 1e-3).all()


def test_every_weight_learns_and_the_target_does_not(setting: Setting) -> None:
    draft = setting.replay()
    setting.target.head.logits(draft.hidden).logsumexp(-1).sum().backward()
    for name, parameter in setting.drafter.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
    assert all(parameter.grad is None for parameter in setting.target.parameters())


@pytest.mark.parametrize(
    ("drafter_layers", "target_layers", "expected"),
    [
        (5, 36, (1, 9, 17, 25, 33)),
        (8, 48, (1, 7, 14, 20, 26, 32, 39, 45)),
        (1, 36, (18,)),
        (1, 4, (2,)),
        (2, 6, (1, 3)),
    ],
)
def test_default_target_layers(drafter_layers: int, target_layers: int, expected: tuple[int, ...]) -> None:
    assert default_target_layers(drafter_layers, target_layers) == expected


def test_default_target_layers_are_distinct_and_inside() -> None:
    for target_layers in range(1, 20):
        for drafter_layers in range(1, 8):
            layers = default_target_layers(drafter_layers, target_layers)
            assert sorted(set(layers)) == list(layers)
            assert layers[0] >= 0 and layers[-1] < target_layers


def test_a_fresh_drafter_takes_the_targets_shape(target: Target) -> None:
    drafter = DFlashDrafter.build(target, None, num_layers=2, block_size=6, mask_token_id=3)
    assert drafter.target_layer_ids == default_target_layers(2, 4)
    assert (drafter.block_size, drafter.num_proposals, drafter.config.mask_token_id) == (6, 5, 3)
    shape = drafter.config.layers
    assert (shape.hidden_size, shape.vocab_size, shape.intermediate_size, shape.head_dim) == (32, 64, 48, 16)
    assert (shape.num_attention_heads, shape.num_key_value_heads) == (4, 2)
    assert shape.rope_parameters["rope_theta"] == 1_000.0
    narrow = DFlashDrafter.build(target, None, num_layers=1, mask_token_id=3, intermediate_size=20)
    assert narrow.config.layers.intermediate_size == 20


def test_a_final_layer_norm_gives_its_scales() -> None:
    shape = {"vocab_size": 8, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2,
             "num_key_value_heads": 1, "intermediate_size": 8, "max_position_embeddings": 64}  # fmt: skip
    target = Target(Starcoder2ForCausalLM(Starcoder2Config(**shape)))
    scales = target.body.norm.weight.data.uniform_(0.5, 1.5)
    assert torch.equal(final_norm_weight(target), scales)


def test_a_fresh_drafter_fits_each_kind_of_target(target_dirs: dict[str, Path], make_drafter: MakeDrafter) -> None:
    for kind in ("qwen3", "qwen3_moe", "llama"):
        target = load_target(str(target_dirs[kind]), dtype="float32")
        setting = Setting(target, make_drafter(target))
        assert setting.replay().tokens.shape == (*ANCHORS.shape, 3)


class TestCheckFits:
    @pytest.mark.parametrize(
        ("field", "value", "message"),
        [
            ("target", TargetShape(48, 64, 4), "hidden size is 48.*32"),
            ("target", TargetShape(32, 100, 4), "vocabulary is 100.*64"),
            ("target", TargetShape(32, 64, 36), "target layers is 36.*4"),
            ("target_layer_ids", (1, 4), r"\[4\].*0 to 3"),
            ("target_layer_ids", (-1,), r"\[-1\].*0 to 3"),
            ("mask_token_id", 64, "mask_token_id 64.*64"),
            ("mask_token_id", -1, "mask_token_id -1"),
            ("block_size", 1, "block_size 1"),
            ("block_size", 0, "block_size 0"),
            ("block_size", 1025, "block_size 1025 is above"),
        ],
    )
    def test_refusals(self, target: Target, make_drafter: MakeDrafter, field: str, value: object, message: str) -> None:
        config = make_drafter(target).config
        config.check_fits(target.shape)
        with pytest.raises(DrafterError, match=message):
            replace(config, **{field: value}).check_fits(target.shape)

    def test_a_fresh_drafter_is_checked(self, target: Target) -> None:
        with pytest.raises(DrafterError, match="block_size 1"):
            DFlashDrafter.build(target, None, num_layers=1, block_size=1, mask_token_id=63)
        with pytest.raises(DrafterError, match="mask_token_id"):
            DFlashDrafter.build(target, None, num_layers=1, block_size=4, mask_token_id=64)
        with pytest.raises(DrafterError, match="target layers"):
            DFlashDrafter.build(target, None, num_layers=1, mask_token_id=63, target_layer_ids=[9])


class TestBuild:
    def test_fresh(self, target: Target, tokenizer: PreTrainedTokenizerFast) -> None:
        drafter = DFlashDrafter.build(target, tokenizer, num_layers=2, block_size=8)
        assert (drafter.block_size, drafter.config.mask_token_id) == (8, tokenizer.mask_token_id)
        assert len(drafter.layers) == 2
        drafter = DFlashDrafter.build(target, tokenizer, num_layers=1, mask_token_id=7, target_layer_ids=[0, 3])
        assert (drafter.config.mask_token_id, drafter.target_layer_ids) == (7, (0, 3))
        assert drafter.block_size == usual_block_size(target.num_layers) == 8
        assert [usual_block_size(layers) for layers in (11, 12, 36)] == [8, 16, 16]

    def test_from_a_checkpoint(
        self, target: Target, tokenizer: PreTrainedTokenizerFast, make_drafter: MakeDrafter, tmp_path: Path
    ) -> None:
        save_drafter(make_drafter(target), tmp_path)
        assert DFlashDrafter.build(target, tokenizer, checkpoint=str(tmp_path)).block_size == 4
        assert DFlashDrafter.build(target, tokenizer, checkpoint=str(tmp_path), block_size=6).block_size == 6
        with pytest.raises(DrafterError, match="block_size 1"):
            DFlashDrafter.build(target, tokenizer, checkpoint=str(tmp_path), block_size=1)

    def test_unused_token(self, target: Target, tokenizer: PreTrainedTokenizerFast) -> None:
        assert unused_token(target, tokenizer) == tokenizer.mask_token_id
        bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<|im_end|>")
        target.head = type("Head", (), {"weight": torch.zeros(len(bare) + 3, 1)})()
        assert unused_token(target, bare) == len(bare)
        target.head = type("Head", (), {"weight": torch.zeros(len(bare), 1)})()
        assert unused_token(target, bare) == bare.eos_token_id
