"""The LightningModule: a trainable drafter beside its frozen target."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from draftopd.decoding.generate import Decoded, Decoder
from draftopd.decoding.rules import Rules
from draftopd.distributed import ranks
from draftopd.distributed.interruption import ends_at_once
from draftopd.distributed.sharding import Shards
from draftopd.drafters.base import Drafter
from draftopd.errors import ConfigError
from draftopd.losses.base import Loss
from draftopd.replay.batch import ReplayBatch
from draftopd.replay.blocks import Blocks
from draftopd.replay.fresh import FreshAnchors
from draftopd.replay.replay import draft, read
from draftopd.targets.target import Target
from draftopd.training.held_out import HeldOut
from draftopd.training.optimizers import adamw
from draftopd.training.run_state import RunState
from draftopd.training.schedules import cosine
from draftopd.training.step import Comparison, StepAccount

#: Replay and the search for fresh anchors draw separately in the same step.
_REPLAY_DRAWS, _ANCHOR_DRAWS = 1, 2


class DraftModule(L.LightningModule):
    """Replays recorded anchors with the drafter, distils from the target, and decodes to validate.

    Args:
        target: frozen; not a submodule, so that strategies do not copy, broadcast or save it.
        drafter: trained.
        loss: see :mod:`draftopd.losses.base`.
        rules: how proposals are chosen and verified in replay and validation, as in the rollout.
        optimizer: makes the optimizer from the drafter's parameters.
        schedule: makes the schedule from the optimizer and ``total_steps``; None keeps the rate.
        fresh: finds the current drafter's anchors in every step; None takes those of the batch.
        seed: seed of proposals drawn above temperature 0.
        compiled: decode through torch.compile in validation.
        count_flops: count the operations of target, drafter and rollouts. It costs time.
        max_skipped_in_a_row: steps whose loss or gradient is not finite are skipped; more than this many end the run.
        keep_nonfinite: at most this many of the newest skipped batches are kept per rank in the run directory.

    Raises:
        ConfigError: if one of the last two is negative, or ``compiled`` and ``count_flops`` are both set.
    """

    def __init__(
        self,
        target: Target,
        drafter: Drafter,
        loss: Loss,
        rules: Rules,
        optimizer: Callable[[Iterator[torch.nn.Parameter]], Optimizer] = adamw,
        schedule: Callable[..., LRScheduler] | None = cosine,
        fresh: FreshAnchors | None = None,
        seed: int = 0,
        compiled: bool = False,
        count_flops: bool = False,
        max_skipped_in_a_row: int = 10,
        keep_nonfinite: int = 3,
    ) -> None:
        super().__init__()
        if count_flops and compiled:
            raise ConfigError("module.count_flops=true cannot count compiled decoding: leave compiled=true out.")
        drafter.config.check_fits(target.shape)
        self._frozen = (target.tap(drafter.target_layer_ids),)
        self.drafter, self.loss, self.rules, self.fresh = drafter, loss, rules, fresh
        self.make_optimizer, self.make_schedule = optimizer, schedule
        self.seed, self.compiled = seed, compiled
        self.run = RunState(count_flops, max_skipped_in_a_row)
        self.clock = self.run.clock
        self.stop_asked = False  # set in one rank, it stops all ranks after the current step
        self.comparison, self.held_out = Comparison(), HeldOut(drafter.num_proposals)
        self._account = StepAccount(drafter, self.run.skips, keep_nonfinite)
        self._shards: Shards | None = None
        self._total_steps = 1

    @property
    def target(self) -> Target:
        return self._frozen[0]

    def setup(self, stage: str) -> None:
        if getattr(self.target.model, "hf_device_map", None) is None and self.device_mesh is None:
            self.target.to(self.trainer.strategy.root_device)
        self._account.begin(Path(self.trainer.default_root_dir) / "nonfinite")

    def configure_model(self) -> None:
        """Spread target and drafter over the processes, where the strategy has a mesh of devices."""
        if self.device_mesh is not None and self._shards is None:
            self._shards = Shards(self.target, self.drafter, self.trainer.strategy.root_device)

    def configure_optimizers(self) -> Any:
        optimizer = self.make_optimizer(self.drafter.parameters())
        self._total_steps = max(1, int(self.trainer.estimated_stepping_batches))
        if self.make_schedule is None:
            return optimizer
        schedule = self.make_schedule(optimizer, total_steps=self._total_steps)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    def training_step(self, batch: ReplayBatch, batch_idx: int) -> Tensor:
        logs_now = self.trainer.global_step % max(1, self.trainer.log_every_n_steps) == 0  # type: ignore[attr-defined]
        self.clock.step(timed=logs_now)
        batch, blocks, scored = self._replay(batch, logs_now)
        if scored is not None:
            self.log_dict(self.comparison.step(scored))
        self.loss.progress = self.global_step / self._total_steps
        with self.clock("loss"):
            output = self.loss(blocks)
        self._account.add(batch, blocks, output, proposed=logs_now or self.loss.uses_proposals)
        return output.loss

    def _replay(self, batch: ReplayBatch, measured: bool) -> tuple[ReplayBatch, Blocks, Blocks | None]:
        """The replayed batch, its blocks for the loss and, where ``measured``, its blocks scored in every slot."""
        scope, target, drafter, step = self.loss.scope, self.target, self.drafter, self.global_step
        with self._shards.step() if self._shards else nullcontext():
            with self.clock("target"):
                states = scope != "none" or measured or (self.fresh is not None and self.fresh.needs_states)
                reading = read(target, batch, states)
            if self.fresh is not None:
                with self.clock("walk"), self.drafting():
                    batch = self.fresh.renew(target, drafter, batch, reading, self._draws(_ANCHOR_DRAWS), step)
            with self.clock("drafter"):
                drafts = draft(
                    target, drafter, reading, batch, self.rules,
                    forced=scope in ("recorded", "none"),
                    propose=self.loss.uses_proposals or scope != "none" or measured,
                    generator=torch.Generator(self.device).manual_seed(self._draws(_REPLAY_DRAWS)),
                )  # fmt: skip
            with self.clock("target"):
                return batch, drafts.blocks(scope), drafts.scored() if measured else None

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        with self.clock("backward"):
            super().backward(loss, *args, **kwargs)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        about = {"step": self.global_step, "epoch": self.current_epoch, "rank": self.global_rank, "seed": self.seed}
        rescales = scaler is not None and scaler.get_scale() > 1
        figures = self._account.close(optimizer, about, rescales, self.stop_asked)
        self.run.tokens += figures.tokens
        logged = figures.logged(self.global_step)
        self.log_dict(logged | self.run.logged())
        self.log("loss", logged["train/loss"], prog_bar=True, logger=False)
        if figures.stop_asked:
            self.trainer._signal_connector.received_sigterm = True  # Lightning reads it after the step

    def on_train_epoch_start(self) -> None:
        # The final drafter is always validated.
        if self.trainer.check_val_every_n_epoch and self.trainer.current_epoch + 1 == self.trainer.max_epochs:
            self.trainer.check_val_every_n_epoch = 1

    def on_train_epoch_end(self) -> None:
        self.log_dict(self.comparison.epoch())

    def decoding(self) -> AbstractContextManager[None]:
        """Each rank uses target and drafter as often as it needs, and all ranks leave together.

        Inside, ranks must not sum or wait together.
        """
        return self._shards.decoding() if self._shards else nullcontext()

    @contextmanager
    def drafting(self) -> Iterator[None]:
        """The drafter as it decodes: without dropout, and in the trainer's precision."""
        training = self.drafter.training
        self.drafter.eval()
        try:
            # Lightning enters this context for steps, not for the hooks of callbacks.
            with self.trainer.precision_plugin.forward_context():
                yield
        finally:
            self.drafter.train(training)

    def _decode(self, prompts: list[list[int]], batch_idx: int) -> list[Decoded]:
        """Decode a batch. All ranks must call it; a rank's last batch may be empty."""
        generator = torch.Generator(self.device).manual_seed(ranks.own(ranks.mix(self.seed, batch_idx)))
        with self.decoding(), ends_at_once():
            decoder = Decoder(self.target, self.drafter, self.rules, self.compiled)
            return decoder.decode_batch(prompts, generator) if prompts else []

    def on_fit_start(self) -> None:
        self.run.start_clock()

    def on_validation_epoch_start(self) -> None:
        self.held_out.reset()

    def validation_step(self, batch: list[list[int]], batch_idx: int) -> dict[str, Any]:
        with self.clock("validation"):
            decoded = self._decode(batch, batch_idx)
        self.held_out.update(decoded)
        return {"decoded": decoded}

    def on_validation_epoch_end(self) -> None:
        self.log_dict(self.run.stop_clock())
        figures = self.held_out.compute()
        self.run.tau_after = float(figures["val/tau"])
        for name, value in figures.items():
            self.log(name, value, prog_bar=name == "val/tau")

    def on_test_epoch_start(self) -> None:
        self.held_out.tested = {}

    def test_step(self, batch: list[tuple[int, list[int]]], batch_idx: int) -> None:
        decoded = self._decode([prompt for _, prompt in batch], batch_idx)
        self.held_out.tested |= {index: d.emitted for (index, _), d in zip(batch, decoded, strict=True)}

    def on_test_epoch_end(self) -> None:
        self.log_dict(self.held_out.compute_test(), rank_zero_only=True)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["drafter"] = self.drafter.config.to_json()  # export needs no other file
        checkpoint["run"] = self.run.state()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.run.restore(checkpoint["run"])

    def _draws(self, purpose: int) -> int:
        """The seed of a micro-batch's draws, different for every step, rank, micro-batch and purpose."""
        return ranks.mix(self.seed, self.global_step, self.global_rank, len(self._account.batches), purpose)
