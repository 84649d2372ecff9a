"""Attention of a transformers model within each of several sequences that stand in one row.

All else in a layer is done token by token, so it takes packed rows as they are; for attention alone the sequences are
laid out a row each, and its cost is that of separate rows. A dense mask over the row would cost its length squared.
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

#: The name under which transformers knows :func:`attend`.
NAME = "draftopd_packed"


class Sequences:
    """The ``S`` sequences of rows whose tokens' sequences begin at ``begins [rows, n]``.

    Args:
        implementation: transformers' name of the attention that each of them gets.
    """

    def __init__(self, begins: Tensor, implementation: str | None) -> None:
        self.implementation = implementation
        self.shape = begins.shape
        places = torch.arange(begins.shape[1], device=begins.device)
        heads = (begins == places).flatten()
        first = heads.nonzero()[:, 0]
        sizes = torch.cat([first[1:], first.new_tensor([len(heads)])]) - first
        self.longest = int(sizes.max())
        inside = (first[:, None] + torch.arange(self.longest, device=begins.device)).clamp_max(len(heads) - 1)
        #: Of each sequence's places the row's, ``[S, longest]``; of the rows' tokens theirs, ``[rows * n]``.
        self.places = inside
        self.back = (heads.cumsum(0) - 1) * self.longest + (places - begins).flatten()
        self.layers = 0

    def split(self, packed: Tensor) -> Tensor:
        """``[rows, heads, n, head_dim] -> [S, heads, longest, head_dim]``."""
        return packed.transpose(1, 2).flatten(0, 1)[self.places].transpose(1, 2)

    def join(self, split: Tensor) -> Tensor:
        """``[S, longest, heads, head_dim] -> [rows, n, heads, head_dim]``."""
        return split.flatten(0, 1)[self.back].unflatten(0, self.shape)

    def attention(self, module: nn.Module) -> Callable[..., tuple[Tensor, Any]]:
        """The function that the layer's attention would have called."""
        eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
        return ALL_ATTENTION_FUNCTIONS.get_interface(self.implementation, eager)


_packed: ContextVar[Sequences] = ContextVar("packed")


@contextmanager
def within(config: PreTrainedConfig, begins: Tensor) -> Iterator[Sequences]:
    """While in it, models of this config attend within the sequences of ``begins [rows, n]``.

    Masks are then those of a sequence, ``[1, 1, longest, longest]``; one of a single place stands for none at all,
    which is causal and has faster kernels.
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
    here = _packed.get()
    here.layers += 1
    mask = attention_mask if attention_mask.shape[-1] == here.longest > 1 else None
    parts = (here.split(part) for part in (query, key, value))
    output, _ = here.attention(module)(module, *parts, mask, **options)
    return here.join(output), None


AttentionInterface.register(NAME, attend)
