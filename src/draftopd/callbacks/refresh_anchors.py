"""Rolls out with the current drafter and fills the anchor buffer."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import cast

import lightning as L

from draftopd.callbacks.progress import rollout_progress
from draftopd.data.replay_datamodule import ReplayDataModule
from draftopd.errors import BufferError
from draftopd.interruption import ends_at_once
from draftopd.module import DraftModule
from draftopd.rollout.buffer import AnchorBuffer, BufferWriter, Recorded
from draftopd.rollout.engines import DecodeFreeRollout, Rollout
from draftopd.rollout.trajectories import Request


class RefreshAnchors(L.Callback):
    """Refresh the anchor buffer at the start of an epoch, and renew anchors within it.

    Args:
        rollout: gives recorded sequences for prompts.
        root: the buffer's directory.
        every_n_epochs: new prompts and anchors each so many epochs; 0 rolls out once, before the first.
        every_n_steps: between refreshes, the sequences of the next so many steps get the anchors of the drafter
            as it then is; None leaves them as they are. Needs a rollout that finds anchors without decoding.
        seed: of the rollout.
        show_progress: draw a progress bar.
    """

    def __init__(
        self,
        rollout: Rollout,
        root: Path,
        every_n_epochs: int = 1,
        every_n_steps: int | None = None,
        seed: int = 0,
        show_progress: bool = True,
    ) -> None:
        self.rollout, self.root = rollout, Path(root)
        self.every_n_epochs, self.every_n_steps, self.seed = every_n_epochs, every_n_steps, seed
        self.show_progress = show_progress

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if self.every_n_steps is None:
            return
        data = _data(trainer)
        data.renew = lambda records: self.renew(trainer, cast(DraftModule, pl_module), records)
        data.renew_every = self.every_n_steps * trainer.accumulate_grad_batches

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, DraftModule)
        epoch = trainer.current_epoch
        generation = epoch // self.every_n_epochs if self.every_n_epochs else 0
        due = epoch % self.every_n_epochs == 0 if self.every_n_epochs else epoch == 0
        if not due or self._stands(generation, trainer.global_step):
            return
        self.refresh(trainer, pl_module, generation)

    def refresh(self, trainer: L.Trainer, module: DraftModule, generation: int) -> None:
        """Roll out the next stretch of prompts into a new generation."""
        data = _data(trainer)
        assert data.encoder is not None
        places = data.stretch(generation, trainer.global_rank, trainer.world_size)
        writer = BufferWriter(
            self.root, generation, trainer.global_step, rank=trainer.global_rank, barrier=trainer.strategy.barrier
        )
        shown = self.show_progress and trainer.is_global_zero
        with (
            ends_at_once(),
            module.drafting(),
            module.clock("rollout"),
            writer,
            rollout_progress(len(places)) if shown else nullcontext(lambda texts, tokens: None) as progress,
            module.decoding(),
        ):
            request = Request(
                module.target, module.drafter, data.encoder.tokenizer, lambda: data.prompts(places), places,
                module.stop, self.rollout.sampling, self.rollout.max_new_tokens, data.max_prompt_tokens,
                self.seed + generation, progress,
            )  # fmt: skip
            for batch in self.rollout.collect(request):
                writer.add(batch)
        manifest = AnchorBuffer.latest(self.root).manifest
        figures: dict[str, float] = {"sequences": manifest.sequences, "tokens": manifest.tokens}
        if manifest.blocks:
            figures |= {"tau": manifest.tau, "anchors": manifest.blocks}
        figures |= {name.replace(", ", "/").replace(" ", "_"): count for name, count in self.rollout.counts().items()}
        if trainer.logger:
            logged = {f"rollout/{name}": float(value) for name, value in figures.items()}
            trainer.logger.log_metrics(logged, step=trainer.global_step)

    def renew(self, trainer: L.Trainer, module: DraftModule, records: list[Recorded]) -> list[Recorded]:
        """The same records with the anchors of the drafter as it now is."""
        step = trainer.global_step
        if all(record.step == step for record in records):
            return records
        assert isinstance(self.rollout, DecodeFreeRollout)
        with module.drafting(), module.clock("walk"), module.decoding():
            seed = (self.seed * 1_000_003 + step) * 1_009 + trainer.global_rank
            return [
                replace(record, step=step)
                for record in self.rollout.anchored(module.target, module.drafter, records, seed)
            ]

    def _stands(self, generation: int, step: int) -> bool:
        """Whether an interrupted run left just this generation, rolled out by just this drafter."""
        try:
            manifest = AnchorBuffer.latest(self.root).manifest
        except BufferError:
            return False
        return (manifest.generation, manifest.step) == (generation, step)


def _data(trainer: L.Trainer) -> ReplayDataModule:
    data = trainer.datamodule  # type: ignore[attr-defined]
    assert isinstance(data, ReplayDataModule)
    return data
