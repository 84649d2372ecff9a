"""Replay batches from the anchor buffer, validation prompts, and the prompts to roll out."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sized
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from pydantic import NonNegativeInt, PositiveInt
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers import PreTrainedTokenizerBase

from draftopd.data.prompts import PromptEncoder, PromptSource
from draftopd.errors import ConfigError, PromptError
from draftopd.packing import Layout, pack
from draftopd.replay import ReplayBatch, pad_anchors
from draftopd.rollout.anchors import AnchorChoice, AnchorPolicy
from draftopd.rollout.buffer import AnchorBuffer, Recorded

log = logging.getLogger(__name__)

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


class ReplayDataModule(L.LightningDataModule):
    """Serves replay batches for training and held-out prompts for validation and the test after it.

    Args:
        train_prompts: prompts to roll out.
        validation_prompts: held-out prompts, decoded to measure tau.
        prompts_per_refresh: prompts rolled out for one generation of the buffer.
        validation_count: held-out prompts decoded at each validation.
        batch_size: recorded sequences a batch.
        anchors: which anchors are replayed.
        anchors_per_sequence: at most so many of one sequence; None takes all.
        batches_per_epoch: default once through the generation.
        validation_batch_size: prompts decoded together, in validation and test.
        thinking: the chat template's thinking mode.
        max_prompt_tokens: longer prompts are left out.
        seed: of order and random anchors.
        test_prompts: held-out prompts of which nothing is chosen, decoded once, after training.
        test_count: how many; 0 tests nothing.
        pack_to: put several of a batch's sequences in a row, up to so many tokens a row, so that less of the batch is
            padding; each sees itself only. None gives each a row of its own.

    Raises:
        ValueError: if ``pack_to`` is less than 1, or prompts are to be tested and there are none.
    """

    def __init__(
        self,
        train_prompts: PromptSource,
        validation_prompts: PromptSource,
        prompts_per_refresh: PositiveInt,
        validation_count: PositiveInt,
        batch_size: PositiveInt = 16,
        anchors: AnchorChoice = "visited",
        anchors_per_sequence: PositiveInt | None = 64,
        batches_per_epoch: PositiveInt | None = None,
        validation_batch_size: PositiveInt = 64,
        thinking: bool = True,
        max_prompt_tokens: PositiveInt = 512,
        seed: int = 0,
        pack_to: int | None = None,
        test_prompts: PromptSource | None = None,
        test_count: NonNegativeInt = 0,
    ) -> None:
        super().__init__()
        if test_count and test_prompts is None:
            raise ValueError(f"data.test_count={test_count} needs data.test_prompts; 0 tests nothing.")
        self.test_count = test_count
        if pack_to is not None and pack_to < 1:
            raise ValueError(f"pack_to must be 1 or more tokens a row, or null, found {pack_to}.")
        self.pack_to = pack_to
        self.sources = {"train": train_prompts, "validation": validation_prompts}
        if test_prompts is not None:
            self.sources["test"] = test_prompts
        self.prompts_per_refresh, self.validation_count = prompts_per_refresh, validation_count
        self.batch_size, self.validation_batch_size = batch_size, validation_batch_size
        self.anchors: AnchorChoice = anchors
        self.anchors_per_sequence = anchors_per_sequence
        self.batches_per_epoch = batches_per_epoch
        self.thinking, self.max_prompt_tokens, self.seed = thinking, max_prompt_tokens, seed
        self.buffer_root: Path | None = None
        self.encoder: PromptEncoder | None = None
        self.slots = 0
        #: See :class:`ReplayLoader`; set by the refresh callback where anchors are renewed within an epoch.
        self.renew: Renew | None = None
        self.renew_every = 0
        self._loader: ReplayLoader | None = None
        self._restored: dict[str, Any] = {}

    def attach(self, tokenizer: PreTrainedTokenizerBase, buffer_root: Path, slots: int = 0) -> None:
        """Give it the target's tokenizer and the run's buffer directory; before fitting also the proposals a block."""
        self.encoder = PromptEncoder(tokenizer, self.thinking, self.max_prompt_tokens)
        self.buffer_root, self.slots = buffer_root, slots

    def stretch(self, refresh: int, rank: int = 0, ranks: int = 1) -> range:
        """A rank's places in the stream of prompts at the ``refresh``-th refresh; each takes the next stretch."""
        count = self.prompts_per_refresh
        return range(refresh * count + rank, (refresh + 1) * count, ranks)

    def prompts(self, places: range) -> list[list[int]]:
        """The token ids of the training prompts at these places, too long ones left out."""
        assert self.encoder is not None
        return self.encoder.take(self.sources["train"], places)

    def train_dataloader(self) -> ReplayLoader:
        assert self.encoder is not None and self.buffer_root is not None
        ranks, rank = (self.trainer.world_size, self.trainer.global_rank) if self.trainer else (1, 0)
        if self.prompts_per_refresh < ranks:
            raise ConfigError(
                f"data.prompts_per_refresh={self.prompts_per_refresh} is too few for {ranks} processes: each needs one."
            )
        batches = self.batches_per_epoch or max(1, self.prompts_per_refresh // (self.batch_size * ranks))
        sampler = ReplaySampler(batches, self.batch_size, self.seed, rank, ranks)
        pad = self.encoder.tokenizer.pad_token_id or 0
        dataset = ReplayDataset(self.buffer_root)
        self._loader = ReplayLoader(dataset, sampler, self.policy, pad, self.renew, self.renew_every, self.pack_to)
        if self._restored:
            self._loader.load_state_dict(self._restored)
            self._restored = {}
        return self._loader

    # Lightning restores the loader's state by itself only if nothing asked for the loader before; the optimizer's
    # schedule does, to know the number of steps.
    def state_dict(self) -> dict[str, Any]:
        return self._loader.state_dict() if self._loader else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._restored = state_dict

    @property
    def policy(self) -> AnchorPolicy:
        """Which anchors are replayed; known once the drafter is."""
        return AnchorPolicy(self.anchors, self.anchors_per_sequence, self.slots)

    def val_dataloader(self) -> DataLoader[list[int]]:
        return self._decoded([prompt for _, prompt in self._share("validation", self.validation_count)])

    def test_dataloader(self) -> DataLoader[tuple[int, list[int]]]:
        return self._decoded(self._share("test", self.test_count))

    def _share(self, source: Literal["validation", "test"], count: int) -> list[tuple[int, list[int]]]:
        """This rank's part of the first prompts of a source, and their places among them."""
        assert self.encoder is not None
        ranks, rank = (self.trainer.world_size, self.trainer.global_rank) if self.trainer else (1, 0)
        there = self.sources[source]
        if isinstance(there, Sized) and count > len(there):
            log.warning("data.%s_count=%d, but there are %d: each is decoded once.", source, count, len(there))
            count = len(there)
        prompts = self.encoder.take(there, range(count))
        if len(prompts) < ranks:
            # A rank without any would pass by the sums over ranks.
            raise PromptError(
                f"{len(prompts)} {source} prompts (data.{source}_count={count}, those of more than "
                f"{self.max_prompt_tokens} tokens left out) are too few for {ranks} processes: each needs one."
            )
        return list(enumerate(prompts))[rank::ranks]

    def _decoded(self, prompts: list[Any]) -> DataLoader[Any]:
        return DataLoader(prompts, batch_size=self.validation_batch_size, collate_fn=list)  # type: ignore[arg-type]
