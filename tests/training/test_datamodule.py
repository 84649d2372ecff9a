"""Replay batches: bucketed, seeded, restartable, sharded."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from torch import Tensor

from draftopd.data.prompts import ListedPrompts, ReasoningPrompts
from draftopd.errors import DraftOPDError
from draftopd.replay.batch import ReplayBatch
from draftopd.rollout.anchors import AnchorPolicy
from draftopd.rollout.buffer import BufferWriter, Recorded
from draftopd.training.datamodule import ReplayDataModule
from draftopd.training.loader import ReplayDataset, ReplayLoader, ReplaySampler


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A buffer of 40 sequences of 10 to 49 tokens; a sequence's first token is its number."""
    with BufferWriter(tmp_path, 0, 0, shard_size=16) as writer:
        for i in range(40):
            anchors = list(range(5, 9 + i))
            writer.add([Recorded([i, *range(100, 109 + i)], 5, anchors, [0] * len(anchors), [1] * len(anchors))])
    return tmp_path


def loader(
    root: Path, batches: int = 10, rank: int = 0, ranks: int = 1, choice: str = "random", seed: int = 0
) -> ReplayLoader:
    sampler = ReplaySampler(batches, 4, seed, rank, ranks)
    return ReplayLoader(ReplayDataset(root), sampler, AnchorPolicy(choice, 6, 3), pad=999)


def epoch(serving: ReplayLoader, number: int) -> list[ReplayBatch]:
    """The batches of one epoch, which the trainer would announce."""
    serving.order.set_epoch(number)
    return list(serving)


def same(a: list[ReplayBatch], b: list[ReplayBatch]) -> bool:
    return len(a) == len(b) and all(
        torch.equal(x, y) for m, n in zip(a, b, strict=True) for x, y in zip(m[:-1], n[:-1], strict=True)
    )


def test_an_epoch_serves_every_sequence_once(root: Path) -> None:
    batches = list(loader(root))
    assert sorted(int(i) for b in batches for i in b.ids[:, 0]) == list(range(40))


def test_rows_are_the_records(root: Path) -> None:
    for batch in loader(root, choice="visited"):
        *columns, layout = batch
        assert layout is None
        for ids, start, length, anchors, mask, made_at in zip(*columns, strict=True):
            number = int(ids[0])
            assert (int(start), int(length), int(made_at)) == (5, 10 + number, 0)
            assert ids[:length].tolist() == [number, *range(100, 109 + number)]
            assert (ids[length:] == 999).all()
            assert set(anchors[mask].tolist()) <= set(range(5, 9 + number)) and mask.sum() == min(6, 4 + number)


def test_batches_hold_like_lengths(root: Path) -> None:
    padding = sum(int((b.ids == 999).sum()) for b in loader(root))
    assert padding < 0.1 * sum(b.ids.numel() for b in loader(root))


def test_seeds_and_epochs(root: Path) -> None:
    first = loader(root)
    one, two = epoch(first, 0), epoch(first, 1)
    assert not same(one, two)
    again = loader(root)
    assert same(one, epoch(again, 0)) and same(two, epoch(again, 1))
    assert not same(one, list(loader(root, seed=1)))


@pytest.mark.parametrize("stop", [1, 4, 9])
def test_a_restart_in_mid_epoch_serves_exactly_the_rest(root: Path, stop: int) -> None:
    whole = loader(root)
    second = epoch(whole, 1)
    broken = loader(root)
    broken.order.set_epoch(1)
    served = iter(broken)
    for _ in range(stop):
        next(served)
    restored = loader(root)
    restored.load_state_dict(broken.state_dict())
    assert same(epoch(restored, 1), second[stop:])
    assert same(epoch(restored, 2), epoch(whole, 2))  # and the epochs after it


def test_a_restart_after_a_whole_epoch_serves_the_next(root: Path) -> None:
    done = loader(root)
    epoch(done, 0)
    restored = loader(root)
    restored.load_state_dict(done.state_dict())
    assert same(epoch(restored, 1), epoch(loader(root), 1))


def test_ranks_share_an_epoch(root: Path) -> None:
    parts = [list(loader(root, batches=5, rank=r, ranks=2)) for r in range(2)]
    assert [len(p) for p in parts] == [5, 5]
    seen = sorted(int(i) for part in parts for b in part for i in b.ids[:, 0])
    assert seen == list(range(40))


def test_fewer_sequences_than_needed_come_again(root: Path) -> None:
    batches = list(loader(root, batches=25))
    counts = torch.bincount(torch.cat([b.ids[:, 0] for b in batches]), minlength=40)
    assert len(batches) == 25 and counts.min() == 2 and counts.max() == 3


def test_a_new_generation_is_taken_up_by_the_next_epoch(root: Path) -> None:
    serving = loader(root, batches=1)
    list(serving)
    with BufferWriter(root, 1, 1) as writer:
        writer.add([Recorded([77, 1, 2, 3], 2, [2], [0], [1])])
    (batch,) = list(serving)
    assert batch.ids[:, 0].tolist() == [77] * 4


def test_anchors_without_a_drafter_have_no_age(root: Path) -> None:
    assert {int(x) for batch in loader(root, choice="random") for x in batch.made_at} == {-1}
    assert {int(x) for batch in loader(root, choice="error") for x in batch.made_at} == {0}


class Watching(L.LightningModule):
    """Trains nothing, and remembers the sequences and anchors it was given, by epoch."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen: dict[int, list[list[int]]] = {}

    def training_step(self, batch: ReplayBatch, batch_idx: int) -> Tensor:
        self.seen.setdefault(self.current_epoch, []).append([*batch.ids[:, 0].tolist(), *batch.anchors[0].tolist()])
        return self.weight.sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


def test_a_trainers_epochs_differ_in_order_and_anchors(root: Path) -> None:
    module = Watching()
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    L.Trainer(max_epochs=3, enable_model_summary=False, **options).fit(module, loader(root))
    first, second, third = (module.seen[number] for number in range(3))
    assert len(first) == len(second) == len(third) == 10
    assert first != second != third != first
    for number, found in enumerate((first, second, third)):
        batches = epoch(loader(root), number)
        assert found == [[*b.ids[:, 0].tolist(), *b.anchors[0].tolist()] for b in batches]


def test_a_short_list_of_held_out_prompts_is_not_repeated(
    tmp_path: Path, tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    listed = ListedPrompts([[{"role": "user", "content": str(number)}] for number in range(3)])
    data = ReplayDataModule(listed, listed, 3, 10)
    data.attach(tokenizer, tmp_path)
    assert len([prompt for batch in data.val_dataloader() for prompt in batch]) == 3
    assert "data.validation_count=10, but there are 3" in caplog.text


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_every_rank_decodes_as_many_held_out_batches(ranks: int, tmp_path: Path, tokenizer) -> None:
    """Ranks decode a batch together, so the last one of a rank may be empty but must be there."""
    prompts = ReasoningPrompts("validation")
    data = ReplayDataModule(prompts, prompts, 4, 7, test_prompts=prompts, test_count=7, validation_batch_size=2)
    data.attach(tokenizer, tmp_path)
    whole = [prompt for batch in data.val_dataloader() for prompt in batch]
    parts, tested = [], []
    for rank in range(ranks):
        data.trainer = SimpleNamespace(world_size=ranks, global_rank=rank)
        parts.append(list(data.val_dataloader()))
        tested += [pair for batch in data.test_dataloader() for pair in batch]
    assert len({len(part) for part in parts}) == 1 and all(len(batch) <= 2 for part in parts for batch in part)
    assert sorted(p for part in parts for batch in part for p in batch) == sorted(whole) and len(whole) == 7
    assert [prompt for _, prompt in sorted(tested)] == whole


@pytest.mark.parametrize("held_out, rolled_out", [(2, 3), (3, 2)])
def test_every_rank_needs_a_prompt(held_out: int, rolled_out: int, tmp_path: Path, tokenizer) -> None:
    prompts = ReasoningPrompts("validation")
    data = ReplayDataModule(prompts, prompts, rolled_out, held_out)
    data.attach(tokenizer, tmp_path)

    def loaders(ranks: int) -> None:
        data.trainer = SimpleNamespace(world_size=ranks, global_rank=ranks - 1)
        assert len(data.val_dataloader()) and len(data.train_dataloader())

    loaders(2)
    with pytest.raises(DraftOPDError, match="too few for 3 processes"):
        loaders(3)
