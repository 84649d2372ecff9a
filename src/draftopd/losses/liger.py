"""liger-kernel's fused cross entropy, on a GPU with the package installed.

liger-kernel has no forward or reverse KL with a weight per token over a frozen head, so divergences use
:mod:`draftopd.losses.chunked`.
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
    """Whether the fused kernel can take these states: it needs a GPU, at least one state and a frozen head."""
    return draft_states.is_cuda and len(draft_states) > 0 and installed() and not head.weight.requires_grad


def cross_entropy(draft_states: Tensor, head: LMHead, labels: Tensor) -> Tensor:
    """``-log q(label)`` per slot: ``[n, hidden], [n] -> [n]``; the head gets no gradient."""
    from liger_kernel.transformers.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyLoss

    fused = LigerFusedLinearCrossEntropyLoss(reduction="none", softcap=head.softcap)
    values: Tensor = fused(head.weight, draft_states.to(head.weight.dtype), labels)
    return values
