"""The Draft-OPD loss (arXiv 2605.29343): forward KL on the accepted stream, reverse on the rejected."""

from __future__ import annotations

from torch import Tensor

from draftopd.losses.base import DistilledLoss, Normalization, ScoredOn, Stream
from draftopd.losses.divergence import forward_kl, reverse_kl
from draftopd.replay.blocks import Blocks


class AsymmetricKL(DistilledLoss):
    """``(w_acc KL(p||q) on accepted + w_rej gamma^(k-1) KL(q||p) on rejected) / (w_acc + w_rej)``.

    Args:
        gamma: decay of the rejected stream.
        accepted_gamma: the same for the accepted stream; the paper's is 1.
        accepted_weight, rejected_weight, include_correction, accept_until_fail, normalization: see
            :class:`~draftopd.losses.base.StreamLoss`.
        target_temperature, target_top_k, scored_on: see :class:`~draftopd.losses.base.DistilledLoss`.
    """

    same_on_both = False

    def __init__(
        self,
        gamma: float = 0.8,
        accepted_gamma: float = 1.0,
        accepted_weight: float = 1.0,
        rejected_weight: float = 1.0,
        include_correction: bool = False,
        accept_until_fail: bool = False,
        target_temperature: float = 1.0,
        normalization: Normalization = "stream",
        target_top_k: int | None = None,
        scored_on: ScoredOn = "proposals",
    ) -> None:
        super().__init__(
            gamma, accept_until_fail, target_temperature, accepted_gamma, accepted_weight, rejected_weight,
            include_correction, normalization, target_top_k, scored_on,
        )  # fmt: skip

    def values(self, blocks: Blocks, used: Tensor, stream: Stream) -> Tensor:
        return self.view.compare(forward_kl if stream == "accepted" else reverse_kl, blocks, used)
