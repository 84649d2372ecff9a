"""Replay batches from the anchor buffer, in an order that a checkpoint can restore."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from draftopd.distributed.ranks import mix
from draftopd.replay.batch import ReplayBatch
from draftopd.rollout.anchors import AnchorPolicy
from draftopd.rollout.buffer import AnchorBuffer, Recorded

#: This many batches are sorted by length together: a bucket's rows have similar lengths, batches come in random order.
BUCKET = 16


class ReplaySampler(Sampler[list[int]]):
    """``batches`` batches of indices of similar length, in seeded order.

    If the buffer has too few sequences, they are repeated in another order.
    """

    def __init__(self, batches: int, batch_size: int, seed: int, rank: int = 0, ranks: int = 1) -> None:
        self.batches, self.batch_size, self.seed = batches, batch_size, seed
        self.rank, self.ranks = rank, ranks
        self.epoch = 0
        self.lengths: list[int] = []

    @property
    def sampler(self) -> ReplaySampler:
        """Itself, because the trainer looks here for :meth:`set_epoch`."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch's order; the trainer calls it, after a resume too."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(mix(self.seed, self.epoch))
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
        for group in torch.randperm(len(groups), generator=generator).tolist():
            yield groups[group][self.rank :: self.ranks]


class ReplayDataset(Dataset[Recorded]):
    """The newest generation of the buffer when an epoch begins."""

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
    """A loader that a checkpoint can restore within an epoch, with the same batches and anchors.

    Args:
        dataset, sampler: the buffer and its order.
        policy: which anchors are replayed.
        pad: token id after the end of a row.
        pack_to: see :class:`~draftopd.training.datamodule.ReplayDataModule`.
    """

    def __init__(
        self, dataset: ReplayDataset, sampler: ReplaySampler, policy: AnchorPolicy, pad: int, pack_to: int | None = None
    ) -> None:
        super().__init__(dataset, batch_sampler=sampler, collate_fn=lambda rows: rows)
        self.replays, self.order = dataset, sampler
        self.policy, self.pad, self.pack_to = policy, pad, pack_to
        self._served = 0
        self._restored = 0

    def __iter__(self) -> Iterator[ReplayBatch]:  # type: ignore[override]
        buffer = self.replays.open()
        order = self.order
        order.lengths = buffer.lengths
        batches = list(order)
        # After a whole epoch the trainer continues with the next one.
        skip, self._restored = self._restored if self._restored < len(batches) else 0, 0
        for number, indices in enumerate(batches[skip:], start=skip):
            self._served = number + 1
            seed = mix(order.seed, order.epoch, number * order.ranks + order.rank)
            yield self.collate([buffer[i] for i in indices], torch.Generator().manual_seed(seed))

    def collate(self, records: list[Recorded], generator: torch.Generator) -> ReplayBatch:
        """One batch of the records at the anchors that the policy chooses."""
        policy = self.policy
        chosen = [policy.choose(r.anchors, r.accepted, r.prompt_length, len(r.tokens), generator) for r in records]
        return ReplayBatch.collate(
            records, chosen, pad=self.pad, pack_to=self.pack_to, of_the_drafter=policy.of_the_drafter
        )

    def state_dict(self) -> dict[str, Any]:
        return {"served": self._served}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        # Used at the first batch, when the epoch is known.
        self._restored = state["served"]
