"""Costs of steps, and the speedups that follow from them."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from tests.support.models import DRAFTERS, MakeTarget

from draftopd.drafters.base import Drafter
from draftopd.evaluation import cost
from draftopd.evaluation.cost import Costs, Prediction, best, block_sizes, measure, predict, predict_bandwidth, tau_of
from draftopd.targets.target import Target

MakeAny = Callable[..., Drafter]


def test_tau_of_smaller_blocks() -> None:
    accepted = [0, 1, 3, 3]
    assert [tau_of(accepted, size) for size in (2, 3, 4)] == [1 + 3 / 4, 1 + 5 / 4, 1 + 7 / 4]
    assert tau_of(accepted, 1) == 1.0 and tau_of(accepted, 9) == tau_of(accepted, 4)
    assert math.isnan(tau_of([], 4))


@pytest.mark.parametrize("own, sizes", [(2, [2]), (4, [2, 3, 4]), (7, [2, 3, 4, 6, 7]), (16, [2, 3, 4, 6, 8, 12, 16])])
def test_block_sizes_end_with_the_drafters_own(own: int, sizes: list[int]) -> None:
    assert block_sizes(own) == sizes


def test_predictions() -> None:
    costs = Costs(plain=0.010, draft={2: 0.002, 4: 0.004}, verify={2: 0.010, 4: 0.016})
    two, four = predict(costs, [0, 1, 3, 3])
    assert (two.block_size, four.block_size) == (2, 4)
    assert (two.tau, two.draft, two.verify) == pytest.approx((1.75, 0.2, 1.0))
    assert (four.tau, four.draft, four.verify) == pytest.approx((2.75, 0.4, 1.6))
    assert (two.speedup, four.speedup) == pytest.approx((1.75 / 1.2, 2.75 / 2.0))
    assert best([two, four]) == two and best([Prediction(8, 4.0, 0.5, 1.0), two, four]).block_size == 8


def weights_of(target: Target) -> int:
    """What a plain step reads: all but the rows of the embedding, which is the LM head where the two are tied."""
    names = dict(target.model.named_parameters())
    embedding = target.model.get_input_embeddings().weight
    tied = target.model.lm_head.weight is embedding
    return sum(p.numel() for p in names.values() if p is not embedding) + (embedding.numel() if tied else 0)


@pytest.mark.parametrize("kind", ["qwen3", "llama"])
@pytest.mark.parametrize("drafter_kind", DRAFTERS)
def test_bandwidth(kind: str, drafter_kind: str, make_target: MakeTarget, make_any: MakeAny) -> None:
    """A block-parallel drafter is read once a block, an autoregressive one once a proposal."""
    target = make_target(kind)
    drafter = make_any(drafter_kind, target, block_size=6)
    found = predict_bandwidth(target, drafter, [0, 2, 5])
    assert [p.block_size for p in found] == [2, 3, 4, 6]
    assert [p.tau for p in found] == pytest.approx([1 + 2 / 3, 1 + 4 / 3, 1 + 5 / 3, 1 + 7 / 3])
    head = drafter.head(target).weight
    own = sum(p.numel() for p in drafter.parameters() if p is not head) + head.numel()
    step = own / weights_of(target)
    passes = [1, 2, 3, 5] if drafter.autoregressive else [1, 1, 1, 1]
    assert [p.draft for p in found] == pytest.approx([step * n for n in passes])
    assert {p.verify for p in found} == {1.0}
    assert drafter.autoregressive == (drafter_kind != "dflash")


@pytest.mark.parametrize("kind", DRAFTERS)
@pytest.mark.parametrize("batch_size", [1, 3])
def test_measured_costs(
    kind: str, batch_size: int, target: Target, make_any: MakeAny, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cost, "STEPS", 3)
    drafter = make_any(kind, target, block_size=7)
    found = measure(target, drafter, context=20, batch_size=batch_size)
    assert found.plain > 0 and list(found.draft) == list(found.verify) == [2, 3, 4, 6, 7]
    assert all(seconds > 0 for seconds in [*found.draft.values(), *found.verify.values()])
    assert drafter.block_size == 7
    assert all(math.isfinite(p.speedup) for p in predict(found, [1, 2, 6]))


@pytest.mark.parametrize("context", [0, 1, 2, 5, 10_000])
def test_a_context_of_any_length_can_be_measured(
    context: int, target: Target, make_any: MakeAny, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shorter than a block, and longer than the target's positions."""
    monkeypatch.setattr(cost, "STEPS", 1)
    drafter = make_any("dflash", target, block_size=7)
    assert measure(target, drafter, context).plain > 0


def test_the_median_of_the_rounds_after_the_first(
    target: Target, make_any: MakeAny, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A clock on which every step takes its own time, and one round in three is slow."""
    monkeypatch.setattr(cost, "STEPS", 3)
    real, kinds, calls, now = target.read, 1 + 2 * 3, [-1], [0.0]  # the context is read first

    def work() -> None:
        round_, kind = divmod(calls[0], kinds)
        now[0] += 1000.0 if round_ == 0 else (kind + 1) * (50.0 if round_ == 2 else 1.0)
        calls[0] += 1

    def read(*arguments: object) -> object:
        work()
        return real(*arguments)

    drafter = make_any("dflash", target, block_size=4)
    draft = type(drafter).draft

    def slow_draft(*arguments: object, **options: object) -> object:
        work()
        return draft(*arguments, **options)

    monkeypatch.setattr(target, "read", read)
    monkeypatch.setattr(type(drafter), "draft", slow_draft)
    monkeypatch.setattr(cost.time, "perf_counter", lambda: now[0])
    found = measure(target, drafter, 20)
    assert found == Costs(1.0, {2: 5.0, 3: 6.0, 4: 7.0}, {2: 2.0, 3: 3.0, 4: 4.0})


def test_a_drafter_that_fails_keeps_its_block_size(
    target: Target, make_any: MakeAny, monkeypatch: pytest.MonkeyPatch
) -> None:
    drafter = make_any("dflash", target, block_size=6)

    def fails(*_: object, **__: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(type(drafter), "draft", fails)
    with pytest.raises(RuntimeError, match="out of memory"):
        measure(target, drafter, 20)
    assert drafter.block_size == 6


def test_what_is_timed_is_what_decoding_does(
    target: Target, make_any: MakeAny, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every verification reads a block of its size with the drafter's taps, a plain step one token without."""
    monkeypatch.setattr(cost, "STEPS", 1)
    drafter, read, seen = make_any("eagle3", target, block_size=4), target.read, []

    def spy(ids: torch.Tensor, *arguments: object, **options: object):
        seen.append((tuple(ids.shape), target.taps))
        return read(ids, *arguments, **options)

    monkeypatch.setattr(target, "read", spy)
    measure(target, drafter, 20, batch_size=2)
    taps = drafter.target_layer_ids
    assert seen[0] == ((2, 20), taps)
    assert seen[1:] == [((2, 1), ()), ((2, 2), taps), ((2, 3), taps), ((2, 4), taps)] * 2
