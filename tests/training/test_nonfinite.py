"""Steps whose loss or gradient is not finite are skipped, counted and kept; too many in a row end the run."""

from __future__ import annotations

import json
import math
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.utilities.exceptions import SIGTERMException
from safetensors.torch import save
from tests.support.fitting import batches, fit, make_trainer
from tests.support.models import MakeDrafter, randomize
from torch import nn
from torch.utils.data import DataLoader

from draftopd.decoding.rules import Rules
from draftopd.drafters.dflash import DFlashDrafter
from draftopd.errors import ConfigError, FileError, NumericsError
from draftopd.losses.base import Loss, LossOutput
from draftopd.losses.distilled import Distilled
from draftopd.losses.divergence import forward_kl
from draftopd.replay.batch import ReplayBatch
from draftopd.replay.blocks import Blocks
from draftopd.replay.packing import Layout
from draftopd.targets.load import load_target
from draftopd.targets.target import Target
from draftopd.training import nonfinite
from draftopd.training.module import DraftModule
from draftopd.training.nonfinite import keep_batch, largest_gradient, nonfinite_gradients, read_batch


class Failing(Loss):
    """Forward KL that fails in some of its calls, counted from 0: in its value, or only in its gradient."""

    def __init__(self, how: str, calls: tuple[int, ...]) -> None:
        self.inner, self.how, self.failing, self.calls = Distilled(accepted=forward_kl), how, calls, 0

    def __call__(self, blocks: Blocks) -> LossOutput:
        loss, parts = self.inner(blocks)
        if self.calls in self.failing:
            if self.how == "gradient":
                blocks.draft_states.register_hook(lambda gradient: gradient * math.inf)
            else:
                loss = loss * float(self.how)
        self.calls += 1
        return LossOutput(loss, parts)


@pytest.fixture
def make_module(target: Target, make_drafter: MakeDrafter) -> Callable[..., DraftModule]:
    def make(loss: Loss, **options: Any) -> DraftModule:
        return DraftModule(target, make_drafter(target), loss, Rules(), **options)

    return make


def assert_same(found: ReplayBatch, expected: ReplayBatch) -> None:
    for mine, other in zip(found[:-1], expected[:-1], strict=True):
        assert torch.equal(mine, other) and mine.dtype == other.dtype
    assert (found.layout is None) == (expected.layout is None)
    if found.layout is not None and expected.layout is not None:
        assert all(torch.equal(*pair) for pair in zip(found.layout, expected.layout, strict=True))


OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=1e-3),
    "muon": lambda parameters: torch.optim.Muon([p for p in parameters if p.ndim == 2], lr=1e-3),
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=1e-3, momentum=0.9, weight_decay=0.1),
}


@pytest.mark.parametrize(
    "how, optimizer",
    [("nan", "adamw"), ("inf", "adamw"), ("gradient", "adamw"), ("gradient", "muon"), ("nan", "sgd")],
)
def test_a_bad_step_changes_nothing_and_the_next_goes_on(
    how: str, optimizer: str, make_module: Callable[..., DraftModule], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = make_module(Failing(how, (2,)))
    monkeypatch.setattr(
        module, "configure_optimizers", lambda: OPTIMIZERS[optimizer](list(module.drafter.parameters()))
    )
    given = batches(module, 5)
    history = fit(module, given, tmp_path)
    assert [history.same(step) for step in range(5)] == [False, False, True, False, False]
    assert [figures["train/skipped_steps"] for figures in history.logged[1:]] == [0, 0, 1, 1, 1]
    assert module.trainer.global_step == 5 and (module.run.skips.total, module.run.skips.in_a_row) == (1, 0)
    assert math.isfinite(history.logged[3]["train/loss"]) == (how == "gradient")
    assert all(value.isfinite().all() for value in history.weights[-1].values())
    assert module.run.tokens == sum(int(batch.lengths.sum()) for batch in given)

    # The batch, read again as the documentation says.
    (path,) = (tmp_path / "nonfinite").glob("*.safetensors")
    assert path.name == "step-2.safetensors"
    assert_same(read_batch(path), given[2])
    record = json.loads(path.with_suffix(".json").read_text())
    assert (record["step"], record["epoch"], record["skipped_in_a_row"]) == (2, 0, 1)
    assert math.isfinite(float(record["losses"][0])) == (how == "gradient")
    assert set(record["nonfinite_gradients"]) == {name for name, _ in module.drafter.named_parameters()}


def test_a_skipped_step_is_as_if_its_batch_were_not_there(
    make_module: Callable[..., DraftModule], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A schedule of the rate would go on; here there is none."""
    weights = []
    for calls in ((1,), ()):
        module = make_module(Failing("nan", calls), schedule=None)
        given = batches(module, 4)
        history = fit(module, given if calls else given[:1] + given[2:], tmp_path)
        weights.append(history.weights[-1])
    assert all(torch.equal(weights[0][k], weights[1][k]) for k in weights[0])


def test_one_bad_micro_batch_skips_the_step_and_is_the_one_kept(
    make_module: Callable[..., DraftModule], tmp_path: Path
) -> None:
    module = make_module(Failing("nan", (2,)))
    given = batches(module, 6)
    history = fit(module, given, tmp_path, accumulate_grad_batches=2)
    # Batches 2 and 3 make the second step.
    assert [history.same(step) for step in range(6)] == [True, False, True, True, True, False]
    kept = read_batch(tmp_path / "nonfinite" / "step-1.safetensors")
    assert torch.equal(kept.ids, given[2].ids)
    assert json.loads((tmp_path / "nonfinite" / "step-1.json").read_text())["micro_batch"] == 0
    assert module.run.tokens == sum(int(batch.lengths.sum()) for batch in given)


def test_too_many_in_a_row_end_the_run(make_module: Callable[..., DraftModule], tmp_path: Path) -> None:
    module = make_module(Failing("nan", (0, 2, 3, 4)), max_skipped_in_a_row=2, keep_nonfinite=2)
    before = {k: v.clone() for k, v in module.drafter.state_dict().items()}
    with pytest.raises(NumericsError, match="loss is nan at step 4, and 3 steps in a row .* Lower optimizer.lr"):
        fit(module, batches(module, 6), tmp_path)
    after = module.drafter.state_dict()
    assert all(value.isfinite().all() for value in after.values())
    assert any(not torch.equal(after[k], before[k]) for k in after)  # step 1 was taken
    assert {p.name for p in (tmp_path / "nonfinite").glob("*.safetensors")} == {f"step-{n}.safetensors" for n in (3, 4)}


def test_no_batch_is_kept_where_none_is_wanted(make_module: Callable[..., DraftModule], tmp_path: Path) -> None:
    module = make_module(Failing("nan", (0,)), keep_nonfinite=0)
    fit(module, batches(module, 2), tmp_path)
    assert module.run.skips.total == 1 and not (tmp_path / "nonfinite").exists()
    for options in ({"max_skipped_in_a_row": -1}, {"keep_nonfinite": -1}):
        with pytest.raises(ConfigError, match="0 or more, found -1"):
            make_module(Distilled(accepted=forward_kl), **options)


def test_a_full_disk_costs_the_batch_and_not_the_run(
    make_module: Callable[..., DraftModule],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(nonfinite, "save_file", full)
    module = make_module(Failing("nan", (0,)))
    fit(module, batches(module, 2), tmp_path)
    assert module.run.skips.total == 1 and "cannot be kept" in caplog.text and "No space left" in caplog.text
    assert not list((tmp_path / "nonfinite").iterdir())


@pytest.mark.parametrize("content", [b"half", save({"ids": torch.ones(1)}), save({"layout.x": torch.ones(1)})])
def test_a_damaged_batch_is_named(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "step-1.safetensors"
    path.write_bytes(content)
    with pytest.raises(FileError, match="step-1.safetensors is not a kept batch, or is damaged"):
        read_batch(path)


def test_a_packed_batch_is_read_as_it_was(make_module: Callable[..., DraftModule], tmp_path: Path) -> None:
    (batch,) = batches(make_module(Distilled(accepted=forward_kl)), 1)
    batch = batch._replace(layout=Layout.of([[0]], batch.lengths.tolist()))
    path = keep_batch(tmp_path, 1, [batch], [math.nan], {"step": 7, "rank": 0, "ranks": 1})
    assert path == tmp_path / "step-7.safetensors"
    assert_same(read_batch(path), batch)


def test_the_counts_outlive_an_interruption(make_module: Callable[..., DraftModule], tmp_path: Path) -> None:
    first = make_module(Failing("nan", (1, 2)), max_skipped_in_a_row=2)
    given = batches(first, 3)
    trainer = make_trainer(tmp_path)
    trainer.fit(first, DataLoader(given, batch_size=None))
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    second = make_module(Failing("nan", (0,)), max_skipped_in_a_row=2)
    trainer = make_trainer(tmp_path, max_epochs=2)
    with pytest.raises(NumericsError, match="3 steps in a row"):
        trainer.fit(second, DataLoader(given, batch_size=None), ckpt_path=tmp_path / "last.ckpt", weights_only=True)
    assert second.run.skips.total == 3


def test_one_bad_entry_is_seen_and_a_large_one_is_not_bad() -> None:
    layer = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(layer.parameters())
    assert largest_gradient(optimizer) == 0  # no gradient at all
    layer.weight.grad, layer.bias.grad = torch.full((2, 3), -1e30), torch.ones(2)
    assert largest_gradient(optimizer) == 1e30 and nonfinite_gradients(layer) == []  # its square is no float32
    for bad in (math.nan, math.inf, -math.inf):
        layer.bias.grad[1] = bad
        assert not largest_gradient(optimizer).isfinite() and nonfinite_gradients(layer) == ["bias"]


class HalfScaler(MixedPrecision):
    """16-mixed on a CPU, for which Lightning has no shorthand."""

    def __init__(self) -> None:
        super().__init__("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=4.0))


@pytest.mark.parametrize("how", ["gradient", "nan"])
def test_the_loss_scaler_skips_the_same_steps_and_they_count_once(
    how: str, make_module: Callable[..., DraftModule], tmp_path: Path
) -> None:
    module = make_module(Failing(how, (1, 2, 3)), max_skipped_in_a_row=1 if how == "gradient" else 3)
    history = fit(module, batches(module, 5), tmp_path, plugins=[HalfScaler()])
    assert [history.same(step) for step in range(5)] == [False, True, True, True, False]
    assert module.run.skips.total == 3
    # An overflow is the scaler's to mend while it can: from 4 to 2 to 1. A loss that is not finite never is.
    kept = {path.name for path in (tmp_path / "nonfinite").glob("*.safetensors")}
    assert kept == {f"step-{n}.safetensors" for n in ((3,) if how == "gradient" else (1, 2, 3))}


def one_rank(rank: int, port: int, target_path: str, directory: str) -> None:
    """A rank of two; the second one's loss is NaN in its second step. In another run it alone is asked to stop."""
    torch.set_num_threads(1)
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "ranks", "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2", "RANK": str(rank), "LOCAL_RANK": str(rank), "GROUP_RANK": "0",
    }  # fmt: skip
    target = load_target(target_path, dtype="float32")
    drafter = DFlashDrafter.build(
        target, None, num_layers=1, block_size=4, mask_token_id=target.vocab_size - 1, target_layer_ids=[0, 2]
    )
    randomize(drafter, 0)
    module = DraftModule(target, drafter, Failing("nan", (1,) if rank == 1 else ()), Rules())
    given = batches(module, 6)[rank::2]
    history = fit(module, given, Path(directory), strategy="ddp", devices=2, use_distributed_sampler=False)
    same = [history.same(step) for step in range(3)]
    torch.save((same, module.run.skips.state(), history.weights[-1]), Path(directory) / f"rank-{rank}.pt")
    stopped = DraftModule(target, drafter, Failing("nan", ()), Rules())
    stopped.stop_asked = rank == 1
    with pytest.raises(SIGTERMException):
        fit(stopped, given, Path(directory), strategy="ddp", devices=2, use_distributed_sampler=False)
    assert stopped.global_step == 1


@pytest.mark.slow
def test_ranks_skip_and_stop_together(target_dirs: dict[str, Path], tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(one_rank, (port, str(target_dirs["qwen3"]), str(tmp_path)), nprocs=2)
    (same, skips, weights), other = (torch.load(tmp_path / f"rank-{rank}.pt") for rank in (0, 1))
    assert (same, skips) == other[:2] == ([False, True, False], {"total": 1, "in_a_row": 0})
    assert all(torch.equal(weights[k], other[2][k]) for k in weights)
    records = [json.loads((tmp_path / "nonfinite" / f"step-1-rank-{rank}.json").read_text()) for rank in (0, 1)]
    # The gradients of both are spoilt; whose loss it was can be seen.
    assert math.isfinite(records[0]["losses"][0]) and records[1]["losses"] == ["nan"]
    assert records[0]["nonfinite_gradients"] == records[1]["nonfinite_gradients"] != []
