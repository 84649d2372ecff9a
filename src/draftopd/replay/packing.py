"""Several recorded sequences in one row: which go together, and where each then stands. Pure."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Share sequences out to rows so that as few places as possible hold no token.

    For every number of rows the longest sequence left goes to the emptiest row, and of these the fullest rows win;
    of equals the shorter ones, whose attention costs less. A row holds at most ``capacity`` tokens, or the longest
    sequence where that is longer; all rows together never have more places than with one row a sequence.

    Returns:
        The sequences' indices by row, ascending in a row and by a row's first. Which lengths meet in a row does not
        depend on the order they came in.
    """
    longest = max(lengths)
    bound = max(capacity, longest)
    descending = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    best: list[list[int]] = []
    fewest = len(lengths) * longest
    for count in range(-(-sum(lengths) // bound), len(lengths) + 1):
        filled = [(0, row) for row in range(count)]
        rows: list[list[int]] = [[] for _ in range(count)]
        for i in descending:
            tokens, row = heapq.heappop(filled)
            rows[row].append(i)
            heapq.heappush(filled, (tokens + lengths[i], row))
        width = max(filled)[0]
        if width <= bound and count * width <= fewest:
            best, fewest = rows, count * width
        if width == longest:
            break  # more rows of this width hold only more padding
    return sorted(sorted(row) for row in best)


class Layout(NamedTuple):
    """Where the ``S`` sequences of a packed batch stand: ``rows [S]``, and ``offsets [S]`` of their first tokens."""

    rows: Tensor
    offsets: Tensor

    @classmethod
    def of(cls, rows: Sequence[Sequence[int]], lengths: Sequence[int]) -> Layout:
        """The sequences of these lengths one after another, as :func:`pack` shares them out."""
        found, offsets = torch.zeros(2, len(lengths), dtype=torch.long)
        for row, members in enumerate(rows):
            filled = 0
            for i in members:
                found[i], offsets[i] = row, filled
                filled += lengths[i]
        return cls(found, offsets)

    def begins(self, ids: Tensor) -> Tensor:
        """``[rows, n]``: where the sequence of each place of ``ids [rows, n]`` begins.

        The padding behind a row's last sequence counts as part of it.
        """
        marks = torch.zeros_like(ids)
        marks[self.rows, self.offsets] = self.offsets
        return marks.cummax(1).values

    def ends(self, ids: Tensor, lengths: Tensor) -> Tensor:
        """``[rows, n]``, at the places where a sequence begins: the place after its last token; elsewhere 0."""
        marks = torch.zeros_like(ids)
        marks[self.rows, self.offsets] = self.offsets + lengths
        return marks

    def unpacked(self, packed: Tensor, longest: int) -> Tensor:
        """``[rows, n, ...] -> [S, longest, ...]``: a row a sequence; whatever stands behind its end."""
        places = self.offsets[:, None] + torch.arange(longest, device=packed.device)
        return packed[self.rows[:, None], places.clamp_max(packed.shape[1] - 1)]

    def by_row(self, chosen: Sequence[Tensor], count: int) -> list[Tensor]:
        """Positions in each sequence as places in each of ``count`` rows."""
        rows: list[list[Tensor]] = [[] for _ in range(count)]
        for positions, row, offset in zip(chosen, self.rows.tolist(), self.offsets.tolist(), strict=True):
            rows[row].append(positions + offset)
        return [torch.cat(parts) for parts in rows]
