"""Draws of training above temperature 0: no micro-batch, step or process repeats another's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch.distributed as dist
from tests.support.fitting import batches, fit
from tests.support.models import MakeDrafter

from draftopd.decoding.rules import Rules
from draftopd.decoding.sampling import Sampling
from draftopd.distributed import ranks
from draftopd.losses.distilled import Distilled
from draftopd.losses.divergence import forward_kl
from draftopd.targets.target import Target
from draftopd.training.module import DraftModule


def test_no_micro_batch_repeats_another(
    target: Target, make_drafter: MakeDrafter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = DraftModule(target, make_drafter(target), Distilled(accepted=forward_kl), Rules(Sampling(1.0)))
    real, drawn = module._draws, []

    def seed(purpose: int) -> int:
        drawn.append(real(purpose))
        return drawn[-1]

    monkeypatch.setattr(module, "_draws", seed)
    fit(module, batches(module, 6), tmp_path, accumulate_grad_batches=3)
    assert len(drawn) == 6 and len({seed % 2**32 for seed in drawn}) == 6  # torch's generator takes 32 bits


def test_each_process_has_a_seed_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ranks.own(7) == 7
    monkeypatch.setattr(ranks, "count", lambda: 3)
    found = []
    for rank in range(3):
        monkeypatch.setattr(dist, "get_rank", lambda rank=rank: rank)
        found.append(ranks.own(7))
    assert found[0] == 7 and len({seed % 2**32 for seed in found}) == 3  # torch's generator takes 32 bits
