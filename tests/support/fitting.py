"""Short fits in process."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import lightning as L
import torch
from tests.support.batches import as_batch, decode
from torch import Tensor
from torch.utils.data import DataLoader

from draftopd.replay.batch import ReplayBatch
from draftopd.training.module import DraftModule


class History(L.Callback):
    """Drafter, optimizer state and logged figures after every batch; the first entry is from before them."""

    def __init__(self) -> None:
        self.weights: list[dict[str, Tensor]] = []
        self.states: list[dict[int, Any]] = []
        self.logged: list[dict[str, float]] = []

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._keep(trainer, pl_module)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        self._keep(trainer, pl_module)

    def _keep(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, DraftModule)
        self.weights.append({k: v.clone() for k, v in pl_module.drafter.state_dict().items()})
        self.states.append(copy.deepcopy(trainer.optimizers[0].state_dict()["state"]))
        self.logged.append({k: float(v) for k, v in trainer.callback_metrics.items()})

    def same(self, step: int) -> bool:
        """Whether step ``step`` (from 0) left weights and optimizer state as they were, to the last bit."""
        weights, states = self.weights[step : step + 2], self.states[step : step + 2]
        flat = [[t for state in s.values() for t in state.values()] for s in states]
        return (
            all(torch.equal(weights[0][k], weights[1][k]) for k in weights[0])
            and len(flat[0]) == len(flat[1])
            and all(torch.equal(torch.as_tensor(a), torch.as_tensor(b)) for a, b in zip(*flat, strict=True))
        )


def batches(module: DraftModule, count: int) -> list[ReplayBatch]:
    decoded = decode(module.target, module.drafter, count)
    module.target.tap(module.drafter.target_layer_ids)
    return [as_batch([d]) for d in decoded]


def make_trainer(directory: Path, **options: Any) -> L.Trainer:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    common = {"accelerator": "cpu", "max_epochs": 1, "gradient_clip_val": 1.0, "limit_val_batches": 0, "logger": False}
    return L.Trainer(default_root_dir=directory, **quiet | common | options)


def fit(module: DraftModule, given: list[ReplayBatch], directory: Path, **options: Any) -> History:
    history = History()
    trainer = make_trainer(directory, callbacks=[history], **options)
    trainer.fit(module, DataLoader(given, batch_size=None))
    return history
