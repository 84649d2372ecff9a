"""Laws of drafter and target written out in full."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from draftopd.decoding.sampling import draw
from draftopd.decoding.verify import Verdict, accepted_prefix

VOCAB = 5


SAMPLES = 300_000

#: A right implementation lies above the first p-value, a wrong one is to lie below the second.
CORRECT, WRONG = 1e-3, 1e-9


ChiSquare = Callable[[Tensor, Tensor], float]


class Laws:
    """Random distributions ``p`` (slots 1..K+1) and ``q`` (slots 1..K) that depend on slot and prefix.

    ``p[k]`` is ``[vocab] * (k + 1)``: the last dimension is the law of slot ``k + 1`` after the prefix.
    """

    def __init__(self, proposals: int, seed: int = 0, depends_on_prefix: bool = True) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.K, self.depends_on_prefix = proposals, depends_on_prefix
        self.p = [self._table(k, forbidden=0) for k in range(proposals + 1)]
        self.q = [self._table(k, forbidden=1) for k in range(proposals)]

    def _table(self, depth: int, forbidden: int) -> Tensor:
        shape = [VOCAB] * depth if self.depends_on_prefix else [1] * depth
        table = torch.rand(*shape, VOCAB, generator=self.generator) ** 2 + 0.02
        # As after top-k: in some rows a token has no mass at all.
        table[..., forbidden] *= torch.rand(table.shape[:-1], generator=self.generator) < 0.5
        return (table / table.sum(-1, keepdim=True)).expand(*[VOCAB] * depth, VOCAB)

    def propose(self, samples: int, choose: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Proposals ``[samples, K]``, and ``q`` and ``p`` along them."""
        tokens = torch.zeros(samples, 0, dtype=torch.long)
        q, p = [], [self.at(self.p[0], tokens)]
        for k in range(self.K):
            q.append(self.at(self.q[k], tokens))
            tokens = torch.cat([tokens, choose(q[-1])[:, None]], 1)
            p.append(self.at(self.p[k + 1], tokens))
        return tokens, torch.stack(q, 1), torch.stack(p, 1)

    def at(self, table: Tensor, prefix: Tensor) -> Tensor:
        """``[samples, vocab]``: the table's rows after each prefix."""
        return table[tuple(prefix.T)] if prefix.shape[1] else table.expand(len(prefix), VOCAB)

    def complete(self, proposals: Tensor, verdict: Verdict) -> Tensor:
        """``[samples, K + 1]``: the emitted tokens, continued by the target's own draws."""
        tokens = torch.zeros(len(proposals), 0, dtype=torch.long)
        padded = torch.cat([proposals, proposals[:, :1]], 1)
        for k in range(self.K + 1):
            own = draw(self.at(self.p[k], tokens), self.generator)
            emitted = torch.where(verdict.accepted > k, padded[:, k], verdict.token)
            tokens = torch.cat([tokens, torch.where(verdict.accepted >= k, emitted, own)[:, None]], 1)
        return tokens

    def target_law(self) -> Tensor:
        """``[vocab] * (K + 1)``: the target's law of K + 1 tokens."""
        law = torch.ones(())
        for table in self.p:
            law = law[..., None] * table
        return law


def number(tokens: Tensor) -> Tensor:
    """Each row of tokens as one number in base ``VOCAB``."""
    return (tokens * VOCAB ** torch.arange(tokens.shape[1] - 1, -1, -1)).sum(1)


def correction_from_target(
    proposals: Tensor, q: Tensor, p: Tensor, generator: torch.Generator | None = None
) -> Verdict:
    """Wrong: takes the token after a rejection from the target's law, not from what acceptance left of it."""
    chosen = proposals[..., None]
    ratio = p[..., :-1, :].gather(-1, chosen) / q.gather(-1, chosen)
    accepted = accepted_prefix(torch.rand(proposals.shape, generator=generator) < ratio[..., 0])
    return Verdict(accepted, draw(p[torch.arange(len(accepted)), accepted], generator))
