"""From logits to a distribution and to tokens: temperature, top-k, top-p. Pure tensors."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

#: Below this a temperature is 0 in all but name, and float32 logits overflow when divided by it.
LEAST_TEMPERATURE = 1e-6


@dataclass(frozen=True)
class Sampling:
    """The warping that both the target's and the drafter's distribution pass through.

    Args:
        temperature: 0 takes the argmax; above 0, and then at least 1e-6, the logits are divided by it.
        top_k: keep the k most likely tokens; 0 keeps all.
        top_p: keep the smallest set of most likely tokens whose mass reaches this; 1 keeps all.

    Raises:
        ValueError: if a value lies outside its range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not self.temperature >= 0:  # so that NaN is refused too
            raise ValueError(f"temperature must be 0 (greedy) or more, found {self.temperature}.")
        if 0 < self.temperature < LEAST_TEMPERATURE or math.isinf(self.temperature):
            raise ValueError(
                f"temperature must be 0 (greedy) or lie between {LEAST_TEMPERATURE:g} and infinity, "
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
            beyond = (before >= self.top_p) & (before > 0)  # the first is kept though float32 rounds top_p to 0
            dropped = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, order, beyond)
            logits = logits.masked_fill(dropped, float("-inf"))
        return logits.softmax(-1)

    def choose(self, logits: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Token ids ``[...]`` from logits ``[..., vocab]``: the argmax, or a sample."""
        if self.greedy:
            return logits.argmax(-1)
        return draw(self.probabilities(logits), generator)


def draw(probabilities: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """One token id ``[...]`` from each row of ``[..., vocab]``; rows need not sum to one."""
    flat = probabilities.reshape(-1, probabilities.shape[-1])
    return torch.multinomial(flat, 1, generator=generator).view(probabilities.shape[:-1])


def inverse_draw(weights: Tensor, luck: Tensor) -> Tensor:
    """The token ``[...]`` that each uniform number ``luck [...]`` in [0, 1) falls on, among ``weights [..., vocab]``.

    Rows need not sum to one. The same numbers give the same tokens, whatever else is drawn beside them.
    """
    edges = weights.double().cumsum(-1)
    return torch.searchsorted(edges, (luck * edges[..., -1])[..., None], right=True)[..., 0]
