"""When the refresh callback rolls out, and what it does about a buffer that is damaged or another's."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tests.support.faults import flip

from draftopd.rollout.buffer import AnchorBuffer, BufferWriter, Recorded
from draftopd.training.refresh import RefreshAnchors

Damage = Callable[[Path], None]


class Refreshing(RefreshAnchors):
    """Notes its rollouts, and writes a buffer without decoding."""

    def __init__(self, root: Path, every_n_epochs: int) -> None:
        super().__init__(None, root, every_n_epochs)
        self.rolled_out: list[int] = []

    def refresh(self, trainer: Any, module: Any, generation: int) -> None:
        self.rolled_out.append(generation)
        with BufferWriter(self.root, generation, trainer.global_step) as writer:
            writer.add([Recorded([1, 2, 3], 1, [1], [0], [1])] * 4)


def at(epoch: int, step: int, mid_epoch: bool = False, all_agree: bool = True) -> Any:
    strategy = SimpleNamespace(reduce_boolean_decision=lambda decision: decision and all_agree)
    loop = SimpleNamespace(restarted_mid_epoch=mid_epoch)
    return SimpleNamespace(current_epoch=epoch, global_step=step, is_global_zero=True, strategy=strategy, fit_loop=loop)


def resumed(first: Refreshing) -> Refreshing:
    """The callback of the run that goes on from a checkpoint."""
    again = Refreshing(first.root, first.every_n_epochs)
    again.load_state_dict(first.state_dict())
    return again


def flipped(root: Path) -> None:
    flip(next(root.glob("generation-*/shard-*")))


def cut(root: Path) -> None:
    shard = next(root.glob("generation-*/shard-*"))
    shard.write_bytes(shard.read_bytes()[:-9])


def shard_gone(root: Path) -> None:
    next(root.glob("generation-*/shard-*")).unlink()


def no_manifest(root: Path) -> None:
    next(root.glob("generation-*/manifest.json")).unlink()


def gone(root: Path) -> None:
    shutil.rmtree(root)


def later(root: Path) -> None:
    """What a run leaves that went on before it fell back to an earlier checkpoint."""
    with BufferWriter(root, 1, 99) as writer:
        writer.add([Recorded([7, 8, 9], 1, [1], [0], [1])])


@pytest.mark.parametrize("every, epochs, expected", [(1, 3, [0, 1, 2]), (2, 5, [0, 1, 2]), (0, 3, [0])])
def test_the_schedule(every: int, epochs: int, expected: list[int], tmp_path: Path) -> None:
    callback = Refreshing(tmp_path, every)
    for epoch in range(epochs):
        callback.on_train_epoch_start(at(epoch, 10 * epoch), None)
    assert callback.rolled_out == expected


@pytest.mark.parametrize("damage", [flipped, cut, shard_gone, no_manifest, gone, later])
@pytest.mark.parametrize("moved_on", [False, True])
def test_a_buffer_that_cannot_be_used_is_made_again(
    damage: Damage, moved_on: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """In mid-epoch, at the step of the rollout or after it."""
    first = Refreshing(tmp_path / "anchors", 1)
    first.on_train_epoch_start(at(0, 0), None)
    whole = resumed(first)
    step = 3 if moved_on else 0
    whole.on_train_start(at(0, step, mid_epoch=True), None)
    assert whole.rolled_out == [] and not caplog.text
    damage(first.root)
    again = resumed(first)
    again.on_train_start(at(0, step, mid_epoch=True), None)
    assert again.rolled_out == [0]
    manifest = AnchorBuffer.latest(again.root).manifest
    assert (manifest.generation, manifest.step) == (0, step) and again.made == (0, step)
    named = damage in (flipped, cut, shard_gone, no_manifest)
    assert ("This run now does it" in caplog.text) == named
    assert ("The drafter of step 3 makes it again" in caplog.text) == moved_on


@pytest.mark.parametrize("every", [0, 3])
def test_damage_between_refreshes(every: int, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    callback = Refreshing(tmp_path, every)
    callback.on_train_epoch_start(at(0, 0), None)
    flipped(tmp_path)
    callback.on_train_epoch_start(at(1, 10), None)
    assert callback.rolled_out == [0, 0] and "is damaged" in caplog.text and "step 10" in caplog.text
    callback.on_train_epoch_start(at(2, 20), None)
    assert callback.rolled_out == [0, 0]


def test_ranks_decide_together(tmp_path: Path) -> None:
    """One that reads the buffer whole rolls out with one that cannot, or it would wait for ever."""
    callback = Refreshing(tmp_path, 0)
    callback.on_train_epoch_start(at(0, 0), None)
    callback.on_train_epoch_start(at(1, 10, all_agree=False), None)
    assert callback.rolled_out == [0, 0]


def test_a_resume_between_epochs_rolls_out_nothing_early(tmp_path: Path) -> None:
    first = Refreshing(tmp_path, 1)
    first.on_train_epoch_start(at(0, 0), None)
    again = resumed(first)
    again.on_train_start(at(1, 10), None)
    assert again.rolled_out == []
