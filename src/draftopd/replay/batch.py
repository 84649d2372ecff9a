"""A replay batch: recorded sequences and the anchors to draft at."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from draftopd.replay.packing import Layout


class ReplayBatch(NamedTuple):
    """Recorded sequences and the anchors to replay.

    ``ids [batch, n]`` padded on the right, ``starts [batch]`` the first response positions, ``lengths [batch]``,
    ``anchors [batch, A]`` padded, with ``anchor_mask [batch, A]`` True at the real ones. ``made_at [batch]``: how
    many optimizer steps the drafter had taken whose anchors these are; -1 where they are no drafter's.

    With a ``layout`` several sequences stand in a row: ``ids [rows, n]``, and ``anchors [rows, A]`` are places in the
    row. All else is by sequence, ``starts`` counted from the sequence's own beginning.
    """

    ids: Tensor
    starts: Tensor
    lengths: Tensor
    anchors: Tensor
    anchor_mask: Tensor
    made_at: Tensor
    layout: Layout | None = None

    @property
    def begins(self) -> Tensor | None:
        """``[rows, n]``: where in its row the sequence of each place begins; None where a row holds one sequence."""
        return None if self.layout is None else self.layout.begins(self.ids)

    def unpacked(self, packed: Tensor) -> Tensor:
        """Values of each place of the rows ``[rows, n, ...]``, a row a sequence: ``[batch, longest, ...]``."""
        return packed if self.layout is None else self.layout.unpacked(packed, int(self.lengths.max()))

    def at(self, chosen: Sequence[Tensor], made_at: int) -> ReplayBatch:
        """The same sequences at other anchors, one tensor of positions a sequence."""
        anchors, mask = pad_anchors(chosen if self.layout is None else self.layout.by_row(chosen, len(self.ids)))
        device = self.ids.device
        return self._replace(
            anchors=anchors.to(device), anchor_mask=mask.to(device), made_at=torch.full_like(self.made_at, made_at)
        )


def pad_anchors(chosen: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Anchors ``[batch, A]`` padded with the row's last, and the mask of the real ones; ``A`` is at least 1.

    A row of no anchors has zeros.
    """
    count = max(1, *(len(places) for places in chosen))
    anchors = torch.zeros(len(chosen), count, dtype=torch.long)
    mask = torch.zeros(len(chosen), count, dtype=torch.bool)
    for row, places in enumerate(chosen):
        if len(places):
            anchors[row] = places[-1]  # it sees what the last does: no more of the row has to be read for it
        anchors[row, : len(places)] = places
        mask[row, : len(places)] = True
    return anchors, mask
