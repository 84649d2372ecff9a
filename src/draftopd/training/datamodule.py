"""Replay batches from the anchor buffer, validation prompts, and the prompts to roll out."""

from __future__ import annotations

import logging
from collections.abc import Sized
from pathlib import Path
from typing import Any, Literal

import lightning as L
from pydantic import NonNegativeInt, PositiveInt
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from draftopd.data.prompts import PromptEncoder, PromptSource
from draftopd.errors import ConfigError, PromptError
from draftopd.rollout.anchors import AnchorChoice, AnchorPolicy
from draftopd.training.loader import ReplayDataset, ReplayLoader, ReplaySampler

log = logging.getLogger(__name__)


class ReplayDataModule(L.LightningDataModule):
    """Serves replay batches for training, and held-out prompts for validation and the test after training.

    Args:
        train_prompts: prompts to roll out.
        validation_prompts: held-out prompts, decoded to measure tau.
        prompts_per_refresh: prompts rolled out for one generation of the buffer.
        validation_count: held-out prompts decoded at each validation.
        batch_size: recorded sequences per batch.
        anchors: which anchors are replayed.
        anchors_per_sequence: at most this many per sequence; None takes all.
        batches_per_epoch: None replays each recorded sequence once.
        validation_batch_size: prompts decoded together, in validation and test.
        thinking: the chat template's thinking mode.
        max_prompt_tokens: longer prompts are left out.
        seed: seed of the order and of random anchors.
        test_prompts: held-out prompts that no choice depends on, decoded once after training.
        test_count: number of test prompts; 0 tests nothing.
        pack_to: put several sequences in a row of at most this many tokens, which leaves less padding; each sees only
            itself. None gives each sequence a row of its own.

    Raises:
        ValueError: if ``pack_to`` is below 1, or ``test_count`` is above 0 without ``test_prompts``.
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
            raise ValueError(f"pack_to must be 1 or more tokens per row, or null, found {pack_to}.")
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
        self._loader: ReplayLoader | None = None
        self._restored: dict[str, Any] = {}

    def attach(self, tokenizer: PreTrainedTokenizerBase, buffer_root: Path, slots: int = 0) -> None:
        """Set the target's tokenizer, the buffer's directory and, before fitting, ``slots``: proposals per block."""
        self.encoder = PromptEncoder(tokenizer, self.thinking, self.max_prompt_tokens)
        self.buffer_root, self.slots = buffer_root, slots

    def stretch(self, refresh: int, rank: int = 0, ranks: int = 1) -> range:
        """A rank's indices in the stream of prompts at the ``refresh``-th refresh."""
        count = self.prompts_per_refresh
        return range(refresh * count + rank, (refresh + 1) * count, ranks)

    def prompts(self, indices: range) -> list[list[int]]:
        """The token ids of the training prompts at these indices, without those that are too long."""
        assert self.encoder is not None
        return self.encoder.take(self.sources["train"], indices)

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
        self._loader = ReplayLoader(dataset, sampler, self.policy, pad, self.pack_to)
        if self._restored:
            self._loader.load_state_dict(self._restored)
            self._restored = {}
        return self._loader

    # Lightning restores the loader's state itself only if nothing used the loader before, and the schedule of the
    # learning rate did, to count the steps.
    def state_dict(self) -> dict[str, Any]:
        return self._loader.state_dict() if self._loader else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._restored = state_dict

    @property
    def policy(self) -> AnchorPolicy:
        """Which anchors are replayed; needs ``slots``."""
        return AnchorPolicy(self.anchors, self.anchors_per_sequence, self.slots)

    def val_dataloader(self) -> DataLoader[list[list[int]]]:
        batches = self._held_out("validation", self.validation_count)
        return _one_by_one([[prompt for _, prompt in batch] for batch in batches])

    def test_dataloader(self) -> DataLoader[list[tuple[int, list[int]]]]:
        return _one_by_one(self._held_out("test", self.test_count))

    def _held_out(self, source: Literal["validation", "test"], count: int) -> list[list[tuple[int, list[int]]]]:
        """This rank's batches of the first prompts of a source, each prompt with its index among them.

        All ranks have equally many batches, because they decode each batch together; the last one may be empty.
        """
        assert self.encoder is not None
        ranks, rank = (self.trainer.world_size, self.trainer.global_rank) if self.trainer else (1, 0)
        prompt_source = self.sources[source]
        if isinstance(prompt_source, Sized) and count > len(prompt_source):
            log.warning("data.%s_count=%d, but there are %d: each is decoded once.", source, count, len(prompt_source))
            count = len(prompt_source)
        prompts = self.encoder.take(prompt_source, range(count))
        if len(prompts) < ranks:
            # A rank without prompts would miss the sums over ranks.
            raise PromptError(
                f"{len(prompts)} {source} prompts (data.{source}_count={count}, those of more than "
                f"{self.max_prompt_tokens} tokens left out) are too few for {ranks} processes: each needs one."
            )
        own, size = list(enumerate(prompts))[rank::ranks], self.validation_batch_size
        longest = -(-len(prompts) // ranks)
        return [own[start : start + size] for start in range(0, longest, size)]


def _one_by_one(batches: list[Any]) -> DataLoader[Any]:
    return DataLoader(batches, batch_size=None, collate_fn=lambda batch: batch)  # type: ignore[arg-type]
