"""The LightningModule: a trainable drafter beside its frozen target."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import lightning as L
import torch
from pydantic import Field, NonNegativeFloat
from torch import Tensor

from draftopd import ranks
from draftopd.decoding.generate import Decoder
from draftopd.decoding.sampling import Sampling
from draftopd.decoding.verify import Verification
from draftopd.drafters.base import Drafter
from draftopd.errors import NumericsError
from draftopd.losses.base import Loss, LossOutput
from draftopd.losses.blocks import Blocks
from draftopd.metrics.acceptance_length import AcceptanceLength
from draftopd.metrics.agreement import Agreement, slot_agreement
from draftopd.metrics.entropy_acceptance import EntropyAcceptance
from draftopd.metrics.positions import AcceptanceByPosition, RejectionPosition
from draftopd.replay import ReplayBatch, replay
from draftopd.rollout.fresh import FreshAnchors
from draftopd.stopwatch import Stopwatch
from draftopd.targets.target import Target

#: Ranges of the options, for the check of configurations.
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]


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
        activation_checkpointing: see :attr:`~draftopd.drafters.base.Drafter.activation_checkpointing`.
        fresh: how every step finds the anchors of the drafter as it then is; None takes the batch's.
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
        max_new_tokens: int = 256,
        verification: Verification = "rejection_sampling",
        seed: int = 0,
        compiled: bool = False,
        fresh: FreshAnchors | None = None,
    ) -> None:
        super().__init__()
        drafter.check_fits(target)
        self._frozen = (target.tap(drafter.target_layer_ids),)
        self.drafter = drafter
        drafter.activation_checkpointing = activation_checkpointing
        self.loss = loss
        self.sampling, self.stop, self.verification = sampling, stop, verification
        self.learning_rate, self.weight_decay, self.betas = learning_rate, weight_decay, betas
        self.warmup, self.final_rate = warmup, final_rate
        self.max_new_tokens, self.seed, self.fresh, self.compiled = max_new_tokens, seed, fresh, compiled
        self.clock = Stopwatch()
        self.tokens_seen = 0
        #: Seconds of rollouts and steps, validation left out; set at each validation.
        self.training_seconds = 0.0
        self._clock_started: float | None = None
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
        if getattr(self.target.model, "hf_device_map", None) is None:
            self.target.to(self.trainer.strategy.root_device)

    def training_step(self, batch: ReplayBatch, batch_idx: int) -> Tensor:
        logs_now = self.trainer.global_step % max(1, self.trainer.log_every_n_steps) == 0  # type: ignore[attr-defined]
        blocks = replay(
            self.target, self.drafter, batch, self.sampling, self.stop,
            teacher=self.loss.teacher, generator=self._generator(), clock=self.clock,
            reanchor=self._fresh_anchors if self.fresh else None,
            with_states=self.fresh is not None and self.fresh.walker.coupled, verification=self.verification,
            measure=self._measure if logs_now else None, propose=self.loss.uses_proposals,
        )  # fmt: skip
        with self.clock("loss"):
            output = self.loss(blocks)
        if not torch.isfinite(output.loss):
            raise NumericsError(
                f"The loss is {output.loss.item()} at step {self.global_step}: lower module.learning_rate or the loss "
                "weights and start again; checkpoints written before this step are intact."
            )
        self._log_step(batch, blocks, output, proposed=logs_now or self.loss.uses_proposals)
        return output.loss

    def _log_step(self, batch: ReplayBatch, blocks: Blocks, output: LossOutput, proposed: bool) -> None:
        """Log the step over all ranks; by streams where the drafter's proposals are known."""
        aged = batch.made_at[batch.made_at >= 0]
        sums: list[Tensor | int] = [blocks.accepted.sum(), len(blocks.accepted), aged.sum(), len(aged)]
        sums += [batch.lengths.sum(), batch.ids.numel()]
        values = {"loss": output.loss}
        if proposed:
            values |= {f"loss_{name}": value for name, value in output.parts.items()}
        numbers: list[Tensor | int] = [*values.values(), *sums]
        packed = torch.stack([torch.as_tensor(x, dtype=torch.float64, device=self.device) for x in numbers])
        *means, accepted, slots, made_at, known, tokens, places = ranks.total(packed).tolist()
        self.tokens_seen += int(tokens)
        logged = {name: mean / ranks.count() for name, mean in zip(values, means, strict=True)}
        logged |= {"tokens": float(self.tokens_seen), "padding": 1 - tokens / places}
        if proposed:
            logged["accepted_length"] = accepted / max(1.0, slots)
        if self.fresh:
            logged["anchor_age"] = 0.0
        elif known:
            logged["anchor_age"] = self.global_step - made_at / known
        self.log_dict({f"train/{k}": v for k, v in logged.items()}, batch_size=len(blocks.accepted))
        self.log("loss", logged["loss"], prog_bar=True, logger=False)

    def _measure(self, blocks: Blocks) -> None:
        """Log how target and drafter compare on the drafter's own tokens."""
        found = slot_agreement(blocks)
        self.agreement.update(blocks, found)
        self.by_entropy.update(found.target_entropy, blocks.accepted, blocks.valid)
        self.log_dict({f"train/{k}": v for k, v in self.agreement.compute().items()})
        self.agreement.reset()

    def on_train_epoch_end(self) -> None:
        for edge, rate in self.by_entropy.compute().items():
            self.log(f"acceptance_by_target_entropy/from_{edge:g}_nats", rate)
        self.by_entropy.reset()

    @contextmanager
    def drafting(self) -> Iterator[None]:
        """The drafter as it decodes: without dropout, whatever it is in training."""
        training = self.drafter.training
        self.drafter.eval()
        try:
            yield
        finally:
            self.drafter.train(training)

    def _fresh_anchors(self, batch: ReplayBatch, features: Tensor, states: Tensor | None) -> ReplayBatch:
        assert self.fresh is not None
        seed = (self.seed * 1_000_003 + self.global_step) * 1_009 + self.global_rank
        with self.drafting():
            found = self.fresh.renew(self.target, self.drafter, batch, features, states, seed, self.global_step)
        # Before torch 2.10 weights that autocast cast without gradients kept none in the pass that follows.
        torch.clear_autocast_cache()
        return found

    def on_fit_start(self) -> None:
        self._clock_started = time.perf_counter() - self.training_seconds - self.clock.seconds["validation"]

    def on_validation_epoch_start(self) -> None:
        for metric in (self.tau, self.by_position, self.rejections):
            metric.reset()

    def validation_step(self, batch: list[list[int]], batch_idx: int) -> None:
        with self.clock("validation"):
            generator = torch.Generator(self.device).manual_seed(self.seed * 1_000_003 + batch_idx)
            decoded = self.decoder().decode_batch(batch, generator)
        self.tau.update([d.emitted for d in decoded])
        # A block cut short by the end of the text says nothing about a rejection at its last slot.
        whole = [n for d in decoded for n, kept in zip(d.accepted, d.emitted, strict=True) if kept == n + 1]
        accepted = torch.tensor(whole, device=self.device)
        self.by_position.update(accepted)
        self.rejections.update(accepted)

    def on_validation_epoch_end(self) -> None:
        if self._clock_started is not None:
            elapsed = time.perf_counter() - self._clock_started
            self.training_seconds = elapsed - self.clock.seconds["validation"]
            self.log("time/training_seconds", self.training_seconds)
        tau = {name: value.float() for name, value in self.tau.compute().items()}
        self.log("val/tau", tau["micro"], prog_bar=True, sync_dist=False)
        self.log("val/tau_macro", tau["macro"])
        for slot, rate in enumerate(self.by_position.compute().tolist(), start=1):
            if not math.isnan(rate):
                self.log(f"val/acceptance_position_{slot}", rate)

    def decoder(self) -> Decoder:
        """Speculative decoding with the drafter as it is now."""
        return Decoder(
            self.target, self.drafter, self.sampling, self.verification, self.max_new_tokens, self.stop, self.compiled
        )

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(
            self.drafter.parameters(), lr=self.learning_rate, betas=self.betas, weight_decay=self.weight_decay
        )
        total = max(1, int(self.trainer.estimated_stepping_batches))
        rise = max(1, round(self.warmup * total))

        def factor(step: int) -> float:
            if step < rise:
                return (step + 1) / rise
            progress = min(1.0, (step - rise) / max(1, total - rise))
            return self.final_rate + (1 - self.final_rate) * 0.5 * (1 + math.cos(math.pi * progress))

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["drafter"] = self.drafter.describe()  # so that it can be exported by itself
        checkpoint["tokens_seen"] = self.tokens_seen
        checkpoint["seconds"] = dict(self.clock.seconds)
        checkpoint["training_seconds"] = self.training_seconds

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.tokens_seen = checkpoint["tokens_seen"]
        self.clock.seconds.update(checkpoint["seconds"])
        self.training_seconds = checkpoint["training_seconds"]

    def _generator(self) -> torch.Generator | None:
        if self.sampling.greedy:
            return None
        seed = (self.seed * 1_000_003 + self.global_step) * 1_009 + self.global_rank
        return torch.Generator(self.device).manual_seed(seed % 2**63)
