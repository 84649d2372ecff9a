"""The LightningModule: a trainable drafter beside its frozen target."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import lightning as L
import torch
from pydantic import Field, NonNegativeFloat
from torch import Tensor
from torch.optim import Optimizer

from draftopd.decoding.generate import Decoder
from draftopd.decoding.sampling import Sampling
from draftopd.decoding.verify import Verification
from draftopd.distributed import ranks
from draftopd.distributed.interruption import ends_at_once
from draftopd.distributed.sharding import Shards
from draftopd.drafters.attention import Kernel
from draftopd.drafters.base import Drafter
from draftopd.errors import ConfigError
from draftopd.losses.base import Loss, LossOutput
from draftopd.metrics.acceptance_length import AcceptanceLength, acceptance_length
from draftopd.metrics.agreement import Agreement, slot_agreement
from draftopd.metrics.entropy_acceptance import EntropyAcceptance
from draftopd.metrics.positions import AcceptanceByPosition, RejectionPosition
from draftopd.replay.batch import ReplayBatch
from draftopd.replay.blocks import Blocks
from draftopd.replay.fresh import FreshAnchors
from draftopd.replay.replay import replay
from draftopd.targets.target import Target
from draftopd.training.nonfinite import Skips, drop_gradients, keep_batch, largest_gradient, nonfinite_gradients
from draftopd.training.stopwatch import Stopwatch

log = logging.getLogger(__name__)

#: Ranges of the options, for the check of configurations.
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]


@dataclass
class _Step:
    """The micro-batches of one optimizer step: their figures, summed on the device, and what a bad step is told by."""

    names: list[str] = field(default_factory=list)
    figures: Tensor | None = None
    batches: list[ReplayBatch] = field(default_factory=list)
    losses: list[Tensor] = field(default_factory=list)


class DraftModule(L.LightningModule):
    """Replays recorded anchors with the drafter, distils from the target, decodes to validate.

    Args:
        target: frozen, and no submodule: strategies neither copy, broadcast nor save it.
        drafter: trained.
        loss: see :mod:`draftopd.losses.base`.
        sampling: how replayed proposals are chosen and accepted, as in the rollout.
        stop: token ids that end a response.
        learning_rate: peak of AdamW's rate.
        weight_decay, betas: AdamW's.
        warmup: share of all steps over which the rate rises from 0.
        final_rate: share of the peak that the cosine ends at.
        max_new_tokens: response limit in validation.
        verification: acceptance rule above temperature 0, in replay and validation.
        seed: of proposals drawn above temperature 0.
        compiled: decode through torch.compile in validation.
        activation_checkpointing, attention: see :class:`~draftopd.drafters.base.Drafter`.
        fresh: how every step finds the anchors of the drafter as it then is; None takes the batch's.
        count_flops: count what target, drafter and rollouts multiply; costs time, and compiled decoding is not counted.
        max_skipped_in_a_row: steps whose loss or gradient is not finite are skipped; more than these end the run.
        keep_nonfinite: how many of their batches, the newest, are kept in the run directory, a rank.

    Raises:
        ConfigError: if one of the last two is negative, or compiled decoding is to be counted.
    """

    def __init__(
        self,
        target: Target,
        drafter: Drafter,
        loss: Loss,
        sampling: Sampling,
        stop: frozenset[int],
        learning_rate: Rate = 3e-4,
        weight_decay: NonNegativeFloat = 0.0,
        betas: tuple[Share, Share] = (0.9, 0.95),
        warmup: Share = 0.05,
        final_rate: Share = 0.0,
        activation_checkpointing: bool = False,
        attention: Kernel = "auto",
        max_new_tokens: int = 256,
        verification: Verification = "rejection_sampling",
        seed: int = 0,
        compiled: bool = False,
        fresh: FreshAnchors | None = None,
        count_flops: bool = False,
        max_skipped_in_a_row: int = 10,
        keep_nonfinite: int = 3,
    ) -> None:
        super().__init__()
        if keep_nonfinite < 0:
            raise ConfigError(f"module.keep_nonfinite must be 0 or more, found {keep_nonfinite}.")
        if count_flops and compiled:
            raise ConfigError("module.count_flops=true cannot look into compiled decoding: leave compiled=true out.")
        self.skips, self.keep_nonfinite = Skips(max_skipped_in_a_row), keep_nonfinite
        drafter.config.check_fits(target.shape)
        self._frozen = (target.tap(drafter.target_layer_ids),)
        self.drafter = drafter
        drafter.activation_checkpointing, drafter.attention = activation_checkpointing, attention
        self.loss = loss
        self.sampling, self.stop, self.verification = sampling, stop, verification
        self.learning_rate, self.weight_decay, self.betas = learning_rate, weight_decay, betas
        self.warmup, self.final_rate = warmup, final_rate
        self.max_new_tokens, self.seed, self.fresh, self.compiled = max_new_tokens, seed, fresh, compiled
        self.clock = Stopwatch(count_flops)
        self.tokens_seen = 0
        #: Seconds of rollouts and steps, validation left out; set at each validation.
        self.training_seconds = 0.0
        #: Of a run that was continued: seconds of the parts before, as far as they were told to the clock.
        self.earlier_seconds = 0.0
        self._clock_started: float | None = None
        self._shards: Shards | None = None
        self._validating = ExitStack()
        self._step = _Step()
        self._all_steps = 1
        #: Set in any rank of several: all end after the step in flight.
        self.stop_asked = False
        #: Held-out micro tau before training and at the last validation; NaN where there was none.
        self.tau_before = self.tau_after = float("nan")
        #: Emitted tokens a block of every prompt that was tested, by its place among them.
        self.tested: dict[int, list[int]] = {}
        slots = drafter.num_proposals
        self.agreement = Agreement()
        self.by_entropy = EntropyAcceptance()
        self.tau = AcceptanceLength()
        self.by_position = AcceptanceByPosition(slots)
        self.rejections = RejectionPosition(slots)

    @property
    def target(self) -> Target:
        """The frozen target."""
        return self._frozen[0]

    def setup(self, stage: str) -> None:
        if getattr(self.target.model, "hf_device_map", None) is None and self.device_mesh is None:
            self.target.to(self.trainer.strategy.root_device)

    def configure_model(self) -> None:
        """Spread target and drafter over the processes, where the strategy has a mesh of devices."""
        if self.device_mesh is not None and self._shards is None:
            self._shards = Shards(self.target, self.drafter, self.trainer.strategy.root_device)

    def decoding(self) -> AbstractContextManager[None]:
        """Around rollouts: ranks may use target and drafter as often as their own texts need, but leave together.

        Nothing else that ranks do together, sums and barriers, may happen inside.
        """
        return self._shards.decoding() if self._shards else nullcontext()

    def training_step(self, batch: ReplayBatch, batch_idx: int) -> Tensor:
        logs_now = self.trainer.global_step % max(1, self.trainer.log_every_n_steps) == 0  # type: ignore[attr-defined]
        measured: list[Blocks] = []
        with self._shards.step() if self._shards else nullcontext():
            blocks = replay(
                self.target, self.drafter, batch, self.sampling, self.stop,
                teacher=self.loss.scope, generator=self._generator(), clock=self.clock,
                reanchor=self._fresh_anchors if self.fresh else None,
                with_states=self.fresh is not None and self.fresh.walker.coupled, verification=self.verification,
                measure=measured.append if logs_now else None, propose=self.loss.uses_proposals,
            )  # fmt: skip
        while measured:
            self._measure(measured.pop())
        self.loss.progress = self.global_step / self._all_steps
        with self.clock("loss"):
            output = self.loss(blocks)
        self._note(batch, blocks, output, proposed=logs_now or self.loss.uses_proposals)
        return output.loss

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        with self.clock("backward"):
            super().backward(loss, *args, **kwargs)

    def _note(self, batch: ReplayBatch, blocks: Blocks, output: LossOutput, proposed: bool) -> None:
        """Add a micro-batch's figures to the step's, on the device; by streams where proposals are known."""
        aged = batch.made_at[batch.made_at >= 0]
        figures: dict[str, Tensor | int] = {"loss": output.loss.detach()}
        if proposed:
            figures |= {f"loss_{name}": value for name, value in output.parts.items()}
            # What would be accepted behind an accepted stop token is never drafted.
            accepted = blocks.accepted_stream(include_correction=False) & blocks.valid
            figures |= {"_accepted": accepted.sum(), "_slots": len(accepted)}
        figures |= {"_made_at": aged.sum(), "_aged": len(aged)}
        figures |= {"_tokens": batch.lengths.sum(), "_places": batch.ids.numel()}
        packed = [torch.as_tensor(x, dtype=torch.float64, device=self.device) for x in figures.values()]
        step = self._step
        step.names = list(figures)
        step.figures = torch.stack(packed) if step.figures is None else step.figures + torch.stack(packed)
        step.batches.append(batch)
        step.losses.append(output.loss.detach())

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Log the step over all ranks; where its loss or a gradient is not finite, leave it without gradients.

        One transfer brings the figures of the loss and of the gradients, as they are after the sum over ranks.
        """
        step, self._step = self._step, _Step()
        assert step.figures is not None
        wrong = 1 - largest_gradient(optimizer).isfinite().to(step.figures)
        asked = step.figures.new_tensor([self.stop_asked])
        *sums, wrong_ranks, asked_ranks = ranks.total(torch.cat([step.figures, wrong[None], asked])).tolist()
        figures = dict(zip(step.names, sums, strict=True))
        if math.isfinite(figures["loss"]) and not wrong_ranks:
            self.skips.taken()
        else:
            self._skip(step, optimizer, figures["loss"])
        self._log_step(figures, ranks.count() * len(step.batches))
        if asked_ranks:
            self.trainer._signal_connector.received_sigterm = True  # what Lightning looks at when the step is over

    def _skip(self, step: _Step, optimizer: Optimizer, loss: float) -> None:
        """Let the optimizer find no gradient; every rank comes here at the same step, with the loss of all.

        Raises:
            NumericsError: after too many steps in a row.
        """
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        if math.isfinite(loss) and scaler is not None and scaler.get_scale() > 1:
            # Ordinary under float16: the scaler lowers the scale and the next step fits.
            self.skips.rescaled()
            drop_gradients(optimizer)
            return
        self.skips.skipped()
        about = {
            "step": self.global_step, "epoch": self.current_epoch, "rank": self.global_rank, "ranks": ranks.count(),
            "seed": self.seed, "skipped_in_a_row": self.skips.in_a_row,
            "nonfinite_gradients": nonfinite_gradients(self.drafter),
        }  # fmt: skip
        losses = torch.stack(step.losses).tolist()
        path = keep_batch(
            Path(self.trainer.default_root_dir) / "nonfinite", self.keep_nonfinite, step.batches, losses, about
        )
        drop_gradients(optimizer)
        what = "A gradient is not finite" if math.isfinite(loss) else f"The loss is {loss}"
        if self.trainer.is_global_zero:
            log.warning("%s: step %d is skipped%s.", what, self.global_step, f", its batch is {path}" if path else "")
        self.skips.check(self.global_step, what)

    def _log_step(self, figures: dict[str, float], terms: int) -> None:
        """Log an optimizer step.

        Args:
            figures: summed over ranks and micro-batches.
            terms: how many of these there were.
        """
        self.tokens_seen += int(figures["_tokens"])
        logged = {name: total / terms for name, total in figures.items() if not name.startswith("_")}
        logged |= {"tokens": float(self.tokens_seen), "padding": 1 - figures["_tokens"] / figures["_places"]}
        logged["skipped_steps"] = float(self.skips.total)
        if "_accepted" in figures:
            logged["accepted_length"] = figures["_accepted"] / max(1.0, figures["_slots"])
        if self.clock.counts:
            logged |= {f"flops/{part}": spent for part, spent in self.flops().items()}
        if self.fresh:
            logged["anchor_age"] = 0.0
        elif figures["_aged"]:
            logged["anchor_age"] = self.global_step - figures["_made_at"] / figures["_aged"]
        self.log_dict({f"train/{k}": v for k, v in logged.items()})
        self.log("loss", logged["loss"], prog_bar=True, logger=False)

    def flops(self) -> dict[str, float]:
        """Floating-point operations so far, of this process; none where they are not counted.

        ``drafter`` holds loss and backward pass too, ``rollout`` the walks that renew anchors. Validation is left out;
        what a logged step (``trainer.log_every_n_steps``) computes beside the others for its figures is not.
        """
        if not self.clock.counts:
            return {}
        spent = self.clock.operations
        parts = {
            "target": spent["target"],
            "drafter": spent["drafter"] + spent["loss"] + spent["backward"],
            "rollout": spent["rollout"] + spent["walk"],
        }
        return parts | {"total": sum(parts.values())}

    def _measure(self, blocks: Blocks) -> None:
        """Log how target and drafter compare on the drafter's own tokens."""
        found = slot_agreement(blocks)
        self.agreement.update(blocks, found)
        self.by_entropy.update(found.target_entropy, blocks.accepted, blocks.valid)
        self.log_dict({f"train/{k}": v for k, v in self.agreement.compute().items()})
        self.agreement.reset()

    def on_train_epoch_start(self) -> None:
        # However rarely tau is measured on the way, it is of the drafter that the run ends with.
        if self.trainer.check_val_every_n_epoch and self.trainer.current_epoch + 1 == self.trainer.max_epochs:
            self.trainer.check_val_every_n_epoch = 1

    def on_train_epoch_end(self) -> None:
        # An epoch shorter than the logging interval may have measured nothing, on any rank.
        if self.by_entropy.update_called:
            for edge, rate in self.by_entropy.compute().items():
                self.log(f"acceptance_by_target_entropy/from_{edge:g}_nats", rate)
            self.by_entropy.reset()

    @contextmanager
    def drafting(self) -> Iterator[None]:
        """The drafter as it decodes: without dropout, whatever it is in training, and in the trainer's precision."""
        training = self.drafter.training
        self.drafter.eval()
        try:
            # Hooks of callbacks, unlike those of steps, run outside of it.
            with self.trainer.precision_plugin.forward_context():
                yield
        finally:
            self.drafter.train(training)

    def _fresh_anchors(self, batch: ReplayBatch, features: Tensor, states: Tensor | None) -> ReplayBatch:
        assert self.fresh is not None
        with self.drafting():
            found = self.fresh.renew(
                self.target, self.drafter, batch, features, states, self._draws(), self.global_step
            )  # fmt: skip
        # Before torch 2.10 weights that autocast cast without gradients kept none in the pass that follows.
        torch.clear_autocast_cache()
        return found

    def on_fit_start(self) -> None:
        self._step = _Step()
        self._clock_started = time.perf_counter() - self.training_seconds - self.clock.seconds["validation"]

    def on_validation_epoch_start(self) -> None:
        for metric in (self.tau, self.by_position, self.rejections):
            metric.reset()
        self._validating.enter_context(self.decoding())

    def validation_step(self, batch: list[list[int]], batch_idx: int) -> None:
        with self.clock("validation"), ends_at_once():
            generator = self._decoding_generator(batch_idx)
            decoded = self.decoder().decode_batch(batch, generator)
        self.tau.update([d.emitted for d in decoded])
        blocks = [pair for d in decoded for pair in zip(d.accepted, d.emitted, strict=True)]
        accepted, emitted = torch.tensor(blocks, device=self.device).view(-1, 2).T
        self.by_position.update(accepted, emitted)
        self.rejections.update(accepted, emitted)

    def end_of_decoding(self) -> None:
        """Validation has decoded: wait for the other ranks, before anything is summed over them."""
        self._validating.close()

    def on_validation_epoch_end(self) -> None:
        self.end_of_decoding()
        if self._clock_started is not None:
            elapsed = time.perf_counter() - self._clock_started
            self.training_seconds = elapsed - self.clock.seconds["validation"]
            self.log("time/training_seconds", self.training_seconds)
        tau = {name: value.float() for name, value in self.tau.compute().items()}
        self.tau_after = float(tau["micro"])
        self.log("val/tau", tau["micro"], prog_bar=True, sync_dist=False)
        self.log("val/tau_macro", tau["macro"])
        for slot, rate in enumerate(self.by_position.compute().tolist(), start=1):
            if not math.isnan(rate):
                self.log(f"val/acceptance_position_{slot}", rate)

    def on_test_epoch_start(self) -> None:
        self.tested = {}
        self._validating.enter_context(self.decoding())

    def test_step(self, batch: list[tuple[int, list[int]]], batch_idx: int) -> None:
        generator = self._decoding_generator(batch_idx)
        with ends_at_once():
            decoded = self.decoder().decode_batch([prompt for _, prompt in batch], generator)
        self.tested |= {place: d.emitted for (place, _), d in zip(batch, decoded, strict=True)}

    def on_test_epoch_end(self) -> None:
        self.end_of_decoding()
        parts = ranks.gathered(self.tested)
        self.tested = {place: emitted for part in parts for place, emitted in part.items()}
        micro, macro = acceptance_length(list(self.tested.values()))
        self.log_dict({"test/tau": micro, "test/tau_macro": macro}, rank_zero_only=True)

    def _decoding_generator(self, batch: int) -> torch.Generator:
        return torch.Generator(self.device).manual_seed(ranks.own(self.seed * 1_000_003 + batch))

    def decoder(self) -> Decoder:
        """Speculative decoding with the drafter as it is now."""
        return Decoder(
            self.target, self.drafter, self.sampling, self.verification, self.max_new_tokens, self.stop, self.compiled
        )

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(
            self.drafter.parameters(), lr=self.learning_rate, betas=self.betas, weight_decay=self.weight_decay
        )
        total = self._all_steps = max(1, int(self.trainer.estimated_stepping_batches))
        rise = max(1, round(self.warmup * total))

        def factor(step: int) -> float:
            if step < rise:
                return (step + 1) / rise
            progress = min(1.0, (step - rise) / max(1, total - rise))
            return self.final_rate + (1 - self.final_rate) * 0.5 * (1 + math.cos(math.pi * progress))

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["drafter"] = self.drafter.config.to_json()  # so that it can be exported by itself
        checkpoint["tokens_seen"] = self.tokens_seen
        checkpoint["seconds"] = dict(self.clock.seconds)
        checkpoint["operations"] = dict(self.clock.operations)
        checkpoint["training_seconds"] = self.training_seconds
        checkpoint["skipped_steps"] = self.skips.state()
        checkpoint["tau"] = (self.tau_before, self.tau_after)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.tokens_seen = checkpoint["tokens_seen"]
        self.clock.seconds.update(checkpoint["seconds"])
        self.earlier_seconds = sum(self.clock.seconds.values())
        self.clock.operations.update(checkpoint.get("operations", {}))
        self.training_seconds = checkpoint["training_seconds"]
        # Absent in checkpoints of earlier versions.
        self.skips.restore(checkpoint.get("skipped_steps", self.skips.state()))
        self.tau_before, self.tau_after = checkpoint.get("tau", (math.nan, math.nan))

    def _draws(self) -> int:
        """The seed of a micro-batch's draws: another one in every step, rank and micro-batch."""
        step = (self.seed * 1_000_003 + self.global_step) * 1_009 + self.global_rank
        return (step + len(self._step.batches) * 15_485_863) % 2**63

    def _generator(self) -> torch.Generator | None:
        """Of replay's draws; other ones than those that renew anchors."""
        return None if self.sampling.greedy else torch.Generator(self.device).manual_seed(self._draws() ^ 0x9E3779B9)
