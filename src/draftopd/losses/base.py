"""The loss protocol, and the base of nearly all losses: one value per slot, weighted by stream and position."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from draftopd.distributed import ranks
from draftopd.losses.divergence import UNKNOWN_COPIES
from draftopd.losses.weighting import weighted_mean
from draftopd.replay.blocks import Blocks, Scope


class LossOutput(NamedTuple):
    """The scalar to minimise, and detached scalars to log beside it."""

    loss: Tensor
    parts: dict[str, Tensor]


#: ``stream``: each stream is averaged by itself, then both by their weights; ``token``: all slots jointly.
Normalization = Literal["stream", "token"]

Stream = Literal["accepted", "rejected"]


class Loss(ABC):
    """A function of replayed blocks and of the progress of training."""

    scope: Scope = "proposals"
    #: Whether it depends on the drafter's proposals; if not, a step need not choose them.
    uses_proposals = True
    #: Logits-sized float32 tensors that value and gradient of a chunk hold at their peak; planning needs it.
    logit_copies: int = UNKNOWN_COPIES
    #: Fraction of all optimizer steps that are done, in [0, 1); set before each step.
    progress = 0.0

    @abstractmethod
    def __call__(self, blocks: Blocks) -> LossOutput: ...


class StreamLoss(Loss):
    """One value per slot on the accepted and on the rejected stream, and the weighted mean of both.

    Args:
        accepted_weight, rejected_weight: weights of the streams; a stream of weight 0 is not computed.
        include_correction: count the correction slot ``n + 1`` in the accepted stream too.
        accept_until_fail: keep only the first slot of the rejected stream (Spec-AUF, arXiv 2607.01893).
        normalization: see :data:`Normalization`.

    Raises:
        ValueError: if a weight is negative, both are 0, or the normalization is unknown.
    """

    #: Whether both streams have the same value at a slot, so that a slot in both is computed once.
    same_on_both = True

    def __init__(
        self,
        *,
        accepted_weight: float = 1.0,
        rejected_weight: float = 1.0,
        include_correction: bool = False,
        accept_until_fail: bool = False,
        normalization: Normalization = "token",
    ) -> None:
        if min(accepted_weight, rejected_weight) < 0 or accepted_weight + rejected_weight == 0:
            raise ValueError(
                f"Stream weights must be 0 or more and not both 0, found {accepted_weight} and {rejected_weight}."
            )
        if normalization not in get_args(Normalization):
            raise ValueError(f"normalization must be 'stream' or 'token', found {normalization!r}.")
        self.accepted_weight, self.rejected_weight = accepted_weight, rejected_weight
        self.include_correction = include_correction
        self.accept_until_fail = accept_until_fail
        self.normalization = normalization
        self.scope = "until_fail" if accept_until_fail or rejected_weight == 0 else "proposals"

    @abstractmethod
    def values(self, blocks: Blocks, used: Tensor, stream: Stream) -> Tensor:
        """``[n]``: the values of a stream's slots, those where ``used [N, K]`` is True."""

    def decay(self, slots: int, stream: Stream) -> Tensor:
        """``[K]``: the weight of each position of a stream."""
        return torch.ones(slots)

    def usable(self, blocks: Blocks) -> Tensor:
        """``[N, K]``: slots that may count."""
        return blocks.valid

    def weights(self, blocks: Blocks, stream: Stream) -> Tensor:
        """``[N, K]``: each slot's weight within a stream, without the stream's own weight."""
        if stream == "accepted":
            member = blocks.accepted_stream(self.include_correction)
        else:
            member = blocks.rejected_stream()
            if self.accept_until_fail:
                member = member & blocks.until_fail()
        decay = self.decay(blocks.proposals.shape[1], stream).to(blocks.draft_states.device)
        return decay * (member & self.usable(blocks))

    def importance(self, blocks: Blocks, values: Tensor, used: Tensor) -> Tensor:
        """``[N, K]``: a factor on the weights, from the values ``[N, K]`` where ``used``, if ``same_on_both``."""
        return torch.ones_like(values)

    def __call__(self, blocks: Blocks) -> LossOutput:
        weights = (
            self.accepted_weight * self.weights(blocks, "accepted"),
            self.rejected_weight * self.weights(blocks, "rejected"),
        )
        accepted, rejected = (weight > 0 for weight in weights)
        if self.same_on_both:
            used = accepted | rejected
            every = blocks.draft_states.new_zeros(used.shape, dtype=torch.float32)
            every = every.masked_scatter(used, self.values(blocks, used, "accepted"))
            factor = self.importance(blocks, every.detach(), used)
            values = (every[accepted], every[rejected])
            kept = ((weights[0] * factor)[accepted], (weights[1] * factor)[rejected])
        else:
            values = (self.values(blocks, accepted, "accepted"), self.values(blocks, rejected, "rejected"))
            kept = (weights[0][accepted], weights[1][rejected])
        means = (weighted_mean(values[0], kept[0]), weighted_mean(values[1], kept[1]))
        if self.normalization == "token":
            loss = weighted_mean(torch.cat(values), torch.cat(kept))
        else:
            # A stream without slots in this batch on all ranks has no mean and does not count.
            present = ranks.total(torch.stack([w.sum() for w in kept])) > 0
            stream_weights = means[0].new_tensor((self.accepted_weight, self.rejected_weight))
            loss = weighted_mean(torch.stack(means), present * stream_weights)
        return LossOutput(loss, {"accepted": means[0].detach(), "rejected": means[1].detach()})
