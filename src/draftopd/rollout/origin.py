"""Tests whether texts from other programs could have been produced by the target."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from draftopd.decoding.sampling import Sampling
from draftopd.targets.target import Target

if TYPE_CHECKING:
    from draftopd.rollout.request import Trajectory

#: Maximum distance of a greedy token's logit from the best one; low precision may decide near ties differently.
TIE = 1.0

#: A token with a probability below this was not drawn from the target.
IMPOSSIBLE = 1e-9


def foreign_tokens(
    target: Target, texts: Sequence[Trajectory], sampling: Sampling, batch_size: int = 16
) -> list[list[int]]:
    """For every text the indices of the response tokens that the target would not have produced.

    At temperature 0 these are tokens whose logit is more than :data:`TIE` below the best, else tokens with a
    probability below :data:`IMPOSSIBLE`.
    """

    def wrong(logits: Tensor, chosen: Tensor) -> Tensor:
        if sampling.greedy:
            return logits.max(-1).values - logits.gather(-1, chosen[:, None])[:, 0] > TIE
        return sampling.probabilities(logits).gather(-1, chosen[:, None])[:, 0] < IMPOSSIBLE

    return [foreign.nonzero()[:, 0].tolist() for foreign in _every_token(target, texts, wrong, batch_size)]


def excess_surprise(target: Target, texts: Sequence[Trajectory], sampling: Sampling, batch_size: int = 16) -> float:
    """The mean surprise of the response tokens under the target, minus the expected one of its own draws, in nats.

    It is about 0 for the target's own texts and larger for another model's. At temperature 0 it is 0, and
    :func:`foreign_tokens` alone decides.
    """
    if sampling.greedy:
        return 0.0

    def excess(logits: Tensor, chosen: Tensor) -> Tensor:
        p = sampling.probabilities(logits)
        log_p = p.clamp_min(IMPOSSIBLE).log()
        return (p * log_p).sum(-1) - log_p.gather(-1, chosen[:, None])[:, 0]

    return float(torch.cat(list(_every_token(target, texts, excess, batch_size))).mean())


@torch.no_grad()
def _every_token(
    target: Target, texts: Sequence[Trajectory], fn: Callable[[Tensor, Tensor], Tensor], batch_size: int
) -> Iterator[Tensor]:
    """``fn(logits [n, vocab], tokens [n]) -> [n]`` along every response, in chunks of bounded memory."""
    for begin in range(0, len(texts), batch_size):
        batch = texts[begin : begin + batch_size]
        rows = [torch.tensor([*t.prompt, *t.response], device=target.device) for t in batch]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        hidden = target.read(ids, target.new_cache(ids.shape[1])).hidden
        for states, row, text in zip(hidden, rows, batch, strict=True):
            start = len(text.prompt)
            parts = target.head.chunks(states[start - 1 : len(row) - 1], row[start:])
            yield torch.cat([fn(target.head.logits(part), tokens) for part, tokens in parts])
