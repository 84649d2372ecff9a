"""Key/value caches whose slot index is the token's absolute position.

Rows of a batch stand at different lengths, and a rejected proposal's entry is simply overwritten by
the token that takes its position: nothing is cropped, copied or filled in again. A mask over
positions (``key <= query``) keeps stale entries out of sight until then.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import Cache


class PositionStore:
    """Keys and values of one layer, ``[batch, heads, capacity, head_dim]``, allocated at first use."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    def write(self, keys: Tensor, values: Tensor, positions: Tensor) -> None:
        """Put entries ``[batch, heads, n, head_dim]`` at ``positions [batch, n]`` (or ``[n]``, all rows)."""
        if self.keys is None or self.values is None:
            batch, heads, _, size = keys.shape
            self.keys = keys.new_zeros(batch, heads, self.capacity, size)
            self.values = values.new_zeros(batch, heads, self.capacity, values.shape[-1])
        if positions.ndim == 1:
            self.keys.index_copy_(2, positions, keys)
            self.values.index_copy_(2, positions, values)
        else:
            rows = torch.arange(keys.shape[0], device=keys.device)[:, None]
            self.keys.transpose(1, 2)[rows, positions] = keys.transpose(1, 2)
            self.values.transpose(1, 2)[rows, positions] = values.transpose(1, 2)

    def read(self, visible: int) -> tuple[Tensor, Tensor]:
        """Keys and values of the first ``visible`` positions."""
        assert self.keys is not None and self.values is not None
        return self.keys[:, :, :visible], self.values[:, :, :visible]

    def stay(self) -> None:
        """Tell torch.compile that the memory stays where it is: writing to other memory rules out CUDA graphs."""
        for kept in (self.keys, self.values):
            if kept is not None:
                torch._dynamo.mark_static_address(kept)

    def select(self, rows: Tensor) -> None:
        """Keep these rows of the batch."""
        if self.keys is not None and self.values is not None:
            self.keys, self.values = self.keys[rows], self.values[rows]


class PositionCache(Cache):
    """A transformers cache over :class:`PositionStore` layers.

    ``at`` says where the next forward's tokens stand; the forward's own updates then go there.
    """

    def __init__(self, capacity: int, layers: int) -> None:
        super().__init__(layers=[])
        self.stores = [PositionStore(capacity) for _ in range(layers)]
        self.positions = torch.empty(0, dtype=torch.long)
        self.visible = 0

    def at(self, positions: Tensor, visible: int) -> PositionCache:
        """Set the positions ``[batch, n]`` or ``[n]`` written next; keys up to ``visible`` are returned."""
        self.positions, self.visible = positions, visible
        return self

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args, **kwargs):
        store = self.stores[layer_idx]
        store.write(key_states, value_states, self.positions)
        return store.read(self.visible)

    def get_seq_length(self, layer_idx: int = 0, *args, **kwargs) -> int:
        return self.visible

    def select(self, rows: Tensor) -> None:
        for store in self.stores:
            store.select(rows)


class ContextCache(Cache):
    """A recorded context that blocks attend to without adding to it: updates are returned, not kept.

    They see the positions from ``begin`` up to ``visible``.
    """

    def __init__(self, context: PositionCache, visible: int, begin: int = 0) -> None:
        super().__init__(layers=[])
        self.context, self.visible, self.begin = context, visible, begin

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args, **kwargs):
        keys, values = self.context.stores[layer_idx].read(self.visible)
        keys, values = keys[:, :, self.begin :], values[:, :, self.begin :]
        return torch.cat([keys, key_states], dim=2), torch.cat([values, value_states], dim=2)

    def get_seq_length(self, layer_idx: int = 0, *args, **kwargs) -> int:
        return self.visible
