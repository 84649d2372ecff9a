"""Metrics against loops, their examples, and their reduction over processes."""

from __future__ import annotations

import doctest
import importlib
import math
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from draftopd.metrics.acceptance_length import AcceptanceLength, acceptance_length
from draftopd.metrics.agreement import Agreement, expected_accepted_length, slot_agreement
from draftopd.metrics.entropy_acceptance import EDGES, EntropyAcceptance
from draftopd.metrics.positions import AcceptanceByPosition, RejectionPosition
from draftopd.replay.blocks import Blocks
from draftopd.targets.head import LMHead


@pytest.mark.parametrize("name", ["acceptance_length", "agreement", "entropy_acceptance", "positions"])
def test_docstring_examples(name: str) -> None:
    outcome = doctest.testmod(importlib.import_module(f"draftopd.metrics.{name}"))
    assert outcome.attempted > 0 and outcome.failed == 0


def test_tau_micro_and_macro() -> None:
    emitted = [[8, 8, 1], [1], [], [2, 3]]
    micro, macro = acceptance_length(emitted)
    assert micro == pytest.approx(23 / 6) and macro == pytest.approx((17 / 3 + 1 + 2.5) / 3)
    metric = AcceptanceLength()
    metric.update(emitted[:2])
    metric.update(emitted[2:])
    assert float(metric.compute()["micro"]) == pytest.approx(micro)
    assert float(metric.compute()["macro"]) == pytest.approx(macro)


def test_tau_of_nothing_is_nan() -> None:
    assert all(math.isnan(x) for x in acceptance_length([[]]))


def test_positions_against_loops() -> None:
    slots = 5
    accepted = torch.randint(0, slots + 1, (200,), generator=torch.Generator().manual_seed(0))
    rates, histogram = AcceptanceByPosition(slots), RejectionPosition(slots)
    for part in accepted.split(70):
        rates.update(part)
        histogram.update(part)
    for k in range(1, slots + 1):
        there = [n for n in accepted.tolist() if n >= k - 1]
        assert float(rates.compute()[k - 1]) == pytest.approx(sum(n >= k for n in there) / len(there))
        assert int(histogram.compute()[k - 1]) == sum(n + 1 == k for n in accepted.tolist())
    assert int(histogram.compute()[slots]) == sum(n == slots for n in accepted.tolist())


def test_blocks_cut_short_bias_no_position() -> None:
    """Texts of 12 tokens whose proposals are accepted with probability 0.8 each, whatever the slot."""
    draws, slots, pairs = torch.Generator().manual_seed(0), 5, []
    for _ in range(4_000):
        left = 12
        while left:
            n = int((torch.rand(slots, generator=draws) < 0.8).long().cumprod(0).sum())
            pairs.append((n, min(n + 1, left)))
            left -= pairs[-1][1]
    rates = AcceptanceByPosition(slots)
    rates.update(*torch.tensor(pairs).T)
    # About 4,100 blocks reach the last slot: a standard error of 0.006. Cut blocks left out, the first has 0.75.
    assert rates.compute() == pytest.approx([0.8] * slots, abs=0.025)


def random_blocks(seed: int = 0) -> Blocks:
    """Five blocks of three slots over seven tokens, one slot of which does not count."""
    generator = torch.Generator().manual_seed(seed)
    module = nn.Linear(4, 7, bias=False).requires_grad_(False)
    module.weight.copy_(torch.randn(7, 4, generator=generator))
    valid = torch.ones(5, 3, dtype=torch.bool)
    valid[1, 2] = False
    zeros = torch.zeros(5, 3, dtype=torch.long)
    drafted, targets = (torch.randn(5, 3, 4, generator=generator) for _ in range(2))
    return Blocks(drafted, targets, LMHead(module), zeros, zeros, zeros[:, 0], valid, valid)


def test_agreement_against_loops() -> None:
    blocks = random_blocks()
    q, p = blocks.head.logits(blocks.draft_states).softmax(-1), blocks.head.logits(blocks.target_states).softmax(-1)
    found = slot_agreement(blocks)
    overlap, draft, target = found
    length = 0.0
    for i in range(5):
        product = 1.0
        for k in range(3):
            alpha = sum(min(float(p[i, k, v]), float(q[i, k, v])) for v in range(7))
            assert float(overlap[i, k]) == pytest.approx(alpha, rel=1e-5)
            assert float(draft[i, k]) == pytest.approx(-sum(float(x) * math.log(x) for x in q[i, k]), rel=1e-5)
            assert float(target[i, k]) == pytest.approx(-sum(float(x) * math.log(x) for x in p[i, k]), rel=1e-5)
            product *= alpha if blocks.valid[i, k] else 0.0
            length += product
    metric = Agreement()
    metric.update(blocks, found)
    assert float(metric.compute()["expected_accepted_length"]) == pytest.approx(length / 5, rel=1e-5)
    assert float(metric.compute()["draft_entropy"]) == pytest.approx(float(draft[blocks.valid].mean()), rel=1e-5)


def test_expected_accepted_length_is_what_rejection_sampling_accepts() -> None:
    generator = torch.Generator().manual_seed(0)
    overlap = torch.tensor([[0.9, 0.5, 0.7]])
    luck = torch.rand(200_000, 3, generator=generator) < overlap
    mean = float(luck.long().cumprod(-1).sum(-1).float().mean())
    assert float(expected_accepted_length(overlap)) == pytest.approx(mean, abs=0.01)


def test_agreement_needs_scored_blocks() -> None:
    with pytest.raises(ValueError, match="states of the target"):
        slot_agreement(Blocks(**{**random_blocks().__dict__, "target_states": None}))


def entropies(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Entropies ``[200, 3]``, accepted lengths, slots that count."""
    generator = torch.Generator().manual_seed(seed)
    entropy = 3 * torch.rand(200, 3, generator=generator) ** 4
    accepted = torch.randint(0, 4, (200,), generator=generator)
    return entropy, accepted, torch.rand(200, 3, generator=generator) < 0.9


def test_acceptance_by_entropy_against_loops() -> None:
    entropy, accepted, valid = entropies(0)
    outcomes: dict[float, list[bool]] = {}
    for i in range(200):
        for k in range(min(3, int(accepted[i]) + 1)):
            if valid[i, k]:
                edge = max(e for e in EDGES if e <= float(entropy[i, k]))
                outcomes.setdefault(edge, []).append(k < int(accepted[i]))
    metric = EntropyAcceptance()
    for part in (slice(0, 50), slice(50, 200)):
        metric.update(entropy[part], accepted[part], valid[part])
    assert metric.compute() == {edge: sum(x) / len(x) for edge, x in sorted(outcomes.items())}
    assert len(outcomes) == len(EDGES)


def _worker(rank: int, directory: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{directory}/meet", rank=rank, world_size=2)
    by_entropy = EntropyAcceptance()
    tau, rates, histogram, agreement = AcceptanceLength(), AcceptanceByPosition(3), RejectionPosition(3), Agreement()
    tau.update([[4, 2], [1]] if rank == 0 else [[3]])
    for metric in (rates, histogram):
        metric.update(torch.tensor([0, 3] if rank == 0 else [2, 1, 3]))
    agreement.update(random_blocks(rank), slot_agreement(random_blocks(rank)))
    by_entropy.update(*entropies(rank))
    found = {
        "micro": float(tau.compute()["micro"]),
        "macro": float(tau.compute()["macro"]),
        "rates": rates.compute().tolist(),
        "histogram": histogram.compute().tolist(),
        "length": float(agreement.compute()["expected_accepted_length"]),
        "by_entropy": by_entropy.compute(),
    }
    torch.save(found, f"{directory}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_reduce_to_one_result(tmp_path: Path) -> None:
    mp.spawn(_worker, args=(str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert first == second
    micro, macro = acceptance_length([[4, 2], [1], [3]])
    assert first["micro"] == pytest.approx(micro) and first["macro"] == pytest.approx(macro)
    histogram = RejectionPosition(3)
    histogram.update(torch.tensor([0, 3, 2, 1, 3]))
    assert first["histogram"] == histogram.compute().tolist()
    together = Agreement()
    for seed in range(2):
        together.update(random_blocks(seed), slot_agreement(random_blocks(seed)))
    assert first["length"] == pytest.approx(float(together.compute()["expected_accepted_length"]))
    pooled = EntropyAcceptance()
    for seed in range(2):
        pooled.update(*entropies(seed))
    assert first["by_entropy"] == pooled.compute()
