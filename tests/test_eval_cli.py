"""``eval.py`` as its user runs it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf

from draftopd.cli.app import _problem
from draftopd.cli.evaluation import read_settings, require_checkpoint
from draftopd.errors import ConfigError, DrafterError
from draftopd.evaluation.settings import Settings

ROOT = Path(__file__).parents[1]
COMMAND = [sys.executable, str(ROOT / "eval.py")]
ENVIRONMENT = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "COLUMNS": "100"}
SMALL = ("limit=2", "max_new_tokens=24")
#: Whatever is refused with this target was refused before a model was loaded.
NO_TARGET = "target.path=/no/such/target"


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *arguments], capture_output=True, text=True, timeout=240, env=ENVIRONMENT, check=False
    )


def evaluate(directory: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    return command(f"hydra.run.dir={directory}", *overrides)


def refused(done: subprocess.CompletedProcess[str], *messages: str) -> None:
    assert done.returncode == 1, done.stdout + done.stderr
    assert done.stderr.startswith("Error: ") and "Traceback" not in done.stderr, done.stderr
    for message in messages:
        assert message in done.stderr, done.stderr


def test_the_bundled_drafter_by_default(tmp_path: Path) -> None:
    done = evaluate(tmp_path, *SMALL)
    assert done.returncode == 0, done.stderr
    for words in ("reasoning: 2 prompts", "tau, micro", "tau, macro", "speedup", "2 of 2 equal", "By block position"):
        assert words in done.stdout
    content = json.loads((tmp_path / "results.json").read_text())
    assert content["config"]["checkpoint"] == "bundled:tiny_dflash" and content["seed"] == 0
    assert content["versions"]["torch"] and "git" in content
    summary = content["summary"]
    assert summary["lossless_checked"] and summary["mismatches"] == 0 and summary["speedup"] > 0
    assert [p["id"] for p in content["prompts"]] == ["test-0", "test-1"]


def test_a_checkpoint_sampled_in_batches_on_prompts_of_ones_own(tmp_path: Path) -> None:
    prompts = tmp_path / "mine.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"Mia has {n} apples."}) + "\n" for n in (3, 4, 5)))
    checkpoint = ROOT / "src/draftopd/assets/tiny_dflash"
    done = evaluate(
        tmp_path / "run", f"checkpoint={checkpoint}", "benchmark=jsonl", f"benchmark.path={prompts}", "batch_size=2",
        "temperature=1.0", "verification=target_only", "max_new_tokens=12", "block_size=4", "seed=5",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "mine: 3 prompts, batch 2, temperature 1" in done.stdout
    assert "does not apply above temperature 0" in done.stdout and "answers right" not in done.stdout
    content = json.loads((tmp_path / "run/results.json").read_text())
    assert content["summary"]["block_size"] == 4 and content["seed"] == 5
    assert {p["solved"] for p in content["prompts"]} == {None}


@pytest.mark.parametrize(
    "override, message",
    [
        ("batchsize=3", "batchsize is no configuration key: did you mean 'batch_size'?"),
        ("benchmark=reasonin", "benchmark=reasonin does not exist: did you mean 'reasoning'?"),
        ("benchmark.cont=3", "did you mean 'benchmark.count'?"),
        ("chekpoint=DIR", "did you mean 'checkpoint'?"),
    ],
)
def test_overrides_are_checked_first(override: str, message: str) -> None:
    assert message in (_problem(ROOT / "configs", "eval", [override]) or "")


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides, messages",
    [
        (["batchsize=3"], ["did you mean 'batch_size'?"]),
        (["verification=rejektion_sampling"], ["did you mean 'rejection_sampling'?"]),
        (["temperature=-1"], ["temperature must be 0 (greedy) or more, found -1"]),
        (["benchmark.count=0"], ["benchmark.count must be 1 or more"]),
        (["benchmark=jsonl", "benchmark.path=/no/such.jsonl"], ["No prompt file", "benchmark.path=FILE"]),
        (["checkpoint=/no/such/drafter"], ["No drafter in /no/such/drafter: there is no such directory"]),
    ],
)  # fmt: skip
def test_refused_before_a_model_is_loaded(tmp_path: Path, overrides: list[str], messages: list[str]) -> None:
    refused(evaluate(tmp_path, NO_TARGET, *overrides), *messages)


def test_a_drafter_for_another_target(tmp_path: Path) -> None:
    checkpoint = tmp_path / "drafter"
    checkpoint.mkdir()
    bundled = ROOT / "src/draftopd/assets/tiny_dflash"
    config = json.loads((bundled / "config.json").read_text())
    config["num_target_layers"] += 1
    (checkpoint / "config.json").write_text(json.dumps(config))
    (checkpoint / "model.safetensors").write_bytes((bundled / "model.safetensors").read_bytes())
    refused(evaluate(tmp_path / "run", *SMALL, f"checkpoint={checkpoint}"), "number of target layers")


def test_help_names_every_option() -> None:
    done = command("--help")
    assert done.returncode == 0
    for group in ("target", "benchmark"):
        listed = next(line for line in done.stdout.splitlines() if line.strip().startswith(f"{group} "))
        for path in (ROOT / "configs" / group).glob("*.yaml"):
            assert path.stem in listed
    for key in ("checkpoint", "limit", "batch_size", "max_new_tokens", "temperature", "verification", "hydra.run.dir"):
        assert key in done.stdout
    assert "experiment" not in done.stdout  # a group of train.py


def test_the_checkpoints_block_size_is_kept() -> None:
    """Some targets suggest a block size for fresh drafters."""
    done = command("target=qwen3_4b", "checkpoint=DIR", "--cfg", "job", "--resolve")
    config = yaml.safe_load(done.stdout)
    assert config["checkpoint"] == "DIR" and config["block_size"] is None


@pytest.mark.slow
def test_ctrl_c(tmp_path: Path) -> None:
    overrides = [f"hydra.run.dir={tmp_path}", "limit=128"]
    process = subprocess.Popen(
        [*COMMAND, *overrides], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT
    )
    limit = time.monotonic() + 120
    while not (tmp_path / "eval.log").exists() and time.monotonic() < limit:
        time.sleep(0.1)
    time.sleep(8)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 1 and "Traceback" not in out + err
    assert "Stopped. No results were written." in err
    assert not (tmp_path / "results.json").exists()


def composed(**changes: object):
    return OmegaConf.create({"top_k": 0, "top_p": 1.0, "verification": "rejection_sampling", "seed": 0} | {
        "temperature": 0.0, "thinking": True, "max_new_tokens": 8, "batch_size": 1, "limit": None,
    } | changes)  # fmt: skip


def test_settings_are_read() -> None:
    assert read_settings(composed(temperature=1, limit=3)) == Settings(temperature=1, limit=3, max_new_tokens=8)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"thinking": "no"}, "thinking='no' does not fit bool: write false"),
        ({"max_new_tokens": 1e2}, "max_new_tokens=100.0 does not fit int: write 100"),
        ({"verification": "target"}, "verification=target does not exist: did you mean 'target_only'"),
        ({"batch_size": "many"}, "batch_size='many' does not fit int"),
        ({"limit": True}, "limit=True"),
        ({"seed": None}, "seed=None does not fit int"),
    ],
)
def test_settings_that_do_not_fit(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_settings(composed(**changes))


def test_checkpoints_that_are_none(tmp_path: Path) -> None:
    require_checkpoint("bundled:tiny_dflash")
    with pytest.raises(DrafterError, match=r"config.json is missing\. Name a directory"):
        require_checkpoint(str(tmp_path))
    (tmp_path / "drafter").mkdir()
    (tmp_path / "drafter/config.json").write_text("{}")
    with pytest.raises(DrafterError, match="It is a training run: use checkpoint=.*drafter"):
        require_checkpoint(str(tmp_path))
