"""Replay batches from the anchor buffer, in an order that a checkpoint can go on with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset, Sampler

from draftopd.replay.batch import ReplayBatch, pad_anchors
from draftopd.replay.packing import Layout, pack
from draftopd.rollout.anchors import AnchorPolicy
from draftopd.rollout.buffer import AnchorBuffer, Recorded

#: Records with the anchors of the drafter as it now is.
Renew = Callable[[list[Recorded]], list[Recorded]]

#: Batches sorted by length together: within a bucket rows are alike, across buckets order is random.
BUCKET = 16


class ReplaySampler(Sampler[list[int]]):
    """Index batches of similar length in seeded order, ``batches`` of them whatever the buffer holds.

    Where the buffer has fewer sequences it is gone through again in another order.
    """

    def __init__(self, batches: int, batch_size: int, seed: int, rank: int = 0, ranks: int = 1) -> None:
        self.batches, self.batch_size, self.seed = batches, batch_size, seed
        self.rank, self.ranks = rank, ranks
        self.epoch = 0
        self.lengths: list[int] = []

    @property
    def sampler(self) -> ReplaySampler:
        """Itself: where the trainer looks for :meth:`set_epoch`."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Each epoch has an order of its own; the trainer tells which it is, after a resume too."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + self.epoch) % 2**63)
        wanted = self.batches * self.batch_size * self.ranks
        order: list[int] = []
        while len(order) < wanted:
            order += torch.randperm(len(self.lengths), generator=generator).tolist()
        groups: list[list[int]] = []
        pool = BUCKET * self.batch_size * self.ranks
        for start in range(0, wanted, pool):
            bucket = sorted(order[start : min(start + pool, wanted)], key=lambda i: self.lengths[i])
            step = self.batch_size * self.ranks
            groups += [bucket[i : i + step] for i in range(0, len(bucket), step)]
        for place in torch.randperm(len(groups), generator=generator).tolist():
            yield groups[place][self.rank :: self.ranks]


class ReplayDataset(Dataset[Recorded]):
    """The newest generation of the buffer at the moment an epoch begins."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.buffer: AnchorBuffer | None = None

    def open(self) -> AnchorBuffer:
        self.buffer = AnchorBuffer.latest(self.root)
        return self.buffer

    def __getitem__(self, index: int) -> Recorded:
        assert self.buffer is not None
        return self.buffer[index]


class ReplayLoader(DataLoader[Recorded]):
    """A loader that can be put back in mid-epoch: same batches, same anchors.

    Args:
        dataset, sampler: the buffer, and the order it is gone through.
        policy: which anchors are replayed.
        pad: token id behind the end of a sequence.
        renew: gives records the current drafter's anchors; called with those of the next ``renew_every`` batches.
            The loader runs in the training process and serves each batch when it is needed, so that "current"
            means the step just taken.
        pack_to: see :class:`ReplayDataModule`.
    """

    def __init__(
        self,
        dataset: ReplayDataset,
        sampler: ReplaySampler,
        policy: AnchorPolicy,
        pad: int,
        renew: Renew | None = None,
        renew_every: int = 0,
        pack_to: int | None = None,
    ) -> None:
        super().__init__(dataset, batch_sampler=sampler, collate_fn=lambda rows: rows)
        self.replays, self.order = dataset, sampler
        self.policy, self.pad = policy, pad
        self.renew, self.renew_every = renew, renew_every
        self.pack_to = pack_to
        self._served = 0
        self._restored: dict[str, Any] | None = None
        self._renewed: dict[int, list[Recorded]] = {}  # by the batch's place in the epoch

    def __iter__(self) -> Iterator[ReplayBatch]:  # type: ignore[override]
        buffer = self.replays.open()
        self.order.lengths = buffer.lengths
        batches = list(self.order)
        skip, self._renewed = self._put_back(buffer, batches)
        self._served = skip
        for place, indices in enumerate(batches):
            if place < skip:
                continue
            if self.renew is not None and self.renew_every and place not in self._renewed:
                self._renew(self.renew, buffer, batches, place)
            self._served = place + 1
            generator = torch.Generator().manual_seed(
                (
                    (self.order.seed * 1_000_003 + self.order.epoch) * 1_000_003
                    + place * self.order.ranks
                    + self.order.rank
                )
                % 2**63
            )
            yield self.collate(self._renewed.get(place) or [buffer[i] for i in indices], generator)

    def _renew(self, renew: Renew, buffer: AnchorBuffer, batches: list[list[int]], place: int) -> None:
        """Renew the anchors of the next batches, all at once."""
        after = (place // self.renew_every + 1) * self.renew_every
        coming = range(place, min(after, len(batches)))
        records = iter(renew([buffer[i] for p in coming for i in batches[p]]))
        self._renewed = {p: [next(records) for _ in batches[p]] for p in coming}

    def collate(self, records: list[Recorded], generator: torch.Generator) -> ReplayBatch:
        """Put the records' tokens and chosen anchors into one batch: a row a record, or packed; padded."""
        chosen = [self.policy.choose(r.anchors, r.accepted, r.prompt_length, len(r.tokens), generator) for r in records]
        lengths = [len(r.tokens) for r in records]
        rows = pack(lengths, self.pack_to) if self.pack_to else [[i] for i in range(len(records))]
        layout = None
        if len(rows) < len(records):
            layout = Layout.of(rows, lengths)
            chosen = layout.by_row(chosen, len(rows))
        texts = [torch.tensor([token for i in row for token in records[i].tokens]) for row in rows]
        ids = pad_sequence(texts, batch_first=True, padding_value=self.pad)
        starts = torch.tensor([r.prompt_length for r in records])
        made_at = torch.tensor([-1 if r.step is None or not self.policy.of_the_drafter else r.step for r in records])
        return ReplayBatch(ids, starts, torch.tensor(lengths), *pad_anchors(chosen), made_at, layout)

    def state_dict(self) -> dict[str, Any]:
        renewed = {
            place: [[r.anchors, r.accepted, r.emitted, r.step] for r in records]
            for place, records in self._renewed.items()
            if place >= self._served
        }
        return {
            "served": self._served,
            "renewed": renewed,
            "ranks": self.order.ranks,
            "buffer": self._of_the_buffer(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        # Taken up when the epoch is known: at the first batch.
        self._restored = state

    def _put_back(self, buffer: AnchorBuffer, batches: list[list[int]]) -> tuple[int, dict[int, list[Recorded]]]:
        """How many of the epoch's batches a checkpoint had seen served, and the anchors it held for later ones."""
        state, self._restored = self._restored, None
        # An epoch that was served whole is over: the trainer goes on with the next.
        if state is None or state["served"] >= len(batches):
            return 0, {}
        renewed = {}
        # A checkpoint holds the first rank's anchors only. Of several ranks all find theirs anew, since a target in
        # shares is only read by all; and so do the sequences of a rollout that took the place of another.
        if state.get("ranks") == self.order.ranks == 1 and state.get("buffer") == self._of_the_buffer():
            renewed = {
                place: [
                    replace(buffer[i], anchors=anchors, accepted=accepted, emitted=emitted, step=step)
                    for i, (anchors, accepted, emitted, step) in zip(batches[place], columns, strict=True)
                ]
                for place, columns in state["renewed"].items()
            }
        return state["served"], renewed

    def _of_the_buffer(self) -> list[int] | None:
        """Generation and step of the rollout that is open."""
        buffer = self.replays.buffer
        return None if buffer is None else [buffer.manifest.generation, buffer.manifest.step]
