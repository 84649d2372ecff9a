"""Activation checkpointing: less memory for more time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def run_layer(layer: Callable[..., Tensor], *inputs: Any, recompute: bool) -> Tensor:
    """``layer(*inputs)``; with ``recompute`` only the inputs are kept, and the backward pass runs the layer again."""
    if not (recompute and torch.is_grad_enabled()):
        return layer(*inputs)
    output: Tensor = checkpoint(layer, *inputs, use_reentrant=False)
    return output
