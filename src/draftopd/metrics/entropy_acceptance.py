"""Acceptance rate by the target's entropy."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric

#: Lower edges of the entropy's bins, in nats.
EDGES = (0.0, 0.05, 0.1, 0.2, 0.4, 0.8, 1.6)


class EntropyAcceptance(Metric):
    """Acceptance rate of the tested slots by the target's entropy (Bebop, arXiv 2606.12370).

    A slot was tested if all slots before it were accepted. Computes ``{lower edge: acceptance rate}`` for the bins
    that hold a slot.

    Example:
        >>> metric = EntropyAcceptance()
        >>> metric.update(torch.tensor([[0.01, 0.9]]), torch.tensor([1]), torch.tensor([[True, True]]))
        >>> metric.compute()
        {0.0: 1.0, 0.8: 0.0}
    """

    full_state_update = False
    tested: Tensor
    accepted: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("tested", "accepted"):
            self.add_state(name, torch.zeros(len(EDGES), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, entropy: Tensor, accepted: Tensor, valid: Tensor) -> None:
        """Add blocks: the target's ``entropy [N, K]``, accepted lengths ``[N]``, and which slots count ``[N, K]``."""
        slots = torch.arange(entropy.shape[1], device=entropy.device)
        tested = valid & (slots <= accepted[:, None])
        bins = torch.bucketize(entropy[tested].clamp_min(0), torch.tensor(EDGES, device=entropy.device), right=True) - 1
        was_accepted = (slots < accepted[:, None])[tested]
        self.tested += torch.bincount(bins, minlength=len(EDGES))
        self.accepted += torch.bincount(bins[was_accepted], minlength=len(EDGES))

    def compute(self) -> dict[float, float]:
        counts = zip(EDGES, self.accepted.tolist(), self.tested.tolist(), strict=True)
        return {edge: accepted / tested for edge, accepted, tested in counts if tested}
