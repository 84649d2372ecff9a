"""The callback that rolls out with the current drafter and fills the anchor buffer."""

from __future__ import annotations

import logging
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import lightning as L

from draftopd.distributed.interruption import ends_at_once
from draftopd.distributed.ranks import mix
from draftopd.errors import BufferError
from draftopd.rollout.buffer import AnchorBuffer, BufferWriter
from draftopd.rollout.request import Request
from draftopd.rollout.rollouts import Rollout
from draftopd.training.datamodule import ReplayDataModule
from draftopd.training.module import DraftModule
from draftopd.training.progress import rollout_progress

log = logging.getLogger(__name__)


class RefreshAnchors(L.Callback):
    """Refresh the anchor buffer at the start of an epoch.

    Args:
        rollout: gives recorded sequences for prompts.
        root: the buffer's directory.
        every_n_epochs: epochs between two refreshes; 0 rolls out once, before the first epoch.
        max_new_tokens: response limit of the texts; None takes that of validation.
        seed: seed of the rollout.
    """

    def __init__(
        self,
        rollout: Rollout,
        root: Path,
        every_n_epochs: int = 1,
        max_new_tokens: int | None = None,
        seed: int = 0,
        show_progress: bool = True,
    ) -> None:
        self.rollout, self.root = rollout, Path(root)
        self.every_n_epochs, self.max_new_tokens = every_n_epochs, max_new_tokens
        self.seed, self.show_progress = seed, show_progress
        #: The generation that is replayed, and the step of the drafter that made it; saved in checkpoints.
        self.made: tuple[int, int] | None = None

    def state_dict(self) -> dict[str, Any]:
        return {"made": self.made and list(self.made)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.made = state_dict["made"] and tuple(state_dict["made"])

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # on_train_epoch_start is not called for an epoch that continues in its middle.
        if trainer.fit_loop.restarted_mid_epoch:
            self._provide(trainer, cast(DraftModule, pl_module), due=False)

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        epoch = trainer.current_epoch
        due = epoch % self.every_n_epochs == 0 if self.every_n_epochs else epoch == 0
        self._provide(trainer, cast(DraftModule, pl_module), due)

    def _provide(self, trainer: L.Trainer, module: DraftModule, due: bool) -> None:
        """Roll out this epoch's generation if it is due, missing or damaged.

        A generation that is not due was made by an earlier drafter. If it is lost, the current drafter makes another
        one: on policy, but with other anchors.
        """
        epoch, step = trainer.current_epoch, trainer.global_step
        generation = epoch // self.every_n_epochs if self.every_n_epochs else 0
        made: tuple[int, int | None] = (generation, step)
        if not due:
            made = self.made if self.made and self.made[0] == generation else (generation, None)
        is_there, problem = self._check_buffer(*made)
        if not trainer.strategy.reduce_boolean_decision(is_there):
            if problem and trainer.is_global_zero:
                log.warning("%s This run now does it.", problem)
            if not due and made[1] != step and trainer.is_global_zero:
                log.warning(
                    "An earlier drafter made this epoch's rollout. The drafter of step %d makes it again.", step
                )
            self.refresh(trainer, module, generation)
            self.made = (generation, step)
        elif due:
            self.made = (generation, step)

    def refresh(self, trainer: L.Trainer, module: DraftModule, generation: int) -> None:
        """Roll out the prompts of a new generation."""
        data = _data(trainer)
        assert data.encoder is not None
        indices = data.stretch(generation, trainer.global_rank, trainer.world_size)
        writer = BufferWriter(
            self.root, generation, trainer.global_step, rank=trainer.global_rank, barrier=trainer.strategy.barrier
        )
        rules = replace(module.rules, max_new_tokens=self.max_new_tokens or module.rules.max_new_tokens)
        shown = self.show_progress and trainer.is_global_zero
        with (
            ends_at_once(),
            module.drafting(),
            module.clock("rollout"),
            writer,
            rollout_progress(len(indices)) if shown else nullcontext(lambda texts, tokens: None) as progress,
            module.decoding(),
        ):
            request = Request(
                module.target, module.drafter, data.encoder.tokenizer, lambda: data.prompts(indices), indices,
                rules, data.max_prompt_tokens, mix(self.seed, generation), progress,
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

    def _check_buffer(self, generation: int, step: int | None) -> tuple[bool, str]:
        """Whether the buffer holds this generation, made by the drafter of this step (None: any); else its damage.

        The damage is empty if the buffer is absent or holds another generation.
        """
        try:
            manifest = AnchorBuffer.latest(self.root).manifest
        except BufferError as error:
            return False, str(error) if any(self.root.glob("generation-*")) else ""
        return manifest.generation == generation and step in (None, manifest.step), ""


def _data(trainer: L.Trainer) -> ReplayDataModule:
    data = trainer.datamodule  # type: ignore[attr-defined]
    assert isinstance(data, ReplayDataModule)
    return data
