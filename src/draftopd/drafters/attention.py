"""Attention of draft blocks over a shared context."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm, apply_rotary_pos_emb

#: Queries attended at once. Each chunk sees the context and its own blocks only, so the cost grows
#: linearly with the number of anchors.
MAX_QUERIES = 128

#: Cosines and sines of the positions.
Rotary = tuple[Tensor, Tensor]

#: Keys and values.
KeysValues = tuple[Tensor, Tensor]


class OwnContext(NamedTuple):
    """What blocks see of a context that several sequences share.

    ``begins [batch, A]``: the first entry that each block sees. ``spans``: for each chunk of blocks that
    :func:`block_attention` takes at once the entries that any of them sees, so that it leaves out the others.
    """

    begins: Tensor
    spans: list[slice]

    @classmethod
    def of(cls, begins: Tensor, ends: Tensor, size: int) -> OwnContext:
        """Blocks of ``size`` queries that see the entries from ``begins`` up to ``ends [batch, A]``."""
        chunk = max(1, MAX_QUERIES // size)
        least = torch.stack([part.min() for part in begins.split(chunk, 1)])
        most = torch.stack([part.max() for part in ends.split(chunk, 1)])
        bounds = torch.stack([least, most.clamp_min(0)], -1).tolist()
        return cls(begins, [slice(*pair) for pair in bounds])


def block_attention(
    query: Tensor, context: KeysValues | None, block: KeysValues, ends: Tensor, own: OwnContext | None = None
) -> Tensor:
    """Each block attends to the context strictly before its end there, and to all of itself.

    Args:
        query: ``[batch, heads, A, Q, head_dim]``.
        context: keys and values ``[batch, kv_heads, n, head_dim]`` of entries ``0..n-1``, or None
            where there is no context yet.
        block: keys and values ``[batch, kv_heads, A, B, head_dim]``.
        ends: ``[batch, A]``.
        own: where the context that each block sees begins; None: at entry 0.

    Returns:
        ``[batch, heads, A, Q, head_dim]``.
    """
    size, own_size = query.shape[3], block[0].shape[3]
    chunk = max(1, MAX_QUERIES // size)
    outputs = []
    for number, start in enumerate(range(0, ends.shape[1], chunk)):
        part = slice(start, start + chunk)
        keys, values = block[0][:, :, part].flatten(2, 3), block[1][:, :, part].flatten(2, 3)
        blocks = torch.arange(ends[:, part].shape[1], device=query.device)
        asked, owned = blocks.repeat_interleave(size), blocks.repeat_interleave(own_size)
        allowed = (asked[:, None] == owned[None, :]).expand(query.shape[0], -1, -1)
        if context is not None:
            entries = torch.arange(context[0].shape[2], device=query.device)
            if own is None:
                seen, before = slice(None), entries < ends[:, part, None]
            else:
                seen = own.spans[number]
                before = (entries[seen] >= own.begins[:, part, None]) & (entries[seen] < ends[:, part, None])
            allowed = torch.cat([before.repeat_interleave(size, dim=1), allowed], dim=-1)
            keys, values = (torch.cat([c[:, :, seen], o], dim=2) for c, o in zip(context, (keys, values), strict=True))
        attended = F.scaled_dot_product_attention(
            query[:, :, part].flatten(2, 3), keys, values, attn_mask=allowed[:, None], enable_gqa=True
        )
        outputs.append(attended.unflatten(2, (len(blocks), size)))
    return torch.cat(outputs, dim=2)


class DraftAttention(nn.Module):
    """Queries from the block, keys and values from context and block.

    Args:
        config: Qwen3 or Llama fields.
        input_size: width of the states; None: the hidden size.
        qk_norm: normalise queries and keys, as in Qwen3.
    """

    def __init__(self, config: PreTrainedConfig, input_size: int | None = None, qk_norm: bool = True) -> None:
        super().__init__()
        size, heads, kv_heads = config.head_dim, config.num_attention_heads, config.num_key_value_heads
        width, bias = input_size or config.hidden_size, config.attention_bias
        self.head_dim = size
        self.q_proj = nn.Linear(width, heads * size, bias=bias)
        self.k_proj = nn.Linear(width, kv_heads * size, bias=bias)
        self.v_proj = nn.Linear(width, kv_heads * size, bias=bias)
        self.o_proj = nn.Linear(heads * size, config.hidden_size, bias=bias)
        self.q_norm = Qwen3RMSNorm(size, config.rms_norm_eps) if qk_norm else nn.Identity()
        self.k_norm = Qwen3RMSNorm(size, config.rms_norm_eps) if qk_norm else nn.Identity()

    def keys_values(self, states: Tensor, rotary: Rotary) -> KeysValues:
        """``[batch, n, width] -> 2 x [batch, kv_heads, n, head_dim]``, keys rotated."""
        keys = self.k_norm(self.k_proj(states).unflatten(-1, (-1, self.head_dim))).transpose(1, 2)
        values = self.v_proj(states).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        return apply_rotary_pos_emb(keys, keys, *rotary)[1], values

    def forward(
        self,
        states: Tensor,
        context: KeysValues | None,
        block: KeysValues,
        ends: Tensor,
        rotary: Rotary,
        own: OwnContext | None = None,
    ) -> Tensor:
        """``states [batch, A * Q, width]`` over context and block; see :func:`block_attention`."""
        query = self.q_norm(self.q_proj(states).unflatten(-1, (-1, self.head_dim))).transpose(1, 2)
        query = apply_rotary_pos_emb(query, query, *rotary)[0]
        attended = block_attention(query.unflatten(2, (ends.shape[1], -1)), context, block, ends, own)
        return self.o_proj(attended.flatten(2, 3).transpose(1, 2).flatten(2))
