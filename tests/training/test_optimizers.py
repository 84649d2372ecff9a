"""Optimizers and schedules that the configuration names."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from draftopd.training.optimizers import Together, adamw, muon
from draftopd.training.schedules import constant, cosine


def layers() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 4), nn.LayerNorm(4), nn.Linear(4, 100, bias=False))


def take_steps(module: nn.Module, optimizer: torch.optim.Optimizer, count: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        module(torch.randn(5, 6, generator=generator)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def test_muon_takes_the_matrices_and_adamw_the_rest() -> None:
    module = layers()
    optimizer = muon(module.parameters(), lr=0.01)
    assert isinstance(optimizer, Together)
    parts = [{id(p) for group in part.param_groups for p in group["params"]} for part in optimizer.parts]
    wide_head, matrix = module[2].weight, module[0].weight
    assert parts[0] == {id(matrix)} and id(wide_head) in parts[1]
    assert parts[0] | parts[1] == {id(p) for p in module.parameters()}


def test_each_part_steps_as_it_does_alone() -> None:
    one, other = layers(), layers()
    take_steps(one, muon(one.parameters(), lr=0.01, weight_decay=0.1), 3, seed=1)
    alone = [
        torch.optim.Muon([other[0].weight], lr=0.01, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw"),
        adamw([p for p in other.parameters() if p is not other[0].weight], lr=0.01, weight_decay=0.1),
    ]
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        other(torch.randn(5, 6, generator=generator)).square().mean().backward()
        for part in alone:
            part.step()
            part.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_a_schedule_reaches_every_part_after_the_state_was_restored() -> None:
    whole, parted = layers(), layers()
    optimizer = muon(whole.parameters(), lr=0.01)
    schedule = cosine(optimizer, total_steps=8)
    for step in range(6):
        take_steps(whole, optimizer, 1, seed=step)
        schedule.step()
    first = muon(parted.parameters(), lr=0.01)
    early = cosine(first, total_steps=8)
    for step in range(3):
        take_steps(parted, first, 1, seed=step)
        early.step()
    second = muon(parted.parameters(), lr=0.01)
    late = cosine(second, total_steps=8)
    second.load_state_dict(first.state_dict())
    late.load_state_dict(early.state_dict())
    for step in range(3, 6):
        take_steps(parted, second, 1, seed=step)
        late.step()
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), parted.parameters(), strict=True))
    assert {group["lr"] for group in second.param_groups} == {late.get_last_lr()[0]}


def rates(schedule: torch.optim.lr_scheduler.LRScheduler, count: int) -> list[float]:
    found = []
    for _ in range(count):
        found.append(schedule.get_last_lr()[0])
        schedule.optimizer.step()
        schedule.step()
    return found


def test_cosine() -> None:
    found = rates(cosine(adamw(layers().parameters(), lr=2.0), total_steps=20, warmup=0.2, final=0.1), 25)
    rise = [2.0 * (step + 1) / 4 for step in range(4)]
    fall = [2.0 * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * min(1, step / 16)))) for step in range(21)]
    assert found == pytest.approx(rise + fall)


def test_constant() -> None:
    assert rates(constant(adamw(layers().parameters(), lr=2.0), total_steps=8, warmup=0.25), 5) == [
        1.0,
        2.0,
        2.0,
        2.0,
        2.0,
    ]
