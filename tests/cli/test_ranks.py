"""Training with two processes is training with one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tests.support.runs import DRAFTER, SMALL, Script, in_process, scalars
from torch import Tensor

from draftopd.drafters.load import load_drafter

#: Plain texts, so that one process and two see the same; all anchors, so that none is drawn; one step.
COMMON = (
    "rollout=target", "data.anchors=all", "data.anchors_per_sequence=null", "data.prompts_per_refresh=4",
    "schedule.warmup=0.5", "validate_first=false", "trainer.accelerator=cpu", "trainer.max_epochs=1",
    "trainer.log_every_n_steps=1",
)  # fmt: skip
TWO = ("trainer.devices=2", "data.batch_size=2")


def gradients(directory: Path) -> list[Tensor]:
    """AdamW's first moments: after one step a tenth of the gradients, whose rounding the weights would enlarge."""
    checkpoint = torch.load(directory / "checkpoints" / "last.ckpt", weights_only=True)
    return [state["exp_avg"] for state in checkpoint["optimizer_states"][0]["state"].values()]


@pytest.mark.parametrize(
    "loss, trainers",
    [("cross_entropy", ["ddp"]), ("asymmetric_kl", ["ddp", "fsdp"]), ("e2e_tv", ["ddp"]), ("lk", ["ddp"])],
)
def test_two_processes_take_the_step_of_one(
    loss: str, trainers: list[str], tmp_path: Path, chat_targets: dict[str, str], script: Script
) -> None:
    def run(name: str, *overrides: str) -> Path:
        directory = tmp_path / name
        train = script if TWO[0] in overrides else in_process
        done = train(
            "train.py", "target=hf", f"target.path={chat_targets['qwen3']}", *DRAFTER, *SMALL, *COMMON,
            f"loss={loss}", *overrides, f"hydra.run.dir={directory}",
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return directory

    one = run("one", "data.batch_size=4")
    for trainer in trainers:
        two = run(trainer, f"trainer={trainer}", *TWO)
        assert scalars(two, "train/loss") == pytest.approx(scalars(one, "train/loss"), rel=1e-5)
        assert len(scalars(two, "train/padding")) == 1
        for found, expected in zip(gradients(two), gradients(one), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
        tokens = [json.loads((d / "report.json").read_text())["tokens"] for d in (one, two)]
        assert tokens[0] == tokens[1]


@pytest.mark.parametrize("trainer", ["ddp", "fsdp"])
def test_two_processes_roll_out_and_one_goes_on(
    trainer: str, tmp_path: Path, chat_targets: dict[str, str], script: Script
) -> None:
    """Draft-OPD on two ranks, one of which decodes more prompts, then the same run continued by one."""

    def run(*overrides: str) -> dict[str, float]:
        train = script if TWO[0] in overrides else in_process
        done = train(
            "train.py", "target=hf", f"target.path={chat_targets['qwen3']}", *DRAFTER, *SMALL,
            "data.prompts_per_refresh=7", "data.batches_per_epoch=2", "data.validation_count=3",
            "data.validation_batch_size=1", "rollout.batch_size=1", "trainer.accelerator=cpu",
            *overrides, f"hydra.run.dir={tmp_path}",
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return json.loads((tmp_path / "report.json").read_text())

    assert run(f"trainer={trainer}", *TWO)["steps"] == 4
    load_drafter(tmp_path / "drafter")
    report = run("trainer.max_epochs=3")
    assert report["steps"] == 6 and report["tau_after"] >= 1
