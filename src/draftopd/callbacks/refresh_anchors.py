"""Rolls out with the current drafter and fills the anchor buffer."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import lightning as L

from draftopd.callbacks.progress import rollout_progress
from draftopd.errors import BufferError
from draftopd.module import DraftModule
from draftopd.rollout.buffer import AnchorBuffer, BufferWriter
from draftopd.rollout.engines import Rollout


class RefreshAnchors(L.Callback):
    """Refresh the anchor buffer at the start of an epoch.

    Args:
        rollout: decodes the prompts.
        root: the buffer's directory.
        every_n_epochs: a refresh each so many epochs; 0 rolls out once, before the first.
        seed: of the rollout.
        show_progress: draw a progress bar.
    """

    def __init__(
        self, rollout: Rollout, root: Path, every_n_epochs: int = 1, seed: int = 0, show_progress: bool = True
    ) -> None:
        self.rollout, self.root = rollout, Path(root)
        self.every_n_epochs, self.seed = every_n_epochs, seed
        self.show_progress = show_progress

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
        prompts = trainer.datamodule.prompts(generation)[trainer.global_rank :: trainer.world_size]  # type: ignore[attr-defined]
        writer = BufferWriter(
            self.root, generation, trainer.global_step, rank=trainer.global_rank, barrier=trainer.strategy.barrier
        )
        shown = self.show_progress and trainer.is_global_zero
        training = module.drafter.training
        module.drafter.eval()
        try:
            with module.clock("rollout"), writer, rollout_progress(len(prompts)) if shown else nullcontext() as bar:
                seed = self.seed + generation
                for batch in self.rollout.collect(module.target, module.drafter, prompts, module.stop, seed):
                    writer.add(batch)
                    if bar:
                        bar(len(batch), sum(len(r.tokens) - r.prompt_length for r in batch))
        finally:
            module.drafter.train(training)
        manifest = AnchorBuffer.latest(self.root).manifest
        figures: dict[str, float] = {"rollout/sequences": manifest.sequences, "rollout/tokens": manifest.tokens}
        if manifest.blocks:
            figures |= {"rollout/tau": manifest.tau, "rollout/anchors": manifest.blocks}
        if trainer.logger:
            trainer.logger.log_metrics({k: float(v) for k, v in figures.items()}, step=trainer.global_step)

    def _stands(self, generation: int, step: int) -> bool:
        """Whether an interrupted run left just this generation, rolled out by just this drafter."""
        try:
            manifest = AnchorBuffer.latest(self.root).manifest
        except BufferError:
            return False
        return (manifest.generation, manifest.step) == (generation, step)
