"""The Draft-OPD loss (arXiv 2605.29343): forward KL on the accepted stream, reverse on the rejected."""

from __future__ import annotations

from torch import Tensor

from draftopd.losses.base import DistilledLoss, Normalization, Stream, TeacherOn
from draftopd.losses.blocks import Blocks
from draftopd.losses.divergence import forward_kl, reverse_kl


class AsymmetricKL(DistilledLoss):
    """``(w_acc KL(p||q) on accepted + w_rej gamma^(k-1) KL(q||p) on rejected) / (w_acc + w_rej)``.

    Args:
        gamma: decay of the rejected stream.
        accepted_gamma: the same for the accepted stream; the paper's is 1.
        accepted_weight, rejected_weight, include_correction, accept_until_fail, normalization: see
            :class:`~draftopd.losses.base.StreamLoss`.
        teacher_temperature, teacher_top_k, teacher_on: see :class:`~draftopd.losses.base.DistilledLoss`.
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
        teacher_temperature: float = 1.0,
        normalization: Normalization = "stream",
        teacher_top_k: int | None = None,
        teacher_on: TeacherOn = "proposals",
    ) -> None:
        super().__init__(
            gamma, accept_until_fail, teacher_temperature, accepted_gamma, accepted_weight, rejected_weight,
            include_correction, normalization, teacher_top_k, teacher_on,
        )  # fmt: skip

    def values(self, blocks: Blocks, used: Tensor, stream: Stream) -> Tensor:
        return self.target.compare(forward_kl if stream == "accepted" else reverse_kl, blocks, used)
