"""Replay batches from the anchor buffer, validation prompts, and the prompts to roll out."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers import PreTrainedTokenizerBase

from draftopd.data.prompts import PromptEncoder, PromptSource
from draftopd.replay import ReplayBatch
from draftopd.rollout.anchors import AnchorChoice, choose_anchors
from draftopd.rollout.buffer import AnchorBuffer, Recorded

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

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
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
    """A loader that can be put back in mid-epoch: same batches, same anchors drawn."""

    def __init__(
        self, dataset: ReplayDataset, sampler: ReplaySampler, anchors: AnchorChoice, limit: int, pad: int
    ) -> None:
        super().__init__(dataset, batch_sampler=sampler, collate_fn=lambda rows: rows)
        self.replays, self.order = dataset, sampler
        self.choice: AnchorChoice = anchors
        self.limit, self.pad = limit, pad
        self._served = 0
        self._skip = 0

    def __iter__(self) -> Iterator[ReplayBatch]:  # type: ignore[override]
        buffer = self.replays.open()
        self.order.lengths = buffer.lengths
        skip, self._skip = self._skip, 0
        self._served = 0
        for place, indices in enumerate(self.order):
            self._served = place + 1
            if place < skip:
                continue
            generator = torch.Generator().manual_seed(
                (self.order.seed * 1_000_003 + self.order.epoch) * 1_000_003
                + place * self.order.ranks
                + self.order.rank
            )
            yield self.collate([buffer[i] for i in indices], generator)
        self.order.epoch += 1
        self._served = 0

    def collate(self, records: list[Recorded], generator: torch.Generator) -> ReplayBatch:
        """Pad the records' tokens and chosen anchors into one batch."""
        chosen = [
            choose_anchors(self.choice, r.anchors, r.prompt_length, len(r.tokens), self.limit, generator)
            for r in records
        ]
        lengths = torch.tensor([len(r.tokens) for r in records])
        width, count = int(lengths.max()), max(1, *(len(a) for a in chosen))
        ids = torch.full((len(records), width), self.pad)
        anchors = torch.zeros(len(records), count, dtype=torch.long)
        mask = torch.zeros(len(records), count, dtype=torch.bool)
        for row, (record, places) in enumerate(zip(records, chosen, strict=True)):
            ids[row, : len(record.tokens)] = torch.tensor(record.tokens)
            anchors[row, : len(places)] = places
            mask[row, : len(places)] = True
        return ReplayBatch(ids, lengths, anchors, mask)

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self.order.epoch, "served": self._served}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.order.epoch, self._skip = state["epoch"], state["served"]


class ReplayDataModule(L.LightningDataModule):
    """Serves replay batches for training and held-out prompts for validation.

    Args:
        train_prompts: prompts to roll out.
        validation_prompts: held-out prompts, decoded to measure tau.
        prompts_per_refresh: prompts rolled out for one generation of the buffer.
        validation_count: held-out prompts decoded at each validation.
        batch_size: recorded sequences a batch.
        anchors: which anchors are replayed.
        anchors_per_sequence: at most so many of one sequence.
        batches_per_epoch: default once through the generation.
        validation_batch_size: prompts decoded together.
        thinking: the chat template's thinking mode.
        max_prompt_tokens: longer prompts are left out.
        seed: of order and random anchors.
    """

    def __init__(
        self,
        train_prompts: PromptSource,
        validation_prompts: PromptSource,
        prompts_per_refresh: int,
        validation_count: int,
        batch_size: int = 16,
        anchors: AnchorChoice = "visited",
        anchors_per_sequence: int = 64,
        batches_per_epoch: int | None = None,
        validation_batch_size: int = 64,
        thinking: bool = True,
        max_prompt_tokens: int = 512,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.sources = {"train": train_prompts, "validation": validation_prompts}
        self.prompts_per_refresh, self.validation_count = prompts_per_refresh, validation_count
        self.batch_size, self.validation_batch_size = batch_size, validation_batch_size
        self.anchors: AnchorChoice = anchors
        self.anchors_per_sequence = anchors_per_sequence
        self.batches_per_epoch = batches_per_epoch
        self.thinking, self.max_prompt_tokens, self.seed = thinking, max_prompt_tokens, seed
        self.buffer_root: Path | None = None
        self.encoder: PromptEncoder | None = None

    def attach(self, tokenizer: PreTrainedTokenizerBase, buffer_root: Path) -> None:
        """Give it the target's tokenizer and the run's buffer directory, before fitting."""
        self.encoder = PromptEncoder(tokenizer, self.thinking, self.max_prompt_tokens)
        self.buffer_root = buffer_root

    def prompts(self, refresh: int) -> list[list[int]]:
        """The token ids to roll out at the ``refresh``-th time; each takes the next stretch of prompts."""
        assert self.encoder is not None
        count = self.prompts_per_refresh
        return self.encoder.take(self.sources["train"], refresh * count, count)

    def train_dataloader(self) -> ReplayLoader:
        assert self.encoder is not None and self.buffer_root is not None
        ranks, rank = (self.trainer.world_size, self.trainer.global_rank) if self.trainer else (1, 0)
        batches = self.batches_per_epoch or max(1, self.prompts_per_refresh // (self.batch_size * ranks))
        sampler = ReplaySampler(batches, self.batch_size, self.seed, rank, ranks)
        pad = self.encoder.tokenizer.pad_token_id or 0
        return ReplayLoader(ReplayDataset(self.buffer_root), sampler, self.anchors, self.anchors_per_sequence, pad)

    def val_dataloader(self) -> DataLoader[list[int]]:
        assert self.encoder is not None
        ranks, rank = (self.trainer.world_size, self.trainer.global_rank) if self.trainer else (1, 0)
        prompts = self.encoder.take(self.sources["validation"], 0, self.validation_count)[rank::ranks]
        return DataLoader(prompts, batch_size=self.validation_batch_size, collate_fn=list)  # type: ignore[arg-type]
