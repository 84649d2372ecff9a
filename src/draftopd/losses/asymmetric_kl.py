"""The Draft-OPD loss (arXiv 2605.29343): forward KL on the accepted stream, reverse on the rejected."""

from __future__ import annotations

from typing import Literal

import torch

from draftopd.losses.base import Loss, LossOutput, distilled, positive
from draftopd.losses.blocks import Blocks
from draftopd.losses.divergence import forward_kl, reverse_kl
from draftopd.losses.weighting import power_decay, weighted_mean


class AsymmetricKL(Loss):
    """``(w_acc KL(p||q) on accepted + w_rej gamma^(k-1) KL(q||p) on rejected) / (w_acc + w_rej)``.

    Args:
        gamma: decay of the rejected stream: slot ``k`` weighs ``gamma^(k-1)``.
        accepted_gamma: the same for the accepted stream; the paper's is 1.
        accepted_weight, rejected_weight: weights of the streams; a weight of 0 skips its stream.
        include_correction: count the correction slot ``n + 1`` in the accepted stream too.
        accept_until_fail: keep only the first slot of the rejected stream.
        teacher_temperature: the target's logits are divided by it; near 0 the target's argmax is all that
            counts, as in decoding at temperature 0.
        normalization: ``stream`` averages each stream by itself, ``token`` all slots jointly.

    Raises:
        ValueError: if a weight is negative, both are 0, or gamma lies outside (0, 1].
    """

    def __init__(
        self,
        gamma: float = 0.8,
        accepted_gamma: float = 1.0,
        accepted_weight: float = 1.0,
        rejected_weight: float = 1.0,
        include_correction: bool = False,
        accept_until_fail: bool = False,
        teacher_temperature: float = 1.0,
        normalization: Literal["stream", "token"] = "stream",
    ) -> None:
        for decay in (gamma, accepted_gamma):
            if not 0 < decay <= 1:
                raise ValueError(f"gamma and accepted_gamma must lie in (0, 1], found {decay}.")
        if min(accepted_weight, rejected_weight) < 0 or accepted_weight + rejected_weight == 0:
            raise ValueError(
                f"Stream weights must be 0 or more and not both 0, found {accepted_weight} and {rejected_weight}."
            )
        if normalization not in ("stream", "token"):
            raise ValueError(f"normalization must be 'stream' or 'token', found {normalization!r}.")
        self.gammas = (accepted_gamma, gamma)
        self.stream_weights = (accepted_weight, rejected_weight)
        self.include_correction = include_correction
        self.accept_until_fail = accept_until_fail
        self.teacher_temperature = positive(teacher_temperature, "teacher_temperature")
        self.normalization = normalization
        self.teacher = "until_fail" if accept_until_fail or rejected_weight == 0 else "proposals"

    def __call__(self, blocks: Blocks) -> LossOutput:
        slots = blocks.proposals.shape[1]
        accepted, rejected = blocks.accepted_stream(self.include_correction), blocks.rejected_stream()
        if self.accept_until_fail:
            rejected = rejected & blocks.until_fail()
        weights = [
            weight * power_decay(slots, gamma).to(blocks.student.device) * stream
            for weight, gamma, stream in zip(self.stream_weights, self.gammas, (accepted, rejected), strict=True)
        ]
        streams = [
            distilled(fn, blocks, weight, self.teacher_temperature)
            for fn, weight in zip((forward_kl, reverse_kl), weights, strict=True)
        ]
        means = [weighted_mean(*stream) for stream in streams]
        if self.normalization == "token":
            values, together = (torch.cat(parts) for parts in zip(*streams, strict=True))
            loss = weighted_mean(values, together)
        else:
            # A stream without a slot in this batch has no mean and takes no part.
            present = torch.stack([w.sum() > 0 for _, w in streams]) * loss_weights(self.stream_weights, means[0])
            loss = weighted_mean(torch.stack(means), present)
        return LossOutput(loss, {"accepted": means[0].detach(), "rejected": means[1].detach()})


def loss_weights(weights: tuple[float, float], like: torch.Tensor) -> torch.Tensor:
    return torch.tensor(weights, dtype=like.dtype, device=like.device)
