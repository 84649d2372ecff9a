"""Attention within each sequence of packed rows, which hold several sequences one after another.

All other operations of a layer work token by token and need no change. For attention alone the sequences are unpacked
to one row each, so that its cost is that of separate rows; a dense mask over the packed row would cost its length
squared.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

#: The name under which :func:`attend` is registered with transformers.
NAME = "draftopd_packed"


class Sequences:
    """The ``S`` sequences of packed rows.

    Args:
        begins: ``[rows, n]`` the index in the row at which the sequence of each token begins.
        implementation: transformers' name of the attention to compute within each sequence.
    """

    def __init__(self, begins: Tensor, implementation: str | None) -> None:
        self.implementation = implementation
        self.shape = begins.shape
        indices = torch.arange(begins.shape[1], device=begins.device)
        starts = (begins == indices).flatten()
        first = starts.nonzero()[:, 0]
        sizes = torch.cat([first[1:], first.new_tensor([len(starts)])]) - first
        self.longest = int(sizes.max())
        #: ``[S, longest]`` indices of each sequence's tokens in the flattened rows.
        self.packed = (first[:, None] + torch.arange(self.longest, device=begins.device)).clamp_max(len(starts) - 1)
        #: ``[rows * n]`` indices of the rows' tokens in the flattened sequences.
        self.unpacked = (starts.cumsum(0) - 1) * self.longest + (indices - begins).flatten()
        #: The number of layers that have called :func:`attend`.
        self.layers = 0

    def split(self, packed: Tensor) -> Tensor:
        """``[rows, heads, n, head_dim] -> [S, heads, longest, head_dim]``."""
        return packed.transpose(1, 2).flatten(0, 1)[self.packed].transpose(1, 2)

    def join(self, split: Tensor) -> Tensor:
        """``[S, longest, heads, head_dim] -> [rows, n, heads, head_dim]``."""
        return split.flatten(0, 1)[self.unpacked].unflatten(0, self.shape)

    def attention(self, module: nn.Module) -> Callable[..., tuple[Tensor, Any]]:
        """The attention function that this layer calls outside of :func:`within`."""
        eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
        return ALL_ATTENTION_FUNCTIONS.get_interface(self.implementation, eager)


_packed: ContextVar[Sequences] = ContextVar("packed")


@contextmanager
def within(config: PreTrainedConfig, begins: Tensor) -> Iterator[Sequences]:
    """In this context models of this config attend within the sequences of ``begins [rows, n]``.

    Masks are those of one sequence, ``[1, 1, longest, longest]``. A mask of one element stands for no mask: attention
    is then causal and uses faster kernels.
    """
    implementation = config._attn_implementation
    sequences = Sequences(begins, implementation)
    token = _packed.set(sequences)
    config._attn_implementation = NAME
    try:
        yield sequences
    finally:
        config._attn_implementation = implementation
        _packed.reset(token)


def attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor, **options: Any
) -> tuple[Tensor, None]:
    """Queries, keys and values ``[rows, heads, n, head_dim]``, returned as ``[rows, n, heads, head_dim]``."""
    sequences = _packed.get()
    sequences.layers += 1
    mask = attention_mask if attention_mask.shape[-1] == sequences.longest > 1 else None
    parts = (sequences.split(part) for part in (query, key, value))
    output, _ = sequences.attention(module)(module, *parts, mask, **options)
    return sequences.join(output), None


AttentionInterface.register(NAME, attend)
