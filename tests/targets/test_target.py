"""The frozen target against the plain transformers model."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests.support.models import KINDS, MakeTarget
from tests.support.reference import close
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from draftopd.errors import TargetError
from draftopd.io import hub
from draftopd.targets import target as target_module
from draftopd.targets.cache import PositionCache
from draftopd.targets.load import load_target, load_tokenizer, stop_tokens
from draftopd.targets.target import Target

BATCH, LENGTH = 3, 21

Plain = Callable[[str], PreTrainedModel]


@pytest.fixture(scope="session")
def plain(target_dirs: dict[str, Path]) -> Plain:
    """``(kind) -> model``, read once by transformers itself; it is only read from, and keeps nothing."""
    return functools.cache(lambda kind: AutoModelForCausalLM.from_pretrained(target_dirs[kind], dtype="float32").eval())


def random_tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(64, shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def states(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """The plain model's states after the final norm, ``[batch, n, hidden]``."""
    return model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state


CASES = [(kind, how) for kind in KINDS for how in ("sdpa", "eager") if (kind, how) != ("gpt_oss", "sdpa")]


@pytest.fixture(params=CASES, ids="-".join)
def case(request: pytest.FixtureRequest) -> tuple[str, str]:
    """A kind of target and an implementation of its attention; gpt-oss has eager attention only."""
    return request.param


@pytest.fixture
def kind(case: tuple[str, str]) -> str:
    return case[0]


@pytest.fixture
def loaded(case: tuple[str, str], make_target: MakeTarget) -> Target:
    target = make_target(case[0], attn_implementation=case[1])
    assert target.config._attn_implementation == case[1]
    return target


def test_reading_at_once(loaded: Target, kind: str, plain: Plain) -> None:
    ids = random_tokens(BATCH, LENGTH)
    model = plain(kind)
    reading = loaded.read(ids, loaded.new_cache(LENGTH))
    assert close(reading.hidden, states(model, ids))
    assert reading.features.shape == (BATCH, LENGTH, 0)
    with torch.no_grad():
        assert close(loaded.head.logits(reading.hidden), model(ids).logits)


def test_reading_token_by_token(loaded: Target, kind: str, plain: Plain) -> None:
    ids = random_tokens(BATCH, LENGTH)
    cache = loaded.new_cache(LENGTH)
    read = [loaded.read(ids[:, t : t + 1], cache, torch.full((BATCH, 1), t), t + 1).hidden for t in range(LENGTH)]
    assert close(torch.cat(read, 1), states(plain(kind), ids))


def test_reading_ragged_blocks_over_stale_entries(loaded: Target, kind: str, plain: Plain) -> None:
    """As in decoding: rows advance unevenly, and what lies past a row's accepted tokens is rubbish."""
    ids, size = random_tokens(BATCH, LENGTH), 4
    expected = states(plain(kind), ids)
    cache = loaded.new_cache(LENGTH + 2 * size)
    lengths = torch.tensor([3, 7, 5])
    prompts = torch.where(torch.arange(7) < lengths[:, None], ids[:, :7], random_tokens(BATCH, 7, seed=1))
    found = loaded.read(prompts, cache).hidden
    for row in range(BATCH):
        assert close(found[row, : lengths[row]], expected[row, : lengths[row]])
    step = 0
    while int(lengths.min()) < LENGTH:
        step += 1
        accepted = torch.randint(1, size + 1, (BATCH,), generator=torch.Generator().manual_seed(step))
        positions = lengths[:, None] + torch.arange(size)
        block = random_tokens(BATCH, size, seed=100 + step)
        for row in range(BATCH):
            kept = ids[row, lengths[row] : lengths[row] + accepted[row]]
            block[row, : len(kept)] = kept
        # More keys than needed are shown: entries past a row's block must stay out of sight.
        found = loaded.read(block, cache, positions, int(positions.max()) + 1).hidden
        for row in range(BATCH):
            after = expected[row, lengths[row] : lengths[row] + accepted[row]]
            assert len(after) == 0 or close(found[row, : len(after)], after)
        lengths = (lengths + accepted).clamp_max(LENGTH)


class TestScoreBlocks:
    """Every block against a full forward of the prefix and the block's own tokens."""

    SIZE = 4

    @pytest.fixture
    def recorded(self, loaded: Target) -> tuple[Tensor, PositionCache]:
        ids = random_tokens(BATCH, LENGTH)
        cache = loaded.new_cache(LENGTH)
        loaded.read(ids, cache)
        return ids, cache

    @pytest.fixture
    def blocks(self) -> tuple[Tensor, Tensor]:
        """Anchors in no order, one twice, first and last position included; and block tokens."""
        anchors = torch.tensor([[1, 2, 9, 9, 20, 14, 3], [20, 5, 0, 1, 1, 2, 13], [8, 4, 19, 20, 11, 6, 7]])
        return anchors, random_tokens(BATCH, 7, self.SIZE, seed=1)

    @pytest.fixture
    def expected(self, kind: str, plain: Plain, blocks: tuple[Tensor, Tensor]) -> Tensor:
        model, (anchors, tokens) = plain(kind), blocks
        ids = random_tokens(BATCH, LENGTH)
        rows = [
            [
                states(model, torch.cat([ids[b, :a], tokens[b, i]])[None])[0, -self.SIZE :]
                for i, a in enumerate(row.tolist())
            ]
            for b, row in enumerate(anchors)
        ]
        return torch.stack([torch.stack(row) for row in rows])

    def test_equals_full_forwards(
        self,
        loaded: Target,
        recorded: tuple[Tensor, PositionCache],
        blocks: tuple[Tensor, Tensor],
        expected: Tensor,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        for queries in (1, 4, 12, 1024):
            monkeypatch.setattr(target_module, "MAX_BLOCK_QUERIES", queries)
            scored = loaded.score_blocks(recorded[1], LENGTH, *blocks)
            assert scored.shape == expected.shape
            assert close(scored, expected), f"with {queries} queries at once"

    def test_computes_the_block_tokens_only(
        self, loaded: Target, recorded: tuple[Tensor, PositionCache], blocks: tuple[Tensor, Tensor]
    ) -> None:
        seen: list[int] = []
        loaded.body.layers[0].register_forward_hook(lambda _m, args, _out: seen.append(args[0].shape[1]))
        before = [store.keys.clone() for store in recorded[1].stores]
        loaded.score_blocks(recorded[1], LENGTH, *blocks)
        assert sum(seen) == blocks[1][0].numel()
        assert all(torch.equal(old, store.keys) for old, store in zip(before, recorded[1].stores, strict=True))

    def test_recorded_tokens_at_or_after_the_anchor_are_unseen(
        self, loaded: Target, recorded: tuple[Tensor, PositionCache], blocks: tuple[Tensor, Tensor]
    ) -> None:
        anchors, tokens = torch.full_like(blocks[0], 9), blocks[1]
        scored = loaded.score_blocks(recorded[1], LENGTH, anchors, tokens)
        changed = {}
        for position in (8, 9):
            ids = recorded[0].clone()
            ids[:, position:] = (ids[:, position:] + 1) % 64
            cache = loaded.new_cache(LENGTH)
            loaded.read(ids, cache)
            changed[position] = loaded.score_blocks(cache, LENGTH, anchors, tokens)
        assert close(changed[9], scored)
        assert not close(changed[8], scored, 1e-2)


def test_taps_are_the_layers_outputs(loaded: Target, kind: str, plain: Plain) -> None:
    ids = random_tokens(BATCH, LENGTH)
    model = plain(kind)
    with torch.no_grad():
        found = model(ids, output_hidden_states=True)
    for taps in [(1,), (0, 2), (2, 0, 1), (1, 1)]:
        features = loaded.tap(taps).read(ids, loaded.new_cache(LENGTH)).features
        expected = torch.cat([found.hidden_states[i + 1] for i in taps], -1)
        assert close(features, expected)
    # transformers' last entry has passed the final norm; the tap has not.
    last = loaded.tap((3,)).read(ids, loaded.new_cache(LENGTH)).features
    assert close(loaded.body.norm(last), found.hidden_states[4])


@pytest.mark.parametrize("taps", [(0,), (2, 0), (3, 1), (1, 1)])
def test_features_alone(loaded: Target, taps: tuple[int, ...]) -> None:
    """The layers above the last tap are left out, and readings before and after are the same."""
    ids = random_tokens(BATCH, LENGTH)
    reading = loaded.tap(taps).read(ids, loaded.new_cache(LENGTH))
    computed: list[int] = []
    for i, layer in enumerate(loaded.body.layers):
        layer.register_forward_pre_hook(lambda _m, _args, i=i: computed.append(i))
    assert close(loaded.read_features(ids), reading.features)
    assert computed == list(range(max(taps) + 1))
    again = loaded.read(ids, loaded.new_cache(LENGTH))
    assert torch.equal(again.hidden, reading.hidden) and torch.equal(again.features, reading.features)
    assert not loaded._tapped


def test_tapping_again_drops_the_former_taps(target: Target) -> None:
    for taps in [(0, 1, 2), (2,)]:
        target.tap(taps)
    assert sum(len(layer._forward_hooks) for layer in target.body.layers) == 1
    assert target.read(random_tokens(1, 3), target.new_cache(3)).features.shape == (1, 3, 32)
    assert not target._tapped


@pytest.mark.parametrize("wrong", [5, -1])
def test_taps_outside_the_target_are_refused(target: Target, wrong: int) -> None:
    with pytest.raises(TargetError, match=rf"\[{wrong}\].*layers 0 to 3"):
        target.tap((1, wrong))


def test_stays_frozen_and_in_eval_mode(target: Target) -> None:
    parent = nn.ModuleDict({"target": target, "drafter": nn.Linear(2, 2)}).train()
    assert parent["drafter"].training
    assert not any(module.training for module in target.modules())
    assert not any(parameter.requires_grad for parameter in target.parameters())
    reading = target.tap((1,)).read(random_tokens(1, 3), target.new_cache(3))
    assert not reading.hidden.requires_grad and not reading.features.requires_grad


def test_shape_and_embedding(target: Target, target_dirs: dict[str, Path], plain: Plain) -> None:
    assert (target.hidden_size, target.vocab_size, target.num_layers, target.max_positions) == (32, 64, 4, 256)
    assert target.device.type == "cpu" and target.dtype == torch.float32
    ids = random_tokens(2, 5)
    assert torch.equal(target.embed(ids), plain("qwen3").get_input_embeddings()(ids))
    assert load_target(str(target_dirs["qwen3"]), dtype="bfloat16", device="cpu").dtype == torch.bfloat16


class TestRefusals:
    @pytest.mark.parametrize("path", ["/no/such/directory", "Qwen/Qwen3-30B-A3B-Thinking-2507", "bundled:nothing"])
    def test_an_unknown_path(self, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(hub, "_hub_reachable", lambda: False)
        for load in (load_target, load_tokenizer):
            with pytest.raises(TargetError, match=r"target\.path=") as raised:
                load(path)
            assert path.removeprefix("bundled:") in str(raised.value)

    def test_other_kinds_of_attention(self) -> None:
        shape = {"vocab_size": 8, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2,
                 "num_key_value_heads": 1, "intermediate_size": 8, "max_position_embeddings": 64}  # fmt: skip
        model = Qwen2ForCausalLM(Qwen2Config(**shape))
        model.config.layer_types = ["full_attention", "chunked_attention"]
        with pytest.raises(TargetError, match="chunked_attention.*full or sliding-window"):
            Target(model)

    def test_an_lm_head_with_a_bias(self) -> None:
        shape = {"vocab_size": 8, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2,
                 "num_key_value_heads": 1, "intermediate_size": 8, "max_position_embeddings": 64}  # fmt: skip
        model = Qwen2ForCausalLM(Qwen2Config(**shape))
        model.lm_head = nn.Linear(8, 8)
        with pytest.raises(TargetError, match="LM head has a bias"):
            Target(model)


def test_kinds_of_attention() -> None:
    shape = {"vocab_size": 8, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2,
             "num_key_value_heads": 1, "intermediate_size": 8, "max_position_embeddings": 64}  # fmt: skip
    mixed = Qwen2Config(**shape, use_sliding_window=True, sliding_window=8, max_window_layers=1)
    assert Target(Qwen2ForCausalLM(mixed)).masks.kinds == ("full_attention", "sliding_attention")
    for window, kind in ((8, "sliding_attention"), (None, "full_attention"), (64, "full_attention")):
        target = Target(MistralForCausalLM(MistralConfig(**shape, sliding_window=window)))
        assert target.masks.kinds == (kind,) and target.masks.window == (window or 64)


def test_eager_attention_is_chosen_where_there_is_no_other(target_dirs: dict[str, Path]) -> None:
    for kind, expected in (("gpt_oss", "eager"), ("qwen3", "sdpa")):
        assert load_target(str(target_dirs[kind])).config._attn_implementation == expected


def test_stop_tokens(target: Target, tokenizer: PreTrainedTokenizerFast) -> None:
    end = tokenizer.eos_token_id
    for configured, expected in [(None, {end}), (9, {9, end}), ([7, 9], {7, 9, end}), ([end], {end})]:
        target.model.generation_config.eos_token_id = configured
        assert stop_tokens(target, tokenizer) == expected
    tokenizer_without_end = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    target.model.generation_config.eos_token_id = None
    assert stop_tokens(target, tokenizer_without_end) == frozenset()
