"""liger-kernel's fused kernels, where their semantics fit: on a GPU, with the package installed.

Only cross entropy fits: nothing in liger-kernel fuses forward or reverse KL with a weight per token
over a frozen head, so the divergences stay with :mod:`draftopd.losses.chunked`.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

from torch import Tensor

from draftopd.targets.head import LMHead


@cache
def installed() -> bool:
    """Whether liger-kernel and the triton it needs can be imported."""
    return find_spec("liger_kernel") is not None and find_spec("triton") is not None


def fits(draft_states: Tensor, head: LMHead) -> bool:
    """Whether the fused kernel can take these states: it wants a frozen head, and at least one of them."""
    return draft_states.is_cuda and len(draft_states) > 0 and installed() and not head.weight.requires_grad


def cross_entropy(draft_states: Tensor, head: LMHead, labels: Tensor) -> Tensor:
    """``-log q(label)`` a slot: ``[n, hidden], [n] -> [n]``; the head gets no gradient."""
    from liger_kernel.transformers.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyLoss

    fused = LigerFusedLinearCrossEntropyLoss(reduction="none", softcap=head.softcap)
    values: Tensor = fused(head.weight, draft_states.to(head.weight.dtype), labels)
    return values
