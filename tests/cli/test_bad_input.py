"""Wrong commands end early, with one clear message and no traceback."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tests.support.models import small_model
from tests.support.paths import ROOT
from tests.support.runs import DRAFTER, SMALL, in_process

from draftopd.cli.nearest import nearest
from draftopd.cli.overrides import problem
from draftopd.drafters.dflash import DFlashDrafter
from draftopd.targets.target import Target


def test_a_run_directory_that_cannot_be_made_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    said = problem(ROOT / "configs", "train", [f"hydra.run.dir={tmp_path / 'file' / 'run'}"])
    assert said and f"{tmp_path / 'file'} is a file. Choose another directory (hydra.run.dir=DIR)" in said
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write everywhere
    said = problem(ROOT / "configs", "eval", [f"hydra.run.dir={tmp_path / 'runs' / 'new'}"])
    assert said and f"{tmp_path} is read-only for you" in said


@pytest.mark.parametrize(
    "override", ["seed=3", "loss=forward_kl", "+trainer.fast_dev_run=true", "loss.gamma=0.5", "~logger"]
)
def test_good_overrides_pass(override: str) -> None:
    assert problem(ROOT / "configs", "train", [override]) is None


def test_nearest_lists_what_there_is_where_nothing_is_close() -> None:
    assert nearest("zzz", ["alpha", "beta"]) == "choose from alpha, beta."


def fails(done: subprocess.CompletedProcess[str], *messages: str) -> None:
    text = done.stdout + done.stderr
    assert done.returncode == 1, text
    assert "Traceback" not in text, text
    for message in messages:
        assert message in text, text


def test_a_target_without_a_network_is_refused(tmp_path: Path) -> None:
    done = in_process("train.py", "loss=asymmetric_kl", "target=qwen3_30b_a3b", f"hydra.run.dir={tmp_path}")
    fails(done, "Error: The target Qwen/Qwen3-30B-A3B-Thinking-2507 could not be found", "target.path=DIR")


def test_a_wrong_type_and_a_wrong_value_are_refused(tmp_path: Path) -> None:
    fails(
        in_process("train.py", "data.batch_size=x", f"hydra.run.dir={tmp_path}"), "data.batch_size='x' does not fit int"
    )
    fails(in_process("train.py", "loss.gamma=2", f"hydra.run.dir={tmp_path}"), "gamma must lie in (0, 1], found 2")


def test_drafters_that_cannot_serve_are_refused(tmp_path: Path, chat_targets: dict[str, str]) -> None:
    target = ("target=hf", f"target.path={chat_targets['qwen3']}", f"hydra.run.dir={tmp_path / 'run'}", *SMALL)
    fails(in_process("train.py", *target, "drafter.checkpoint=nowhere"), "No drafter in nowhere")
    fails(in_process("train.py", *target, "drafter.block_size=1"), "block_size 1 proposes nothing")
    fails(in_process("train.py", *target, "drafter.target_layer_ids=[9]"), "layers [9]", "layers 0 to 4")
    fails(
        in_process("train.py", *target, "drafter.checkpoint=bundled:tiny_dflash"),
        "hidden size is 192",
        "this target's is 32",
    )
    fails(in_process("eval.py", *target[:3], "checkpoint=bundled:tiny_dflash"), "hidden size is 192")


def test_vocabulary_and_depth_must_fit(target: Target, make_drafter) -> None:
    from draftopd.errors import DrafterError

    drafter: DFlashDrafter = make_drafter(target)
    with pytest.raises(DrafterError, match="vocabulary is 64, but this target's is 60"):
        drafter.config.check_fits(Target(small_model("qwen3", vocab_size=60)).shape)
    with pytest.raises(DrafterError, match="number of target layers is 4, but this target's is 5"):
        drafter.config.check_fits(Target(small_model("qwen3", num_hidden_layers=5)).shape)


def test_prompts_that_do_not_fit_are_refused(tmp_path: Path, chat_targets: dict[str, str]) -> None:
    target = (
        "target=hf",
        f"target.path={chat_targets['qwen3']}",
        f"hydra.run.dir={tmp_path / 'run'}",
        *DRAFTER,
        *SMALL,
    )
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps({"prompt": "Mia has 3 apples."}) + "\n" + json.dumps({"prompt": ""}) + "\n")
    mine = ("data=jsonl", f"data.train_prompts.path={prompts}")
    fails(in_process("train.py", *target, *mine), "prompts.jsonl, line 2 has no text under 'prompt'")
    fails(in_process("train.py", *target, "data.max_prompt_tokens=3"), "longer than data.max_prompt_tokens=3")
    fails(in_process("train.py", *target, "max_new_tokens=250"), "context of 256", "max_new_tokens")


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path: Path, chat_targets: dict[str, str]) -> None:
    done = in_process(
        "train.py", "target=hf", f"target.path={chat_targets['qwen3']}", f"hydra.run.dir={tmp_path}", *DRAFTER, *SMALL,
        "module.max_skipped_in_a_row=0",
        "optimizer.lr=1e30", "schedule.warmup=0", "trainer.gradient_clip_val=null", "data.prompts_per_refresh=16",
    )  # fmt: skip
    fails(done, "The loss is nan at step", "Lower optimizer.lr")


@pytest.mark.slow
def test_ctrl_c_in_the_rollout_leaves_no_half_generation(tmp_path: Path, chat_targets: dict[str, str]) -> None:
    env = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    overrides = ["target=hf", f"target.path={chat_targets['qwen3']}", *DRAFTER, *SMALL, f"hydra.run.dir={tmp_path}"]
    overrides += ["data.prompts_per_refresh=4000", "validate_first=false"]
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), *overrides],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    limit = time.monotonic() + 120
    while not list(tmp_path.glob("anchors/.generation-*")) and time.monotonic() < limit:
        time.sleep(0.05)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode != 0 and "Traceback" not in out + err, err
    assert "Stopped" in out + err
    assert list((tmp_path / "anchors").iterdir()) == []
