"""How drafter and target compare slot by slot: overlap, entropies, expected accepted length."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric

from draftopd.replay.blocks import Blocks

#: Logits-sized float32 tensors that :func:`slot_agreement` holds at once: with one chunk, and with several.
LOGIT_COPIES = (5, 7)


class SlotAgreement(NamedTuple):
    """Overlap ``sum_v min(p, q)``, entropy of the drafter and of the target (nats), each ``[N, K]``."""

    overlap: Tensor
    draft_entropy: Tensor
    target_entropy: Tensor


def slot_agreement(blocks: Blocks) -> SlotAgreement:
    """How drafter and target compare at every slot, always at temperature 1.

    Raises:
        ValueError: if the blocks were not scored by the target.
    """
    if blocks.target_states is None:
        raise ValueError("The blocks have no states of the target: make them with scope 'proposals'.")
    draft, target = blocks.draft_states.detach().flatten(0, 1), blocks.target_states.flatten(0, 1)
    parts = []
    with torch.no_grad():
        for s, t in (blocks.target_head or blocks.head).chunks(draft, target):
            log_q, log_p = blocks.head.logits(s).log_softmax(-1), blocks.target_logits(t).log_softmax(-1)
            q, p = log_q.exp(), log_p.exp()
            overlap = torch.minimum(blocks.head.restrict(p), q).sum(-1)
            parts.append(torch.stack([overlap, -(q * log_q).sum(-1), -(p * log_p).sum(-1)]))
    return SlotAgreement(*torch.cat(parts, dim=1).view(3, *blocks.proposals.shape))


def expected_accepted_length(overlap: Tensor) -> Tensor:
    """``sum_k prod_{j<=k} overlap_j``: ``[N, K] -> [N]``, under rejection sampling (arXiv 2606.12370).

    Example:
        >>> expected_accepted_length(torch.tensor([[0.5, 0.5]]))
        tensor([0.7500])
    """
    return overlap.cumprod(-1).sum(-1)


class Agreement(Metric):
    """Means over valid slots and blocks: ``expected_accepted_length, draft_entropy, target_entropy``."""

    full_state_update = False
    sums: Tensor
    slots: Tensor
    blocks: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name, shape in {"sums": (3,), "slots": (), "blocks": ()}.items():
            self.add_state(name, torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, blocks: Blocks, found: SlotAgreement) -> None:
        """Add blocks and their :func:`slot_agreement`."""
        overlap, draft, target = found
        valid = blocks.valid.float()
        # A slot after the proposed end of the text accepts nothing.
        length = expected_accepted_length(overlap * valid).sum()
        self.sums += torch.stack([length, (draft * valid).sum(), (target * valid).sum()]).double()
        self.slots += valid.sum()
        self.blocks += len(overlap)

    def compute(self) -> dict[str, Tensor]:
        return {
            "expected_accepted_length": self.sums[0] / self.blocks,
            "draft_entropy": self.sums[1] / self.slots,
            "target_entropy": self.sums[2] / self.slots,
        }
