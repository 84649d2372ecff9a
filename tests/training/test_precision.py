"""Training in bfloat16 beside training in float32."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import lightning as L
import pytest
import torch
from hydra.utils import instantiate
from tests.support.fitting import batches, fit
from tests.support.losses import loss_config
from tests.support.models import DRAFTERS

from draftopd.decoding.rules import Rules
from draftopd.drafters.base import Drafter
from draftopd.losses.cross_entropy import CrossEntropy
from draftopd.targets.target import Target
from draftopd.training.module import DraftModule
from draftopd.training.optimizers import adamw

STEPS = 6


@pytest.mark.parametrize("drafts", DRAFTERS)
def test_bf16_mixed_stays_near_float32(
    drafts: str, target: Target, make_any: Callable[..., Drafter], tmp_path: Path
) -> None:
    """The losses of the first steps, and the way that they take the weights."""
    losses, moves = [], []
    given = None
    for precision in ("32-true", "bf16-mixed"):
        loss = instantiate(loss_config("sharp_kl"))
        module = DraftModule(target, make_any(drafts, target), loss, Rules(), optimizer=partial(adamw, lr=1e-3))
        given = given or batches(module, STEPS)
        target.tap(module.drafter.target_layer_ids)
        history = fit(module, given, tmp_path, precision=precision)
        losses.append([figures["train/loss"] for figures in history.logged[1:]])
        first, last = history.weights[0], history.weights[-1]
        assert all(weights.dtype == torch.float32 for weights in last.values() if weights.is_floating_point())
        moves.append(torch.cat([(last[k] - first[k]).flatten() for k in first if first[k].is_floating_point()]))
    for exact, rounded in zip(*losses, strict=True):
        assert rounded == pytest.approx(exact, rel=0.05)
    assert torch.cosine_similarity(*moves, dim=0) > 0.95
    assert moves[1].norm() == pytest.approx(float(moves[0].norm()), rel=0.05)


@pytest.mark.parametrize("precision, expected", [("32-true", torch.float32), ("bf16-mixed", torch.bfloat16)])
def test_rollouts_draft_in_the_precision_of_training(
    precision: str, expected: torch.dtype, target: Target, make_any: Callable[..., Drafter]
) -> None:
    module = DraftModule(target, make_any("dflash", target), CrossEntropy(), Rules())
    module.trainer = L.Trainer(precision=precision, accelerator="cpu", logger=False, enable_checkpointing=False)
    states = torch.randn(2, 4)
    with module.drafting():
        assert (states @ states.T).dtype == expected
        assert not module.drafter.training
    assert (states @ states.T).dtype == torch.float32
