"""The attention masks that the layers of a target take."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from draftopd.errors import TargetError


class LayerMasks:
    """The masks of a causal LM whose layers are full or sliding-window attention.

    ``kinds``: those that its layers have. ``window``: positions that a sliding-window layer sees, its own included.

    Raises:
        TargetError: if a layer has another kind of attention.
    """

    def __init__(self, config: PreTrainedConfig) -> None:
        most = int(config.max_position_embeddings)
        self.window = int(getattr(config, "sliding_window", None) or most)
        # Mistral and its kin name no layer types; a window holds for all their layers.
        named = getattr(config, "layer_types", None)
        kinds = named or ["sliding_attention" if self.window < most else "full_attention"]
        others = set(kinds) - {"full_attention", "sliding_attention"}
        if others:
            raise TargetError(
                f"The target has {', '.join(sorted(others))} layers, which block scoring does not cover: use a target "
                "whose layers are full or sliding-window attention."
            )
        self.kinds = tuple(sorted(set(kinds)))
        # Models with layer types take a mask for each; Mistral's windowed kin take one for all layers.
        self.by_kind = bool(named) and len(self.kinds) > 1

    def of(
        self, allowed: Tensor, positions: Tensor, keys: Tensor, dtype: torch.dtype, causal: bool = False
    ) -> Tensor | dict[str, Tensor]:
        """What the model takes as its mask, for queries at ``positions [batch, n]``.

        Of the keys at positions ``keys [batch, m]`` those ``allowed [batch, n, m]`` are seen; layers with a sliding
        window see of these only what lies within it. ``causal``: full attention gets a mask of a single place, see
        :func:`~draftopd.targets.packed.within`.
        """
        masks = {}
        for kind in self.kinds:
            seen = allowed
            if kind == "sliding_attention":
                seen = seen & (positions[..., None] - keys[:, None] < self.window)
            elif causal:
                seen = seen[:, :1, :1]
            masks[kind] = _mask(seen.expand(positions.shape[0], -1, -1)[:, None], dtype)
        return masks if self.by_kind else masks[self.kinds[0]]


def _mask(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    # A float mask, as eager attention adds it to the scores; -inf would give NaN in an empty row.
    mask = torch.zeros(allowed.shape, dtype=dtype, device=allowed.device)
    return mask.masked_fill_(~allowed, torch.finfo(dtype).min)


def own_block(blocks: int, n: int, device: torch.device) -> Tensor:
    """``[1, blocks * n, blocks * n]``: each slot sees its own block up to itself."""
    causal = torch.ones(n, n, dtype=torch.bool, device=device).tril()
    return torch.block_diag(*[causal] * blocks)[None].bool()
