"""Attention masks for the layers of a target."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from draftopd.errors import TargetError


class LayerMasks:
    """The masks of a causal LM whose layers have full or sliding-window attention.

    ``kinds`` are the kinds that occur. ``window`` is the number of positions that a sliding-window layer sees,
    including its own.

    Raises:
        TargetError: if a layer has another kind of attention.
    """

    def __init__(self, config: PreTrainedConfig) -> None:
        max_positions = int(config.max_position_embeddings)
        self.window = int(getattr(config, "sliding_window", None) or max_positions)
        # Configs such as Mistral's have no layer types; their window applies to all layers.
        named = getattr(config, "layer_types", None)
        kinds = named or ["sliding_attention" if self.window < max_positions else "full_attention"]
        others = set(kinds) - {"full_attention", "sliding_attention"}
        if others:
            raise TargetError(
                f"The target has {', '.join(sorted(others))} layers, which block scoring does not cover: use a target "
                "whose layers are full or sliding-window attention."
            )
        self.kinds = tuple(sorted(set(kinds)))
        # Models with several layer types take one mask per type, all others a single mask.
        self.by_kind = bool(named) and len(self.kinds) > 1

    def of(
        self, allowed: Tensor, positions: Tensor, keys: Tensor, dtype: torch.dtype, causal: bool = False
    ) -> Tensor | dict[str, Tensor]:
        """The mask to pass to the model: one tensor, or one per kind of layer.

        Args:
            allowed: ``[batch, n, m]`` the keys that each query may see; a sliding window hides further ones.
            positions: ``[batch, n]`` of the queries.
            keys: ``[batch, m]`` positions of the keys.
            causal: give full attention a mask of one element, which stands for causal attention in
                :func:`~draftopd.targets.packed.within`.
        """
        masks = {}
        for kind in self.kinds:
            seen = allowed
            if kind == "sliding_attention":
                seen = seen & (positions[..., None] - keys[:, None] < self.window)
            elif causal:
                seen = seen[:, :1, :1]
            seen = seen.expand(positions.shape[0], -1, -1)[:, None]
            # A float mask, which eager attention adds to the scores; -inf would give NaN in a row without visible keys.
            mask = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
            masks[kind] = mask.masked_fill_(~seen, torch.finfo(dtype).min)
        return masks if self.by_kind else masks[self.kinds[0]]


def own_block(blocks: int, n: int, device: torch.device) -> Tensor:
    """``[1, blocks * n, blocks * n]`` True where a slot may see another: in its own block, up to itself."""
    causal = torch.ones(n, n, dtype=torch.bool, device=device).tril()
    return torch.block_diag(*[causal] * blocks)[None].bool()
