"""Anchors without decoding: identical to real decoding at temperature 0, of the same law above it."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from scipy import stats
from tests.support.models import DRAFTERS, KINDS, MakeDrafter, MakeTarget

from draftopd.data.prompts import PromptEncoder, ReasoningPrompts
from draftopd.decoding import coupling
from draftopd.decoding.generate import Decoded, Decoder
from draftopd.decoding.rules import Rules
from draftopd.decoding.sampling import Sampling, inverse_draw
from draftopd.drafters.base import Drafter
from draftopd.drafters.dflash import DFlashDrafter
from draftopd.drafters.load import load_drafter
from draftopd.rollout.walk import Visited, Walker
from draftopd.targets.load import load_target, load_tokenizer
from draftopd.targets.target import Target


def as_visited(decoded: Decoded) -> Visited:
    return Visited(decoded.anchors, decoded.accepted, decoded.emitted, decoded.proposals)


def walk(
    target: Target, drafter: Drafter, decoded: Sequence[Decoded], walker: Walker, first_seed: int = 0
) -> list[Visited]:
    rows = [torch.tensor(d.tokens) for d in decoded]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=7)  # padding must not show
    starts, lengths = torch.tensor([len(d.prompt) for d in decoded]), torch.tensor([len(r) for r in rows])
    seeds = range(first_seed, first_seed + len(decoded))
    return walker.walk(target, drafter, walker.read(target, ids, starts, lengths), seeds)


def decode(
    target: Target, drafter: Drafter | None, count: int = 12, sampling: Sampling = Sampling(), **options
) -> list[Decoded]:
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(0, 60, (4 + i % 5,), generator=generator).tolist() for i in range(count)]
    options = {"max_new_tokens": 30, "stop": frozenset({3, 11})} | options
    return Decoder(target, drafter, Rules(sampling, **options)).decode_batch(prompts, generator)


WAYS = {
    "walk": {"parallel_below": 0},
    "walk, then everywhere": {"parallel_below": 5},
    "everywhere": {"parallel_below": 99},
    "everywhere, few blocks at once": {"parallel_below": 99, "blocks_at_once": 12 * 4},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("drafts", ("dflash", "eagle3_reduced", "mtp"))
def test_greedy_anchors_are_those_of_decoding(
    kind: str, drafts: str, make_target: MakeTarget, make_any: MakeDrafter
) -> None:
    target = make_target(kind)
    drafter = make_any(drafts, target)
    decoded = decode(target, drafter)
    for way, options in WAYS.items():
        assert walk(target, drafter, decoded, Walker(Rules(), **options)) == [as_visited(d) for d in decoded], way


def test_greedy_anchors_where_acceptance_really_happens(bundled_pair) -> None:
    target, drafter, prompts, stop = bundled_pair
    decoded = Decoder(target, drafter, Rules(stop=stop, max_new_tokens=160)).decode_batch(prompts)
    assert sum(n for d in decoded for n in d.accepted) > sum(len(d.anchors) for d in decoded)
    for way, options in WAYS.items():
        assert walk(target, drafter, decoded, Walker(Rules(), **options)) == [as_visited(d) for d in decoded], way


@pytest.mark.parametrize("temperature", [0.7, 1.5])
def test_target_only_anchors_are_those_of_decoding(temperature: float, bundled_pair) -> None:
    """Target-only verification compares the text with the drafter's best tokens, so nothing is drawn."""
    target, drafter, prompts, stop = bundled_pair
    sampling = Sampling(temperature, top_p=0.95)
    decoder = Decoder(target, drafter, Rules(sampling, "target_only", stop=stop, max_new_tokens=100))
    decoded = decoder.decode_batch(prompts, torch.Generator().manual_seed(5))
    walker = Walker(Rules(sampling, "target_only"), parallel_below=3)
    assert walk(target, drafter, decoded, walker) == [as_visited(d) for d in decoded]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "count"),
    [("untrained", 40), ("tiny_dflash", 120), ("tiny_dflash_opd", 80), ("tiny_eagle3", 80), ("tiny_mtp", 80)],
)
def test_greedy_anchors_of_held_out_prompts(name: str, count: int) -> None:
    target, tokenizer = load_target("bundled:tiny_target", dtype="float32"), load_tokenizer("bundled:tiny_target")
    if name == "untrained":
        torch.manual_seed(0)
        drafter: Drafter = DFlashDrafter.build(target, None, num_layers=1, block_size=8, mask_token_id=5)
    else:
        drafter = load_drafter(f"bundled:{name}")
    target.tap(drafter.target_layer_ids)
    prompts = PromptEncoder(tokenizer).take(ReasoningPrompts("validation"), range(count))
    decoder = Decoder(target, drafter.eval(), Rules(stop=frozenset({tokenizer.eos_token_id}), max_new_tokens=256))
    decoded = [d for batch in decoder.decode(prompts, count) for d in batch]
    found = walk(target, drafter, decoded, Walker(Rules()))
    pairs = [(a, as_visited(d)) for a, d in zip(found, decoded, strict=True)]
    assert all(a[:3] == b[:3] for a, b in pairs)
    # Among thousands of proposals the drafter's two best tokens may tie; other batch shapes then round to the other.
    assert sum(a.proposals == b.proposals for a, b in pairs) >= count - 1


def test_responses_of_one_token_have_no_anchors(target: Target, make_drafter: MakeDrafter) -> None:
    drafter = make_drafter(target)
    target.tap(drafter.target_layer_ids)
    decoded = decode(target, None, count=3, max_new_tokens=1)
    for options in WAYS.values():
        assert walk(target, drafter, decoded, Walker(Rules(), **options)) == [Visited([], [], [], [])] * 3
    mixed = [*decoded, *decode(target, drafter, count=9)]
    assert walk(target, drafter, mixed, Walker(Rules()))[3:] == [as_visited(d) for d in mixed[3:]]


@pytest.mark.parametrize("drafts", DRAFTERS)
@pytest.mark.parametrize("sampling", [Sampling(1.0), Sampling(0.7, top_k=5), Sampling(1.3, top_p=0.8)])
def test_drawn_anchors_depend_on_neither_batch_nor_way(
    sampling: Sampling, drafts: str, target: Target, make_any: MakeDrafter
) -> None:
    drafter = make_any(drafts, target)
    decoded = decode(target, drafter, sampling=sampling)
    whole = walk(target, drafter, decoded, Walker(Rules(sampling)))
    assert any(n for v in whole for n in v.accepted) and any(n < 3 for v in whole for n in v.accepted)
    for options in WAYS.values():
        assert walk(target, drafter, decoded, Walker(Rules(sampling), **options)) == whole
    parts = [walk(target, drafter, decoded[i : i + 5], Walker(Rules(sampling)), first_seed=i) for i in range(0, 12, 5)]
    assert [v for part in parts for v in part] == whole
    assert walk(target, drafter, decoded, Walker(Rules(sampling)), first_seed=100) != whole


def test_accepted_proposals_are_the_text(target: Target, make_drafter: MakeDrafter) -> None:
    drafter, sampling = make_drafter(target, block_size=4), Sampling(1.0, top_k=8)
    decoded = decode(target, drafter, sampling=sampling)
    for d, v in zip(decoded, walk(target, drafter, decoded, Walker(Rules(sampling))), strict=True):
        assert sum(v.emitted) == len(d.response) - 1
        for anchor, n, proposals in zip(v.anchors, v.accepted, v.proposals, strict=True):
            assert proposals[:n] == d.tokens[anchor + 1 : anchor + 1 + n]
            after = d.tokens[anchor + n + 1 : anchor + n + 2]
            assert n == 3 or not after or proposals[n] != after[0]


@pytest.mark.parametrize("options", [{"parallel_below": -1}, {"blocks_at_once": 0}])
def test_numbers_out_of_range_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="parallel_below must be 0 or more"):
        Walker(Rules(), **options)


# The joint law of proposals, accepted lengths and text, whole responses long.

RESPONSES = 40_000
NEW_TOKENS = 3


def outcomes(decoded: Sequence[Decoded], visited: Sequence[Visited]) -> dict[tuple, int]:
    counts: dict[tuple, int] = {}
    for d, v in zip(decoded, visited, strict=True):
        # Of the last block only what is within the text: beyond it both ways draw alike, and it would only add rare
        # outcomes.
        key = (tuple(d.response), tuple(v.accepted), tuple(map(tuple, v.proposals[:1])))
        counts[key] = counts.get(key, 0) + 1
    return counts


def two_sample(first: dict[tuple, int], second: dict[tuple, int]) -> float:
    """How likely two samples of equal size have one law (chi-square, rare outcomes pooled)."""
    keys = sorted(set(first) | set(second))
    table = torch.tensor([[first.get(k, 0), second.get(k, 0)] for k in keys], dtype=torch.float64)
    rare = table.sum(1) < 20
    table = torch.cat([table[~rare], table[rare].sum(0, keepdim=True)])
    table = table[table.sum(1) > 0]
    return float(stats.chi2_contingency(table.T.numpy()).pvalue)


def real_and_walked(target: Target, drafter: Drafter, sampling: Sampling) -> tuple[dict[tuple, int], dict[tuple, int]]:
    """Outcomes of real decoding, and of walking texts that the target alone decoded."""
    drafter.config.check_fits(target.shape)
    prompts = [[1, 2, 3, 0, 4]] * RESPONSES
    target.tap(drafter.target_layer_ids)
    generator = torch.Generator().manual_seed(11)
    real = Decoder(target, drafter, Rules(sampling, max_new_tokens=NEW_TOKENS)).decode_batch(prompts, generator)
    plain = Decoder(target, None, Rules(sampling, max_new_tokens=NEW_TOKENS)).decode_batch(prompts, generator)
    target.tap(drafter.target_layer_ids)
    walked = walk(target, drafter, plain, Walker(Rules(sampling)))
    return outcomes(real, [as_visited(d) for d in real]), outcomes(plain, walked)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("drafts", "sampling"),
    [
        ("dflash", Sampling(0.7)),
        ("dflash", Sampling(1.0)),
        *((drafts, Sampling(1.0, top_k=4, top_p=0.9)) for drafts in ("dflash", "eagle3_reduced", "mtp")),
    ],
)
def test_joint_law_is_that_of_decoding(
    sampling: Sampling, drafts: str, small_vocabulary_target: Target, make_any: MakeDrafter
) -> None:
    drafter = make_any(drafts, small_vocabulary_target, block_size=3)
    real, walked = real_and_walked(small_vocabulary_target, drafter, sampling)
    assert len(real) > 50
    assert two_sample(real, walked) > 1e-3
    # The test would see one response in a hundred go astray.
    (most, count), other = max(real.items(), key=lambda item: item[1]), min(walked, key=lambda k: walked[k])
    moved = min(RESPONSES // 100, count)
    assert two_sample(real, walked | {most: walked[most] - moved, other: walked[other] + moved}) < 1e-6


@pytest.mark.slow
def test_a_wrong_residual_is_noticed(
    small_vocabulary_target: Target, make_drafter: MakeDrafter, monkeypatch: pytest.MonkeyPatch
) -> None:
    drafter = make_drafter(small_vocabulary_target, block_size=3, target_layer_ids=(0, 1))
    monkeypatch.setattr(coupling, "draw_rejected", lambda q, p, rejected, luck: inverse_draw(q, luck))
    real, walked = real_and_walked(small_vocabulary_target, drafter, Sampling(1.0))
    assert two_sample(real, walked) < 1e-9
