"""A replay batch: recorded sequences and the anchors to draft at."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from draftopd.replay.packing import Layout, pack
from draftopd.rollout.buffer import Recorded

#: Value of ``made_at`` for anchors that do not depend on a drafter.
NO_DRAFTER = -1


class ReplayBatch(NamedTuple):
    """Recorded sequences and the anchors to replay.

    ``ids [batch, n]`` are padded on the right, ``starts [batch]`` are the first response positions and
    ``lengths [batch]`` the sequences' lengths. ``anchors [batch, A]`` are padded, with ``anchor_mask [batch, A]`` True
    at the real ones. ``made_at [batch]`` is the number of optimizer steps taken by the drafter that the anchors come
    from, or :data:`NO_DRAFTER`.

    With a ``layout`` rows are packed: ``ids [rows, n]``, and ``anchors [rows, A]`` are indices in the row. The other
    fields are per sequence, and ``starts`` count from the beginning of the sequence.
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
        """The batch of these records, with one row per record or packed.

        Args:
            anchors: positions in each record; None takes the anchors of the record.
            pad: token id that pads rows.
            pack_to: pack sequences into rows of at most this many tokens; None gives each sequence its own row.
            of_the_drafter: whether the anchors depend on the drafter that made the records.
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
        """``[rows, n]`` the index in the row at which the sequence of each token begins; None without packing."""
        return None if self.layout is None else self.layout.begins(self.ids)

    def unpacked(self, packed: Tensor) -> Tensor:
        """``[rows, n, ...] -> [batch, longest, ...]``: values per token of the rows, as one row per sequence."""
        return packed if self.layout is None else self.layout.unpacked(packed, int(self.lengths.max()))

    def at(self, chosen: Sequence[Tensor], made_at: int) -> ReplayBatch:
        """The same sequences at other anchors, given as one tensor of positions per sequence."""
        anchors, mask = pad_anchors(chosen if self.layout is None else self.layout.by_row(chosen, len(self.ids)))
        device = self.ids.device
        return self._replace(
            anchors=anchors.to(device), anchor_mask=mask.to(device), made_at=torch.full_like(self.made_at, made_at)
        )


def pad_anchors(chosen: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Anchors ``[batch, A]``, padded with the row's last or with 0, and the mask of the real ones; ``A >= 1``."""
    count = max(1, *map(len, chosen))
    anchors = torch.zeros(len(chosen), count, dtype=torch.long)
    mask = torch.zeros(len(chosen), count, dtype=torch.bool)
    for row, positions in enumerate(chosen):
        if len(positions):
            anchors[row] = positions[-1]  # padding then sees no more of the row than the last anchor
        anchors[row, : len(positions)] = positions
        mask[row, : len(positions)] = True
    return anchors, mask
