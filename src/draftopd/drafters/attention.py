"""Attention of draft blocks over a shared context."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

#: Queries attended at once. Each chunk sees the context and its own blocks only, so the cost grows
#: linearly with the number of anchors.
MAX_QUERIES = 128


def block_attention(
    query: Tensor, context: tuple[Tensor, Tensor] | None, block: tuple[Tensor, Tensor], anchors: Tensor
) -> Tensor:
    """Each block attends to the context strictly before its anchor, and to all of itself.

    Args:
        query: ``[batch, heads, A, B, head_dim]``.
        context: keys and values ``[batch, kv_heads, n, head_dim]`` of positions ``0..n-1``, or None
            where there is no context yet.
        block: keys and values ``[batch, kv_heads, A, B, head_dim]``.
        anchors: ``[batch, A]``.

    Returns:
        ``[batch, heads, A, B, head_dim]``.
    """
    size = query.shape[3]
    chunk = max(1, MAX_QUERIES // size)
    outputs = []
    for start in range(0, anchors.shape[1], chunk):
        part = slice(start, start + chunk)
        keys, values = block[0][:, :, part].flatten(2, 3), block[1][:, :, part].flatten(2, 3)
        count = anchors[:, part].shape[1]
        own = torch.arange(count, device=query.device).repeat_interleave(size)
        allowed = (own[:, None] == own[None, :]).expand(query.shape[0], -1, -1)
        if context is not None:
            length = context[0].shape[2]
            before = torch.arange(length, device=query.device) < anchors[:, part, None]
            allowed = torch.cat([before.repeat_interleave(size, dim=1), allowed], dim=-1)
            keys, values = torch.cat([context[0], keys], dim=2), torch.cat([context[1], values], dim=2)
        attended = F.scaled_dot_product_attention(
            query[:, :, part].flatten(2, 3), keys, values, attn_mask=allowed[:, None], enable_gqa=True
        )
        outputs.append(attended.unflatten(2, (count, size)))
    return torch.cat(outputs, dim=2)
