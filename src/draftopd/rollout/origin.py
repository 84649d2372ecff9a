"""Whether texts that came from elsewhere are the target's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from draftopd.decoding.sampling import Sampling
from draftopd.targets.target import Target

if TYPE_CHECKING:
    from draftopd.rollout.trajectories import Trajectory

#: How far below the best token's logit another engine's greedy choice may lie: rounding in low precision
#: decides near ties differently.
TIE = 1.0

#: Above temperature 0: a token less likely than this was not drawn from the target.
IMPOSSIBLE = 1e-9


@torch.no_grad()
def foreign_tokens(
    target: Target, texts: Sequence[Trajectory], sampling: Sampling, batch_size: int = 16
) -> list[list[int]]:
    """For every text the response tokens, by place from 0, that the target would not have produced.

    At temperature 0 those more than :data:`TIE` below the best logit, else those of no probability.
    """
    found: list[list[int]] = []
    for begin in range(0, len(texts), batch_size):
        batch = texts[begin : begin + batch_size]
        rows = [torch.tensor([*t.prompt, *t.response], device=target.device) for t in batch]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        hidden = target.read(ids, target.new_cache(ids.shape[1])).hidden
        for states, row, text in zip(hidden, rows, batch, strict=True):
            start = len(text.prompt)
            logits = target.head.logits(states[start - 1 : len(row) - 1])
            chosen = row[start:, None]
            if sampling.greedy:
                wrong = logits.max(-1).values - logits.gather(-1, chosen)[:, 0] > TIE
            else:
                wrong = sampling.probabilities(logits).gather(-1, chosen)[:, 0] < IMPOSSIBLE
            found.append(wrong.nonzero()[:, 0].tolist())
    return found
