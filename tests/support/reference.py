"""Parts of slow reference models."""

from __future__ import annotations

import torch
from torch import Tensor


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-5) -> bool:
    """Equal up to rounding, measured against the largest entry."""
    assert found.shape == expected.shape
    return float((found - expected).abs().max()) <= tolerance * max(1.0, float(expected.abs().max()))


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def rotate(x: Tensor, positions: Tensor, theta: float) -> Tensor:
    """``x [n, head_dim]`` turned by its positions: coordinate ``i`` pairs with ``i + head_dim / 2``."""
    half = x.shape[-1] // 2
    angles = positions[:, None].double() / theta ** (torch.arange(half).double() / half)
    first, second = x[:, :half], x[:, half:]
    return torch.cat([first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()], -1)
