"""A replay batch: recorded sequences and the anchors to draft at."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from draftopd.replay.packing import Layout, pack
from draftopd.rollout.buffer import Recorded

#: ``made_at`` of anchors that do not depend on a drafter.
NO_DRAFTER = -1


class ReplayBatch(NamedTuple):
    """Recorded sequences and the anchors to replay.

    ``ids [batch, n]`` padded on the right, ``starts [batch]`` the first response positions, ``lengths [batch]``,
    ``anchors [batch, A]`` padded, with ``anchor_mask [batch, A]`` True at the real ones. ``made_at [batch]``: how
    many optimizer steps the drafter had taken whose anchors these are; -1 where they do not depend on a drafter.

    With a ``layout`` several sequences stand in a row: ``ids [rows, n]``, and ``anchors [rows, A]`` are positions in
    the row. All else is by sequence, ``starts`` counted from the sequence's own beginning.
    """

    ids: Tensor
    starts: Tensor
    lengths: Tensor
    anchors: Tensor
    anchor_mask: Tensor
    made_at: Tensor
    layout: Layout | None = None

    @classmethod
    def collate(
        cls,
        records: Sequence[Recorded],
        anchors: Sequence[Tensor] | None = None,
        *,
        pad: int = 0,
        pack_to: int | None = None,
        of_the_drafter: bool = True,
    ) -> ReplayBatch:
        """The batch of these records: one row per record, or packed.

        Args:
            anchors: positions in each record; None takes the record's own.
            pad: token id behind the end of a row.
            pack_to: put several sequences in a row of up to this many tokens; None gives each a row of its own.
            of_the_drafter: whether the anchors are those of the drafter that made the records.
        """
        lengths = [len(r.tokens) for r in records]
        chosen = [torch.tensor(r.anchors, dtype=torch.long) for r in records] if anchors is None else anchors
        rows = pack(lengths, pack_to) if pack_to else [[i] for i in range(len(records))]
        layout = None
        if len(rows) < len(records):
            layout = Layout.of(rows, lengths)
            chosen = layout.by_row(chosen, len(rows))
        texts = [torch.tensor([token for i in row for token in records[i].tokens]) for row in rows]
        ids = pad_sequence(texts, batch_first=True, padding_value=pad)
        starts = torch.tensor([r.prompt_length for r in records])
        steps = [NO_DRAFTER if r.step is None or not of_the_drafter else r.step for r in records]
        return cls(ids, starts, torch.tensor(lengths), *pad_anchors(chosen), torch.tensor(steps), layout)

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
