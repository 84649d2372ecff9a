"""Schedules of anchors, and where texts come from, as a user asks for them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from subprocess import CompletedProcess

import pytest
import torch
from safetensors.torch import load_file
from tests.support.runs import DRAFTER, SMALL, Script, in_process, scalars

from draftopd.rollout.buffer import AnchorBuffer


@pytest.fixture
def train(chat_targets: dict[str, str]) -> Script:
    """Trains on the small target: ``(directory, *overrides) -> completed process``."""

    def run(directory: Path, *overrides: str) -> CompletedProcess[str]:
        return in_process(
            "train.py", "target=hf", f"target.path={chat_targets['qwen3']}", *DRAFTER, *SMALL, *overrides,
            f"hydra.run.dir={directory}",
        )  # fmt: skip

    return run


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "drafter" / "model.safetensors")


def test_decode_free_training_is_speculative_training(tmp_path: Path) -> None:
    """At temperature 0 the two rollouts record the same, so the same drafter comes out, bit for bit."""
    small = (
        "data.prompts_per_refresh=16", "data.batches_per_epoch=2", "data.validation_count=4", "trainer.max_epochs=2",
        "max_new_tokens=60", "trainer.enable_progress_bar=false",
    )  # fmt: skip
    for name in ("speculative", "decode_free"):
        done = in_process("train.py", f"rollout={name}", *small, f"hydra.run.dir={tmp_path / name}")
        assert done.returncode == 0, done.stderr
    first, second = (weights(tmp_path / name) for name in ("speculative", "decode_free"))
    assert all(torch.equal(first[k], second[k]) for k in first)
    manifest = AnchorBuffer.latest(tmp_path / "decode_free" / "anchors").manifest
    assert manifest.tau > 1.5 and manifest.step == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    "schedule, ages",
    [
        (["rollout=decode_free", "refresh.every_n_epochs=0"], list(range(12))),
        (["rollout=decode_free"], [0, 1, 2, 3, 4, 5] * 2),
        (["rollout=decode_free", "trainer.accumulate_grad_batches=2"], [0, 1, 2] * 2),
        (["rollout=fresh"], [0] * 12),
    ],
)
def test_the_log_shows_how_stale_anchors_are(
    schedule: list[str], ages: list[int], train: Script, tmp_path: Path
) -> None:
    done = train(tmp_path, "data.batches_per_epoch=6", "trainer.log_every_n_steps=1", *schedule)
    assert done.returncode == 0, done.stderr
    assert scalars(tmp_path, "train/anchor_age") == ages


def test_fresh_anchors_above_temperature_zero(train: Script, tmp_path: Path) -> None:
    overrides = ("rollout=fresh", "temperature=1.0", "data.anchors=error")
    done = train(tmp_path, *overrides)
    assert done.returncode == 0, done.stderr
    # A refresh only brings texts.
    assert AnchorBuffer.latest(tmp_path / "anchors").manifest.blocks == 0


@pytest.mark.slow
def test_runs_share_their_texts(train: Script, tmp_path: Path) -> None:
    common = ("rollout=decode_free", f"trajectories.store={tmp_path / 'texts'}")
    for name in ("one", "two"):
        done = train(tmp_path / name, *common)
        assert done.returncode == 0, done.stderr
    assert scalars(tmp_path / "one", "rollout/generated") == [8, 8]
    assert scalars(tmp_path / "two", "rollout/generated") == [0, 0]
    first, second = (weights(tmp_path / name) for name in ("one", "two"))
    assert all(torch.equal(first[k], second[k]) for k in first)


@pytest.mark.slow
def test_training_on_recorded_texts(train: Script, tmp_path: Path) -> None:
    done = train(tmp_path / "first", "rollout=target", "data.anchors=all", "loss=cross_entropy")
    assert done.returncode == 0, done.stderr
    buffer = AnchorBuffer.latest(tmp_path / "first" / "anchors")
    lines = []
    for record in (buffer[i] for i in range(len(buffer))):
        prompt, response = record.tokens[: record.prompt_length], record.tokens[record.prompt_length :]
        lines.append(json.dumps({"prompt_token_ids": prompt, "token_ids": response}))
    path = tmp_path / "texts.jsonl"
    path.write_text("\n".join(lines))
    done = train(tmp_path / "second", "rollout=decode_free", "trajectories=jsonl", f"trajectories.path={path}")
    assert done.returncode == 0, done.stderr
    again = AnchorBuffer.latest(tmp_path / "second" / "anchors")
    known = {tuple(buffer[i].tokens) for i in range(len(buffer))}
    assert {tuple(again[i].tokens) for i in range(len(again))} <= known and again.manifest.blocks > 0


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["rollout=target"], "records no anchors, so data.anchors=visited finds none: use data.anchors=random or all"),
        (["rollout=target", "data.anchors=error"], "data.anchors=error finds none"),
        (["checkpoint.every_n_steps=0"], "every_n_steps must be a whole number, 1 or more"),
        (["checkpoint.every_n_steps=1.5"], "found 1.5"),
        (["refresh.every_n_epochs=-1"], "every_n_epochs must be a whole number, 0 or more, found -1"),
        (["rollout=fresh", "data.anchors=random"], "would have no effect: use rollout=target"),
        (["trajectories=server", "trajectories.url=http://127.0.0.1:9"], "trajectories=server would have no effect"),
        (["rollout=decode_free", "trajectories=server"], "trajectories.url must be given"),
        (["rollout=decode_free", "trajectories=jsonl", "trajectories.path=nothing"], "No such file"),
        (["rollout=decode_free", "trajectories=server", "trajectories.url=http://x", "trajectories.api=grpc"], "grpc"),
        (["rollout=decode_free", "rollout.parallel_below=-1"], "rollout.parallel_below=-1 does not fit int"),
    ],
)
def test_parts_that_do_not_go_together_are_refused(
    overrides: list[str], message: str, train: Script, tmp_path: Path
) -> None:
    done = train(tmp_path / "run", *overrides)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert re.search(message, done.stderr, re.DOTALL), done.stderr
    assert not (tmp_path / "run" / "checkpoints").exists()
