"""Packing of several recorded sequences into one row."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Distribute sequences over rows with little padding.

    For every number of rows, sequences are assigned by descending length to the row with the fewest tokens. The number
    of rows with the smallest padded size wins, and the larger of equals, whose attention costs less. A row holds at
    most ``capacity`` tokens, or the longest sequence if that is longer. The padded size is never larger than with one
    row per sequence.

    Returns:
        The indices of the sequences per row, ascending in a row; rows are ordered by their first index. Which lengths
        share a row does not depend on the order of ``lengths``.
    """
    longest = max(lengths)
    bound = max(capacity, longest)
    descending = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    best: list[list[int]] = []
    smallest = len(lengths) * longest
    for count in range(-(-sum(lengths) // bound), len(lengths) + 1):
        filled = [(0, row) for row in range(count)]
        rows: list[list[int]] = [[] for _ in range(count)]
        for i in descending:
            tokens, row = heapq.heappop(filled)
            rows[row].append(i)
            heapq.heappush(filled, (tokens + lengths[i], row))
        width = max(filled)[0]
        if width <= bound and count * width <= smallest:
            best, smallest = rows, count * width
        if width == longest:
            break  # more rows of this width only add padding
    return sorted(sorted(row) for row in best)


class Layout(NamedTuple):
    """The rows ``[S]`` of the sequences of a packed batch, and the offsets ``[S]`` of their first tokens."""

    rows: Tensor
    offsets: Tensor

    @classmethod
    def of(cls, rows: Sequence[Sequence[int]], lengths: Sequence[int]) -> Layout:
        """The layout of sequences of these lengths, distributed over rows by :func:`pack`."""
        row_of, offsets = torch.zeros(2, len(lengths), dtype=torch.long)
        for row, members in enumerate(rows):
            filled = 0
            for i in members:
                row_of[i], offsets[i] = row, filled
                filled += lengths[i]
        return cls(row_of, offsets)

    def begins(self, ids: Tensor) -> Tensor:
        """``[rows, n]`` the index in the row at which the sequence of each token of ``ids [rows, n]`` begins.

        Padding at the end of a row counts as part of the last sequence.
        """
        marks = torch.zeros_like(ids)
        marks[self.rows, self.offsets] = self.offsets
        return marks.cummax(1).values

    def ends(self, ids: Tensor, lengths: Tensor) -> Tensor:
        """``[rows, n]`` the index after a sequence's last token, at the index of its first token; 0 elsewhere."""
        marks = torch.zeros_like(ids)
        marks[self.rows, self.offsets] = self.offsets + lengths
        return marks

    def unpacked(self, packed: Tensor, longest: int) -> Tensor:
        """``[rows, n, ...] -> [S, longest, ...]``: one row per sequence, with arbitrary values after its end."""
        indices = self.offsets[:, None] + torch.arange(longest, device=packed.device)
        return packed[self.rows[:, None], indices.clamp_max(packed.shape[1] - 1)]

    def by_row(self, chosen: Sequence[Tensor], count: int) -> list[Tensor]:
        """Positions in each sequence as indices in each of ``count`` rows."""
        rows: list[list[Tensor]] = [[] for _ in range(count)]
        for positions, row, offset in zip(chosen, self.rows.tolist(), self.offsets.tolist(), strict=True):
            rows[row].append(positions + offset)
        return [torch.cat(parts) for parts in rows]
