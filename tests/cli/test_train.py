"""``train.py`` as its user runs it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.support.faults import flip, flip_weights
from tests.support.models import KINDS
from tests.support.paths import ROOT
from tests.support.runs import DRAFTER, SMALL, Script, events, in_process

from draftopd.cli.report import FORMAT
from draftopd.cli.runs import find, rows
from draftopd.drafters.load import load_drafter
from draftopd.io.files import locked, read_json
from draftopd.metrics.acceptance_length import acceptance_length
from draftopd.rollout.buffer import AnchorBuffer

COUNTED = ("module.count_flops=true", "data.test_count=5")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, chat_targets: dict[str, str], script: Script) -> Path:
    """A finished Draft-OPD run on a small random Qwen3."""
    directory = tmp_path_factory.mktemp("run")
    done = script(
        "train.py", "target=hf", f"target.path={chat_targets['qwen3']}", *DRAFTER, *SMALL, *COUNTED,
        f"hydra.run.dir={directory}",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Training report" in done.stdout and "held-out tau before" in done.stdout
    return directory


def test_a_run_leaves_everything(finished: Path) -> None:
    names = {p.name for p in finished.iterdir()}
    assert {"drafter", "checkpoints", "tensorboard", "anchors", "config.yaml", "run.json", "report.json"} <= names
    assert load_drafter(finished / "drafter").block_size == 4
    assert len(AnchorBuffer.latest(finished / "anchors")) == 8
    record = json.loads((finished / "run.json").read_text())
    assert record["seed"] == 0 and record["versions"]["torch"] and record["config"]["loss"]["gamma"] > 0
    report = json.loads((finished / "report.json").read_text())
    assert report["steps"] == 4 and report["tokens"] > 0
    assert {"rollout", "target", "drafter", "loss", "backward"} <= report["seconds"].keys()


def test_operations_and_test_prompts_are_reported(finished: Path) -> None:
    (run,) = find([finished, finished])
    spent = run.report["flops"]
    assert min(spent.values()) > 0 and spent["total"] == sum(spent.values()) - spent["total"]
    assert run.report["test_tau"] == pytest.approx(acceptance_length(list(run.tested.values()))[0])
    assert list(run.tested) == ["0", "1", "2", "3", "4"]
    emitted = [sum(blocks) for blocks in run.tested.values()]
    assert min(emitted) > 0 and max(emitted) <= 12
    (row,) = rows([run])
    assert row["steps"] == 4 and row["test_tokens"] == sum(emitted) and row["gflop_total"] > 0


def test_a_finished_run_is_not_run_again(finished: Path, chat_targets: dict[str, str]) -> None:
    before = (finished / "report.json").read_bytes()
    done = in_process(
        "train.py", "target=hf", f"target.path={chat_targets['qwen3']}", *DRAFTER, *SMALL, *COUNTED,
        f"hydra.run.dir={finished}",
    )  # fmt: skip
    assert done.returncode == 0 and "This run has ended already" in done.stdout
    assert (finished / "report.json").read_bytes() == before


def test_the_target_is_in_no_checkpoint(finished: Path) -> None:
    checkpoint = torch.load(finished / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["state_dict"] and not [k for k in checkpoint["state_dict"] if k.startswith("target.")]


def test_tensorboard_holds_scalars_histogram_and_text(finished: Path) -> None:
    tags = events(finished).Tags()
    assert {"val/tau", "val/tau_macro", "rollout/tau", "val/acceptance_position_1"} <= set(tags["scalars"])
    assert "val/rejection_position" in tags["histograms"]
    assert any(tag.startswith("drafts/prompt_0") for tag in tags["tensors"])


def test_the_last_checkpoint_is_of_the_last_step_whatever_tau_did(finished: Path) -> None:
    last = torch.load(finished / "checkpoints" / "last.ckpt", weights_only=True)
    assert last["global_step"] == 4
    exported = {k.removeprefix("drafter."): v for k, v in last["state_dict"].items() if k.startswith("drafter.")}
    written = load_file(finished / "drafter" / "model.safetensors")
    assert all(torch.equal(exported[k].to(written[k].dtype), written[k]) for k in written)


def test_the_same_command_again_continues(finished: Path, chat_targets: dict[str, str]) -> None:
    done = in_process(
        "train.py", "target=hf", f"target.path={chat_targets['qwen3']}", *DRAFTER, *SMALL, "trainer.max_epochs=3",
        f"hydra.run.dir={finished}",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Continuing from" in done.stdout
    report = json.loads((finished / "report.json").read_text())
    assert report["steps"] == 6
    assert report["total_seconds"] > sum(report["seconds"].values())
    assert not (finished / "test.json").exists()  # of the run before, whose prompts this one did not test


def test_another_drafter_is_refused_and_another_loss_told(finished: Path, chat_targets: dict[str, str]) -> None:
    common = ["train.py", "target=hf", f"target.path={chat_targets['qwen3']}", *SMALL, f"hydra.run.dir={finished}"]
    done = in_process(*common, "drafter.num_layers=2", "drafter.block_size=4", "trainer.max_epochs=3")
    assert done.returncode == 1 and "a run of another drafter (drafter.num_layers differ)" in done.stderr
    done = in_process(*common, *DRAFTER, "trainer.max_epochs=3", "loss=reverse_kl", "loss.gamma=0.9")
    told = done.stdout + done.stderr
    assert done.returncode == 0 and re.search(r"other settings than it started with: .*loss\.gamma", told)


def test_the_last_epoch_is_validated(tmp_path: Path, chat_targets: dict[str, str]) -> None:
    done = in_process(
        "train.py", "target=hf", f"target.path={chat_targets['qwen3']}", *DRAFTER, *SMALL, "trainer.max_epochs=3",
        "trainer.check_val_every_n_epoch=2", "validate_first=false", f"hydra.run.dir={tmp_path}",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert [event.step for event in events(tmp_path).Scalars("val/tau")] == [3, 5]
    assert (tmp_path / "checkpoints" / "best.ckpt").exists()


def test_fewer_epochs_than_there_were_are_refused(finished: Path, chat_targets: dict[str, str]) -> None:
    before = {name: (finished / name).read_bytes() for name in ("report.json", "config.yaml")}
    done = in_process(
        "train.py", "target=hf", f"target.path={chat_targets['qwen3']}", *DRAFTER, *SMALL, "trainer.max_epochs=1",
        f"hydra.run.dir={finished}",
    )  # fmt: skip
    assert done.returncode == 1 and re.search(r"last.ckpt is of epoch [23], and trainer.max_epochs=1", done.stderr)
    assert "Traceback" not in done.stderr
    assert {name: (finished / name).read_bytes() for name in before} == before


def test_damaged_files_are_named_and_the_run_goes_on(finished: Path, chat_targets: dict[str, str]) -> None:
    """A bit flipped in the buffer, another in the last checkpoint; no refresh is due."""
    epochs = torch.load(finished / "checkpoints" / "previous.ckpt", weights_only=True)["epoch"] + 1
    flip(next((finished / "anchors").glob("generation-*/shard-*")))
    flip_weights(finished / "checkpoints" / "last.ckpt")
    done = in_process(
        "train.py", "target=hf", f"target.path={chat_targets['qwen3']}", *DRAFTER, *SMALL, "refresh.every_n_epochs=0",
        f"trainer.max_epochs={epochs + 2}", f"hydra.run.dir={finished}",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    told = done.stdout + done.stderr
    assert "last.ckpt is damaged" in told and f"Continuing from {finished / 'checkpoints' / 'previous.ckpt'}" in told
    assert "safetensors is damaged" in told and "This run now does it" in told
    assert read_json(finished / "report.json", FORMAT)["steps"] == 2 * (epochs + 2)
    assert len(AnchorBuffer.latest(finished / "anchors")) == 8


def test_a_second_run_in_the_directory_is_refused(finished: Path, script: Script) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.glob("*.json")}
    with locked(finished):
        done = script("train.py", f"hydra.run.dir={finished}")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert f"{finished} is in use by another run (process {os.getpid()} on " in done.stderr
    assert {path: path.stat().st_mtime_ns for path in finished.glob("*.json")} == before


FAMILIES = [*((kind, "dflash") for kind in KINDS), ("qwen3", "eagle3"), ("gemma3", "eagle3"), ("qwen3", "mtp")]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "drafts"), FAMILIES)
def test_every_family_from_sft_to_lossless_decoding(
    kind: str, drafts: str, tmp_path: Path, chat_targets: dict[str, str], script: Script
) -> None:
    """The first by the commands in processes of their own, the others here."""
    command = script if (kind, drafts) == FAMILIES[0] else in_process
    target = (f"target={'qwen3_30b_a3b' if kind == 'qwen3_moe' else 'hf'}", f"target.path={chat_targets[kind]}")
    before = load_file(Path(chat_targets[kind]) / "model.safetensors")
    sft, opd = tmp_path / "sft", tmp_path / "opd"
    own = {"dflash": ("drafter.num_layers=1",), "eagle3": ("drafter.draft_vocab_size=150",), "mtp": ()}[drafts]
    shape = ("target.dtype=float32", f"drafter={drafts}", "drafter.block_size=4", *own)
    done = command("train.py", "experiment=sft", *target, *shape, *SMALL, f"hydra.run.dir={sft}")
    assert done.returncode == 0, done.stderr
    start = f"drafter.checkpoint={sft / 'drafter'}"
    done = command(
        "train.py", "rollout=decode_free", "loss.rejected_weight=1", *target, *shape, start, *SMALL,
        f"hydra.run.dir={opd}",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    done = command(
        "eval.py", *target, "target.dtype=float32", f"checkpoint={opd / 'drafter'}", "limit=4", "max_new_tokens=12",
        f"hydra.run.dir={tmp_path / 'eval'}",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (summary,) = json.loads((tmp_path / "eval" / "results.json").read_text())["summaries"]
    assert summary["prompts"] == 4 and summary["mismatches"] == 0 and summary["lossless_checked"]
    after = load_file(Path(chat_targets[kind]) / "model.safetensors")
    assert all(torch.equal(after[k], before[k]) for k in before)


def test_sft_from_scratch(tmp_path: Path, chat_targets: dict[str, str]) -> None:
    done = in_process(
        "train.py", "experiment=sft", "target=hf", f"target.path={chat_targets['qwen3']}", "drafter.num_layers=1",
        *SMALL, f"hydra.run.dir={tmp_path}",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    manifest = AnchorBuffer.latest(tmp_path / "anchors").manifest
    assert manifest.blocks == 0 and manifest.sequences == 8


def said(process: subprocess.Popen[str]) -> tuple[str, str]:
    """What a process printed until its end; if it does not end, it is made to print what its threads do."""
    try:
        return process.communicate(timeout=120)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGABRT)
        return process.communicate(timeout=30)


@pytest.mark.slow
def test_a_run_interrupted_in_training_ends_as_if_it_had_not_been(
    tmp_path: Path, chat_targets: dict[str, str], script: Script
) -> None:
    """Ctrl-C after the first step, SIGTERM in a later one; the same command in the end gives the same weights.

    So does a loss that depends on how far training has come.
    """
    common = ["target=hf", f"target.path={chat_targets['qwen3']}", *DRAFTER, *SMALL, "trainer.max_epochs=3"]
    common += ["data.prompts_per_refresh=24", "trainer.log_every_n_steps=1", "loss=blend", "loss@loss.second=jsd"]
    whole = script("train.py", *common, f"hydra.run.dir={tmp_path / 'whole'}")
    assert whole.returncode == 0, whole.stderr
    shares = [event.value for event in events(tmp_path / "whole").Scalars("train/loss_share")]
    assert shares == pytest.approx([step / 18 for step in range(18)])
    directory = tmp_path / "broken"
    last = directory / "checkpoints" / "last.ckpt"
    env = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"}
    command = [sys.executable, str(ROOT / "train.py"), *common, f"hydra.run.dir={directory}"]
    reached = 0
    for number, status in ((signal.SIGINT, 1), (signal.SIGTERM, 128 + signal.SIGTERM)):
        before = last.stat().st_mtime_ns if last.exists() else 0
        process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        limit = time.monotonic() + 120
        while not (last.exists() and last.stat().st_mtime_ns != before) and time.monotonic() < limit:
            time.sleep(0.002)
        process.send_signal(number)
        out, err = said(process)
        assert process.returncode == status and "Traceback" not in out + err, err
        assert "Stopped" in out + err
        assert not list(directory.rglob("*.partial"))
        step = torch.load(last, weights_only=True)["global_step"]
        assert reached < step < 18
        reached = step
    again = script("train.py", *common, f"hydra.run.dir={directory}")
    assert again.returncode == 0, again.stderr
    expected, found = (load_file(d / "drafter" / "model.safetensors") for d in (tmp_path / "whole", directory))
    assert all(torch.equal(expected[k], found[k]) for k in expected)
