"""From logits to distributions and tokens: temperature, top-k and top-p."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

#: The lowest temperature above 0; float32 logits overflow when divided by a lower one.
MIN_TEMPERATURE = 1e-6


@dataclass(frozen=True)
class Sampling:
    """The warping of the distributions of target and drafter alike.

    Args:
        temperature: 0 selects the argmax; the logits are divided by a temperature above 0, which is at least 1e-6.
        top_k: keep the k most likely tokens; 0 keeps all.
        top_p: keep the smallest set of most likely tokens whose mass reaches this; 1 keeps all.

    Raises:
        ValueError: if a value lies outside its range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not self.temperature >= 0:  # True for NaN too
            raise ValueError(f"temperature must be 0 (greedy) or more, found {self.temperature}.")
        if 0 < self.temperature < MIN_TEMPERATURE or math.isinf(self.temperature):
            raise ValueError(
                f"temperature must be 0 (greedy) or lie between {MIN_TEMPERATURE:g} and infinity, "
                f"found {self.temperature}."
            )
        if self.top_k < 0:
            raise ValueError(f"top_k must be 0 (off) or more, found {self.top_k}.")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must lie in (0, 1], found {self.top_p}.")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    def probabilities(self, logits: Tensor) -> Tensor:
        """The warped distribution, ``[..., vocab]`` in float32; one-hot at temperature 0."""
        logits = logits.float()
        if self.greedy:
            return torch.nn.functional.one_hot(logits.argmax(-1), logits.shape[-1]).float()
        logits = logits / self.temperature
        if 0 < self.top_k < logits.shape[-1]:
            smallest_kept = logits.topk(self.top_k, dim=-1).values[..., -1:]
            logits = logits.masked_fill(logits < smallest_kept, float("-inf"))
        if self.top_p < 1:
            ordered, order = logits.softmax(-1).sort(dim=-1, descending=True)
            before = ordered.cumsum(-1) - ordered
            beyond = (before >= self.top_p) & (before > 0)  # keeps the first token even if float32 rounds top_p to 0
            dropped = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, order, beyond)
            logits = logits.masked_fill(dropped, float("-inf"))
        return logits.softmax(-1)

    def choose(self, logits: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Token ids ``[...]`` from logits ``[..., vocab]``: the argmax, or a sample."""
        if self.greedy:
            return logits.argmax(-1)
        return draw(self.probabilities(logits), generator)


def draw(probabilities: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """One token id ``[...]`` drawn from each row of ``[..., vocab]``; rows need not sum to one."""
    flat = probabilities.reshape(-1, probabilities.shape[-1])
    return torch.multinomial(flat, 1, generator=generator).view(probabilities.shape[:-1])


def inverse_draw(weights: Tensor, uniforms: Tensor) -> Tensor:
    """One token ``[...]`` per row of ``weights [..., vocab]``, by inversion of ``uniforms [...]`` in [0, 1).

    Rows need not sum to one. A token depends on its own row and number only.
    """
    edges = weights.double().cumsum(-1)
    return torch.searchsorted(edges, (uniforms * edges[..., -1])[..., None], right=True)[..., 0]
