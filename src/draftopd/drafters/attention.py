"""Attention of draft blocks over a shared context."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm, apply_rotary_pos_emb

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

#: Queries attended at once. Each chunk sees only the context and its own blocks, so the cost is linear in the anchors.
MAX_QUERIES = 128

#: Cosines and sines of the positions.
Rotary = tuple[Tensor, Tensor]

#: Keys and values.
KeysValues = tuple[Tensor, Tensor]

#: ``auto``: FlexAttention on a GPU for blocks that are drafted in parallel, scaled dot products elsewhere.
Kernel = Literal["auto", "flex", "sdpa"]


class View(NamedTuple):
    """What blocks see of the context: the entries from ``begins`` up to ``ends [batch, A]``, and their own block.

    ``begins`` None means from entry 0. With ``mask`` all blocks attend at once by FlexAttention, else chunk by chunk:
    each chunk over its own span of the entries with ``spans``, over all entries without.
    """

    ends: Tensor
    begins: Tensor | None = None
    spans: list[slice] | None = None
    mask: BlockMask | None = None

    @classmethod
    def in_chunks(cls, ends: Tensor, begins: Tensor | None, size: int) -> View:
        """Blocks of ``size`` queries, without the entries that no block of their chunk sees."""
        chunk = max(1, MAX_QUERIES // size)
        first = torch.zeros_like(ends) if begins is None else begins
        lowest = torch.stack([part.min() for part in first.split(chunk, 1)])
        highest = torch.stack([part.max() for part in ends.split(chunk, 1)])
        bounds = torch.stack([lowest, highest.clamp_min(0)], -1).tolist()
        return cls(ends, begins, spans=[slice(*pair) for pair in bounds])

    @classmethod
    def by_flex(cls, ends: Tensor, begins: Tensor | None, size: int, entries: int) -> View:
        """Blocks of ``size`` queries over a context of ``entries``."""
        return cls(ends, begins, mask=_block_mask(ends, begins, size, entries))

    @property
    def positions(self) -> Tensor:
        """``[batch, A]``: the ends of the blocks' views, counted from the beginning of their sequence."""
        return self.ends if self.begins is None else self.ends - self.begins


def uses_flex(kernel: Kernel, device: torch.device) -> bool:
    """Whether parallel blocks on this device attend by FlexAttention, which has no backward on a CPU."""
    return kernel == "flex" or (kernel == "auto" and device.type == "cuda")


def block_attention(query: Tensor, context: KeysValues | None, block: KeysValues, view: View) -> Tensor:
    """Each block attends to its view of the context, and to all of itself.

    Args:
        query: ``[batch, heads, A, Q, head_dim]``.
        context: keys and values ``[batch, kv_heads, n, head_dim]`` of entries ``0..n-1``, or None without a context.
        block: keys and values ``[batch, kv_heads, A, B, head_dim]``.
        view: the view of the ``A`` blocks.

    Returns:
        ``[batch, heads, A, Q, head_dim]``.
    """
    if view.mask is not None:
        assert context is not None
        return _attend_by_flex(query, context, block, view.mask)
    return _attend_in_chunks(query, context, block, view)


def _attend_by_flex(query: Tensor, context: KeysValues, block: KeysValues, mask: BlockMask) -> Tensor:
    """All blocks at once; see :func:`block_attention`."""
    keys, values = (torch.cat([c, o.flatten(2, 3)], dim=2) for c, o in zip(context, block, strict=True))
    # Under autocast norms leave queries and keys in float32, and older kernels need one type.
    query, keys = query.to(values.dtype), keys.to(values.dtype)
    attended = _compiled("flex_attention")(query.flatten(2, 3), keys, values, block_mask=mask, enable_gqa=True)
    return attended.unflatten(2, query.shape[2:4])


def _attend_in_chunks(query: Tensor, context: KeysValues | None, block: KeysValues, view: View) -> Tensor:
    """Chunks of blocks one after the other, by scaled dot products; see :func:`block_attention`."""
    size = query.shape[3]
    chunk = max(1, MAX_QUERIES // size)
    outputs = []
    for number, start in enumerate(range(0, view.ends.shape[1], chunk)):
        part = slice(start, start + chunk)
        keys, values = (t[:, :, part].flatten(2, 3) for t in block)
        allowed = _own_blocks(query[:, :, part], block[0][:, :, part])
        if context is not None:
            span = slice(None) if view.spans is None else view.spans[number]
            entries = torch.arange(context[0].shape[2], device=query.device)[span]
            before = entries < view.ends[:, part, None]
            if view.begins is not None:
                before &= entries >= view.begins[:, part, None]
            allowed = torch.cat([before.repeat_interleave(size, dim=1), allowed], dim=-1)
            keys, values = (torch.cat([c[:, :, span], o], dim=2) for c, o in zip(context, (keys, values), strict=True))
        attended = _masked(query[:, :, part].flatten(2, 3), keys, values, allowed[:, None])
        outputs.append(attended.unflatten(2, (-1, size)))
    return torch.cat(outputs, dim=2)


def _own_blocks(query: Tensor, keys: Tensor) -> Tensor:
    """``[batch, A * Q, A * B]``: which of all blocks' keys each query sees, those of its own block."""
    blocks = torch.arange(query.shape[2], device=query.device)
    asked, owned = blocks.repeat_interleave(query.shape[3]), blocks.repeat_interleave(keys.shape[3])
    return (asked[:, None] == owned[None, :]).expand(query.shape[0], -1, -1)


def _masked(query: Tensor, keys: Tensor, values: Tensor, allowed: Tensor) -> Tensor:
    """Scaled dot products under a boolean mask."""
    if query.is_cuda:
        # torch's memory-efficient kernel takes a mask, but not grouped heads.
        groups = query.shape[1] // keys.shape[1]
        keys, values = keys.repeat_interleave(groups, 1), values.repeat_interleave(groups, 1)
    return F.scaled_dot_product_attention(query, keys, values, attn_mask=allowed, enable_gqa=not query.is_cuda)


def _block_mask(ends: Tensor, begins: Tensor | None, size: int, entries: int) -> BlockMask:
    """FlexAttention's mask of all blocks' queries over the context's entries and all blocks' keys."""

    def sees(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        block = query // size
        before = key < ends[row, block]
        if begins is not None:
            before = before & (key >= begins[row, block])
        return torch.where(key < entries, before, (key - entries) // size == block)

    batch, count = ends.shape
    return _compiled("create_block_mask")(sees, batch, None, count * size, entries + count * size, device=ends.device)


@cache
def _compiled(name: str) -> Any:
    """A function of FlexAttention, compiled for changing shapes."""
    from torch.nn.attention import flex_attention

    return torch.compile(getattr(flex_attention, name), dynamic=True)


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
        self, states: Tensor, context: KeysValues | None, block: KeysValues, view: View, rotary: Rotary
    ) -> Tensor:
        """``states [batch, A * Q, width]`` over context and block; see :func:`block_attention`."""
        query = self.q_norm(self.q_proj(states).unflatten(-1, (-1, self.head_dim))).transpose(1, 2)
        query = apply_rotary_pos_emb(query, query, *rotary)[0]
        attended = block_attention(query.unflatten(2, (view.ends.shape[1], -1)), context, block, view)
        return self.o_proj(attended.flatten(2, 3).transpose(1, 2).flatten(2))
