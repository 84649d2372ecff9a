"""Key/value caches whose slot index is the token's absolute position.

Rows of a batch can have different lengths, and the entry of a rejected proposal is overwritten by the token that takes
its position. Until then a mask over positions (``key <= query``) hides the stale entry.
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
        """Write entries ``[batch, heads, n, head_dim]`` at ``positions [batch, n]``, or ``[n]`` for all rows."""
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
        """Tell torch.compile that the memory keeps its address, as CUDA graphs require of what they write to."""
        for tensor in (self.keys, self.values):
            if tensor is not None:
                torch._dynamo.mark_static_address(tensor)

    def select(self, rows: Tensor) -> None:
        """Keep only these rows of the batch."""
        if self.keys is not None and self.values is not None:
            self.keys, self.values = self.keys[rows], self.values[rows]


class PositionCache(Cache):
    """A transformers cache of one :class:`PositionStore` per layer; :meth:`at` sets where the next forward writes."""

    def __init__(self, capacity: int, layers: int) -> None:
        super().__init__(layers=[])
        self.stores = [PositionStore(capacity) for _ in range(layers)]
        self.positions = torch.empty(0, dtype=torch.long)
        self.visible = 0

    def at(self, positions: Tensor, visible: int) -> PositionCache:
        """Set the positions ``[batch, n]`` or ``[n]`` of the next forward, which sees ``visible`` positions."""
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
    """A recorded context that blocks attend to without changing it.

    Blocks see the positions from ``begin`` up to ``visible`` and their own keys and values, which are not stored.
    """

    def __init__(self, context: PositionCache, visible: int, begin: int = 0) -> None:
        super().__init__(layers=[])
        self.context, self.visible, self.begin = context, visible, begin

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args, **kwargs):
        keys, values = (kept[:, :, self.begin :] for kept in self.context.stores[layer_idx].read(self.visible))
        return torch.cat([keys, key_states], dim=2), torch.cat([values, value_states], dim=2)

    def get_seq_length(self, layer_idx: int = 0, *args, **kwargs) -> int:
        return self.visible
