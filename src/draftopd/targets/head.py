"""LM heads: from hidden states to logits, over the target's vocabulary or a part of it."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

#: Logits held at once, in elements (float32): 32 MiB per copy, half of which fits into the caches of a CPU.
CHUNK_ELEMENTS = 2**23
#: The same on a GPU, as a multiple: every chunk reads the whole head again.
GPU_CHUNKS = 8


def rows_at_once(logits: int, gpu: bool) -> int:
    """How many rows of that many logits each to hold at once."""
    return max(1, (GPU_CHUNKS if gpu else 1) * CHUNK_ELEMENTS // logits)


class LMHead:
    """Hidden states to logits.

    Args:
        module: the output embedding, ``weight [size, hidden]``.
        softcap: logits pass through ``softcap * tanh(logits / softcap)`` where set (Gemma).
        vocabulary: the target's tokens that the rows stand for; None: all of them.
    """

    def __init__(self, module: nn.Module, softcap: float | None = None, vocabulary: Vocabulary | None = None) -> None:
        self._module = module
        self.softcap, self.vocabulary = softcap, vocabulary

    @property
    def weight(self) -> Tensor:
        weight = self._module.weight
        assert isinstance(weight, Tensor)
        return weight

    def logits(self, hidden: Tensor) -> Tensor:
        """``[..., hidden] -> [..., size]`` in float32."""
        logits = torch.nn.functional.linear(hidden.to(self.weight.dtype), self.weight).float()
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def rows_at_once(self, per_row: int = 1) -> int:
        """How many rows of ``per_row`` states each to turn into logits at once, so that memory stays bounded."""
        return rows_at_once(self.weight.shape[0] * per_row, self.weight.is_cuda)

    def chunks(self, *tensors: Tensor, per_row: int = 1) -> Iterator[tuple[Tensor, ...]]:
        """The tensors ``[n, ...]`` side by side, :meth:`rows_at_once` rows at a time."""
        size = self.rows_at_once(per_row)
        return zip(*(tensor.split(size) for tensor in tensors), strict=True)

    def target_logits(self, hidden: Tensor) -> Tensor:
        """``[..., hidden] -> [..., vocab]`` over the target's whole vocabulary, ``-inf`` at tokens without a row."""
        logits = self.logits(hidden)
        return logits if self.vocabulary is None else self.vocabulary.spread(logits)

    def best_tokens(self, hidden: Tensor) -> Tensor:
        """The most likely token ``[...]`` at each state ``[..., hidden]``."""
        best = self.logits(hidden).argmax(-1)
        return best if self.vocabulary is None else self.vocabulary.ids[best]

    def restrict(self, log_probs: Tensor) -> Tensor:
        """The columns of ``[..., vocab]`` that have a row, ``[..., size]``."""
        return log_probs if self.vocabulary is None else log_probs[..., self.vocabulary.ids]

    def covers(self, tokens: Tensor) -> Tensor:
        """Which tokens ``[...]`` have a row."""
        if self.vocabulary is None:
            return torch.ones_like(tokens, dtype=torch.bool)
        return self.vocabulary.inside[tokens]

    def row_of(self, tokens: Tensor) -> Tensor:
        """The row ``[...]`` of each token ``[...]``; where it has none, any."""
        return tokens if self.vocabulary is None else self.vocabulary.rows[tokens]


class Vocabulary:
    """A part of the target's vocabulary.

    Args:
        inside: bool ``[vocab]``, True at its tokens.
    """

    def __init__(self, inside: Tensor) -> None:
        self.inside = inside
        #: ``[size]`` token ids, ascending.
        self.ids = inside.nonzero()[:, 0]
        #: ``[vocab]`` the row of each token.
        self.rows = (inside.long().cumsum(0) - 1).clamp_min(0)

    def spread(self, logits: Tensor) -> Tensor:
        """``[..., size] -> [..., vocab]``, ``-inf`` outside."""
        whole = logits.new_full((*logits.shape[:-1], len(self.inside)), -torch.inf)
        whole[..., self.ids] = logits
        return whole


@torch.no_grad()
def best_tokens(hidden: Tensor, head: LMHead) -> Tensor:
    """The head's most likely token ``[...]`` at every state ``[..., hidden]``, in chunks."""
    flat = hidden.detach().flatten(0, -2)
    return torch.cat([head.best_tokens(part) for (part,) in head.chunks(flat)]).view(hidden.shape[:-1])
