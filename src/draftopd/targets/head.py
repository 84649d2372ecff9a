"""LM heads: from hidden states to logits, over the target's vocabulary or a part of it."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

#: Maximum number of float32 logits in memory at a time: 32 MiB per copy, about the cache of a CPU.
CHUNK_ELEMENTS = 2**23
#: Multiple of it on a GPU, where larger chunks pay because every chunk reads the whole head again.
GPU_CHUNKS = 8


def rows_at_once(logits: int, gpu: bool) -> int:
    """The number of rows, of this many logits each, to compute at a time."""
    return max(1, (GPU_CHUNKS if gpu else 1) * CHUNK_ELEMENTS // logits)


class LMHead:
    """A linear map from hidden states to logits, one row per token.

    Args:
        module: the output embedding, ``weight [size, hidden]``.
        softcap: where set, logits become ``softcap * tanh(logits / softcap)`` (Gemma).
        vocabulary: the target's tokens that have a row; None means all.
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
        """The number of rows, of ``per_row`` states each, whose logits fit into bounded memory."""
        return rows_at_once(self.weight.shape[0] * per_row, self.weight.is_cuda)

    def chunks(self, *tensors: Tensor, per_row: int = 1) -> Iterator[tuple[Tensor, ...]]:
        """Tuples of slices of the tensors ``[n, ...]``, :meth:`rows_at_once` rows each."""
        size = self.rows_at_once(per_row)
        return zip(*(tensor.split(size) for tensor in tensors), strict=True)

    def target_logits(self, hidden: Tensor) -> Tensor:
        """``[..., hidden] -> [..., vocab]`` over the target's whole vocabulary, ``-inf`` at tokens without a row."""
        logits = self.logits(hidden)
        return logits if self.vocabulary is None else self.vocabulary.spread(logits)

    @torch.no_grad()
    def best_tokens(self, hidden: Tensor) -> Tensor:
        """The most likely token ``[...]`` at each state ``[..., hidden]``, computed in chunks."""
        parts = [self.logits(part).argmax(-1) for (part,) in self.chunks(hidden.flatten(0, -2))]
        best = torch.cat(parts).view(hidden.shape[:-1])
        return best if self.vocabulary is None else self.vocabulary.ids[best]

    def restrict(self, log_probs: Tensor) -> Tensor:
        """The columns ``[..., size]`` of ``[..., vocab]`` whose tokens have a row."""
        return log_probs if self.vocabulary is None else log_probs[..., self.vocabulary.ids]

    def covers(self, tokens: Tensor) -> Tensor:
        """``[...]`` True at tokens ``[...]`` that have a row."""
        if self.vocabulary is None:
            return torch.ones_like(tokens, dtype=torch.bool)
        return self.vocabulary.inside[tokens]

    def row_of(self, tokens: Tensor) -> Tensor:
        """The row ``[...]`` of each token ``[...]``; an arbitrary row for a token without one."""
        return tokens if self.vocabulary is None else self.vocabulary.rows[tokens]


class Vocabulary:
    """A subset of the target's vocabulary.

    Args:
        inside: bool ``[vocab]``, True at the subset's tokens.
    """

    def __init__(self, inside: Tensor) -> None:
        self.inside = inside
        #: ``[size]`` token ids, ascending.
        self.ids = inside.nonzero()[:, 0]
        #: ``[vocab]`` the index in ``ids`` of each token.
        self.rows = (inside.long().cumsum(0) - 1).clamp_min(0)

    def spread(self, logits: Tensor) -> Tensor:
        """``[..., size] -> [..., vocab]``, ``-inf`` at tokens outside the subset."""
        whole = logits.new_full((*logits.shape[:-1], len(self.inside)), -torch.inf)
        whole[..., self.ids] = logits
        return whole
