"""``eval.py`` as its user runs it."""

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
import yaml
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from tests.support.engine import Engine
from tests.support.paths import ROOT
from tests.support.runs import in_process
from tests.support.serving import serving

from draftopd.cli.evaluation import name_checkpoints, read_benchmarks, read_settings
from draftopd.cli.overrides import problem
from draftopd.errors import ConfigError, DrafterError
from draftopd.evaluation.settings import Settings

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
    return in_process("eval.py", f"hydra.run.dir={directory}", *overrides)


def refused(done: subprocess.CompletedProcess[str], *messages: str) -> None:
    assert done.returncode == 1, done.stdout + done.stderr
    assert done.stderr.startswith("Error: ") and "Traceback" not in done.stderr, done.stderr
    for message in messages:
        assert message in done.stderr, done.stderr


def examples_in(directory: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (directory / "examples.jsonl").read_text().splitlines()]


def test_two_bundled_drafters_by_default(tmp_path: Path) -> None:
    done = command(f"hydra.run.dir={tmp_path}", *SMALL)
    assert done.returncode == 0, done.stderr
    words = " ".join(done.stdout.split())
    for part in ("bundled:tiny_target: batch 1", "tiny_dflash_opd", "2 of 2 equal", "is expected", "expected to be"):
        assert part in words
    content = json.loads((tmp_path / "results.json").read_text())
    assert content["config"]["checkpoint"] == ["bundled:tiny_dflash", "bundled:tiny_dflash_opd"]
    assert content["versions"]["torch"] and "git" in content and content["seed"] == 0
    assert [s["drafter"] for s in content["summaries"]] == ["tiny_dflash", "tiny_dflash_opd"]
    for summary in content["summaries"]:
        assert summary["lossless_checked"] and summary["mismatches"] == 0 and summary["speedup"] > 0
        assert summary["benchmark"] == "reasoning" and summary["prompts"] == 2
    assert [p["id"] for p in content["prompts"]] == ["test-0", "test-1"] * 2
    assert [e["drafter"] for e in content["expected"]] == ["tiny_dflash", "tiny_dflash_opd"]
    assert len(content["differences"]) == 2
    assert {path.name for path in tmp_path.iterdir()} >= {
        "results.json", "table.md", "table.tex", "report.html", "examples.jsonl", "tensorboard",
    }  # fmt: skip
    board = {path.name for path in (tmp_path / "tensorboard").iterdir()}
    assert {name for name in board if not name.startswith("events.")} == {"tiny_dflash", "tiny_dflash_opd"}
    assert len(board) == 3  # the figures are the directory's own
    assert [row["example"] for row in examples_in(tmp_path)] == ["test-0", "test-1"]


def test_named_drafters_sampled_in_batches_on_prompts_of_ones_own(tmp_path: Path) -> None:
    prompts = tmp_path / "mine.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"Mia has {n} apples."}) + "\n" for n in (3, 4, 5)))
    checkpoint = ROOT / "src/draftopd/bundled/assets/tiny_dflash"
    done = evaluate(
        tmp_path / "run", f"checkpoint={{sft: {checkpoint}, opd: bundled:tiny_dflash_opd}}", "benchmark=jsonl",
        f"benchmark.path={prompts}", "batch_size=2", "temperature=1.0", "verification=target_only",
        "max_new_tokens=12", "block_size=4", "seed=5",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    words = " ".join(done.stdout.split())
    assert "batch 2, temperature 1" in words and "p =" in words and "are correct" not in words
    content = json.loads((tmp_path / "run/results.json").read_text())
    assert [(s["benchmark"], s["drafter"], s["block_size"]) for s in content["summaries"]] == [
        ("mine", "sft", 4), ("mine", "opd", 4),
    ]  # fmt: skip
    assert content["seed"] == 5 and {p["solved"] for p in content["prompts"]} == {None}


def test_several_benchmarks(tmp_path: Path) -> None:
    """One of them with two turns."""
    rows = [{"question_id": i, "turns": [f"Mia has {i} apples.", "And then?"]} for i in range(3)]
    (tmp_path / "bench.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = evaluate(
        tmp_path / "run", *SMALL, "checkpoint=bundled:tiny_dflash", "benchmark=[reasoning,mt_bench]",
        f"benchmark.mt_bench.path={tmp_path / 'bench.jsonl'}",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    content = json.loads((tmp_path / "run/results.json").read_text())
    assert [s["benchmark"] for s in content["summaries"]] == ["reasoning", "mt_bench"]
    assert [p["turn"] for p in content["prompts"]] == [0, 0, 0, 1, 0, 1]
    assert [row["benchmark"] for row in examples_in(tmp_path / "run")] == ["reasoning"] * 2 + ["mt_bench"] * 2


def test_what_is_done_is_not_decoded_again(tmp_path: Path) -> None:
    overrides = (*SMALL, "checkpoint=bundled:tiny_dflash")
    assert evaluate(tmp_path, *overrides).returncode == 0
    first, examples = (tmp_path / "results.json").read_text(), (tmp_path / "examples.jsonl").read_text()
    kept = examples.splitlines(keepends=True)[0]
    (tmp_path / "examples.jsonl").write_text(kept + examples[len(kept) : len(kept) + 40])
    (tmp_path / "results.json").unlink()
    done = evaluate(tmp_path, *overrides)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "examples.jsonl").read_text().startswith(kept)
    before, after = json.loads(first), json.loads((tmp_path / "results.json").read_text())
    assert after["prompts"][0] == before["prompts"][0]
    assert [p["emitted"] for p in after["prompts"]] == [p["emitted"] for p in before["prompts"]]
    other = evaluate(tmp_path, *overrides, "temperature=1")
    refused(other, "use another hydra.run.dir, or repeat that evaluation's command")


@pytest.mark.parametrize(
    "override, message",
    [
        ("batchsize=3", "batchsize is not a configuration key: did you mean 'batch_size'?"),
        ("benchmark=reasonin", "benchmark=reasonin does not exist: did you mean 'reasoning'?"),
        ("benchmark=[reasonin]", "benchmark=[reasonin] does not exist: did you mean 'reasoning'?"),
        ("benchmark=[reasoning,gsm8]", "benchmark=[reasoning,gsm8] does not exist: did you mean 'gsm8k'?"),
        ("benchmark=null", "write ~benchmark"),
        ("engine=serv", "engine=serv does not exist: did you mean 'server'?"),
        ("benchmark.reasoning.cont=3", "did you mean 'benchmark.reasoning.count'?"),
        ("benchmark.gsm8k.count=3", "benchmark.gsm8k.count is not a configuration key"),
        ("chekpoint=DIR", "did you mean 'checkpoint'?"),
    ],
)
def test_overrides_are_checked_first(override: str, message: str) -> None:
    assert message in (problem(ROOT / "configs", "eval", [override]) or "")


@pytest.mark.parametrize(
    "overrides",
    [
        ["benchmark=[reasoning,gsm8k]", "benchmark.gsm8k.count=3", "benchmark.gsm8k.path=FILE"],
        ["benchmark=jsonl", "benchmark.path=FILE", "benchmark.jsonl.field=text"],
        ["checkpoint=[A,B]"],
        ["checkpoint={sft: A, opd: B}"],
        ["engine=server", "engine.url=http://127.0.0.1:8000", "engine.concurrency=[1,4]"],
    ],
)
def test_overrides_that_fit(overrides: list[str]) -> None:
    assert problem(ROOT / "configs", "eval", overrides) is None


@pytest.mark.parametrize(
    "overrides, messages",
    [
        (["batchsize=3"], ["did you mean 'batch_size'?"]),
        (["verification=rejektion_sampling"], ["did you mean 'rejection_sampling'?"]),
        (["temperature=-1"], ["temperature must be 0 (greedy) or more, found -1"]),
        (["benchmark.reasoning.count=0"], ["benchmark.reasoning.count must be 1 or more"]),
        (["benchmark=[gsm8k,mbpp]", "benchmark.path=/x"], ["names one file", "benchmark.gsm8k.path=FILE"]),
        (["benchmark=[gsm8k]", "benchmark.path=/no/such.jsonl"], ["file /no/such.jsonl", "benchmark.gsm8k.path=FILE"]),
        (["benchmark=jsonl", "benchmark.path=/no/such.jsonl"], ["No prompt file", "benchmark.path=FILE"]),
        (["checkpoint=/no/such/drafter"], ["No drafter in /no/such/drafter: there is no such directory"]),
        (["checkpoint=[bundled:tiny_dflash,/no/such]"], ["No drafter in /no/such: there is no such directory"]),
        (["checkpoint=null"], ["There is no drafter to evaluate", "checkpoint=DIR"]),
    ],
)  # fmt: skip
def test_refused_before_a_model_is_loaded(tmp_path: Path, overrides: list[str], messages: list[str]) -> None:
    refused(evaluate(tmp_path, NO_TARGET, *overrides), *messages)


def test_other_prompts_of_the_same_name_do_not_continue_a_run(tmp_path: Path) -> None:
    """Results of one file may not be shown as another's."""
    path = tmp_path / "mine.jsonl"
    overrides = ("checkpoint=bundled:tiny_dflash", "benchmark=jsonl", f"benchmark.path={path}", "max_new_tokens=8")
    path.write_text(json.dumps({"prompt": "Mia has 3 apples."}))
    assert evaluate(tmp_path / "run", *overrides).returncode == 0
    path.write_text(json.dumps({"prompt": "Tom has 9 pears."}))
    refused(evaluate(tmp_path / "run", *overrides), "use another hydra.run.dir")


def test_a_running_server(tmp_path: Path) -> None:
    """No drafter and no target is loaded here."""
    with serving(Engine([2, 1])) as drafted, serving(Engine()) as plain:
        done = evaluate(
            tmp_path, "engine=server", f"engine.url={drafted.url}", f"engine.plain_url={plain.url}", "limit=3",
            "engine.concurrency=[1,2]", "max_new_tokens=16",
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        bodies = drafted.requests
    assert "3 of 3" in done.stdout and "httpx" not in done.stdout + done.stderr
    assert len({tuple(body["prompt"]) for body in bodies}) == 3 and {body["max_tokens"] for body in bodies} == {16}
    content = json.loads((tmp_path / "served.json").read_text())
    assert content["config"]["engine"]["url"] == drafted.url and content["versions"]["torch"]
    assert [(s["benchmark"], s["concurrency"], s["tau"], s["equal"]) for s in content["served"]] == [
        ("reasoning", 1, 2.5, 3), ("reasoning", 2, 2.5, 3),
    ]  # fmt: skip
    assert (tmp_path / "table.md").exists()


@pytest.mark.parametrize(
    "overrides, message",
    [
        ([], "engine.url"),
        (["engine.url=http://127.0.0.1:9", "engine.attempts=1", "limit=1"], "http://127.0.0.1:9/v1/models failed"),
        (["engine.url=http://x", "engine.concurrency=[0]"], "engine.concurrency must list numbers of 1 or more"),
        (["engine.url=http://x", "engine.api=sglang"], "did you mean 'sglang_generate'"),
        (["engine.url=http://x", "engine.concurrency=[many]"], "engine.concurrency=['many'] does not fit"),
    ],
)
def test_servers_that_cannot_be_asked(tmp_path: Path, overrides: list[str], message: str) -> None:
    refused(evaluate(tmp_path, "engine=server", *overrides), message)


def test_a_drafter_for_another_target(tmp_path: Path) -> None:
    checkpoint = tmp_path / "drafter"
    checkpoint.mkdir()
    bundled = ROOT / "src/draftopd/bundled/assets/tiny_dflash"
    config = json.loads((bundled / "config.json").read_text())
    config["num_target_layers"] += 1
    (checkpoint / "config.json").write_text(json.dumps(config))
    (checkpoint / "model.safetensors").write_bytes((bundled / "model.safetensors").read_bytes())
    refused(evaluate(tmp_path / "run", *SMALL, f"checkpoint={checkpoint}"), "number of target layers")


def test_help_names_every_option() -> None:
    done = command("--help")
    assert done.returncode == 0
    for group in ("target", "benchmark", "engine"):
        _, _, listed = done.stdout.partition(f"\n  {group} ")
        listed = re.split(r"\n  \w|\n\n", listed)[0]  # with the lines indented further
        for path in (ROOT / "configs" / group).glob("*.yaml"):
            assert path.stem in listed
    for key in ("checkpoint", "limit", "batch_size", "max_new_tokens", "temperature", "verification", "hydra.run.dir"):
        assert key in done.stdout
    assert "experiment" not in done.stdout  # a group of train.py


def test_the_checkpoints_block_size_is_kept() -> None:
    """Some targets suggest a block size for fresh drafters."""
    done = in_process("eval.py", "target=qwen3_4b", "checkpoint=DIR", "--cfg", "job", "--resolve")
    config = yaml.safe_load(done.stdout)
    assert config["checkpoint"] == "DIR" and config["block_size"] is None


@pytest.mark.slow
def test_the_same_command_continues_after_ctrl_c(tmp_path: Path) -> None:
    """What was decoded is kept, and the same command goes on from there."""
    overrides = [f"hydra.run.dir={tmp_path}", "checkpoint=bundled:tiny_dflash", "limit=40", "max_new_tokens=48"]
    process = subprocess.Popen(
        [*COMMAND, *overrides], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT
    )
    kept, limit = tmp_path / "examples.jsonl", time.monotonic() + 120
    while not (kept.exists() and len(kept.read_text().splitlines()) > 3) and time.monotonic() < limit:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 1 and "Traceback" not in out + err
    assert "Stopped." in err and "the same command with the same hydra.run.dir" in err
    before = kept.read_text()
    assert 3 < len(before.splitlines()) < 40 and not (tmp_path / "results.json").exists()
    done = command(*overrides)
    assert done.returncode == 0, done.stderr
    assert kept.read_text().startswith(before[: before.rindex("\n") + 1])
    assert [row["example"] for row in examples_in(tmp_path)] == [f"test-{i}" for i in range(40)]
    content = json.loads((tmp_path / "results.json").read_text())
    assert [p["id"] for p in content["prompts"]] == [f"test-{i}" for i in range(40)]


def composed(**changes: object):
    return OmegaConf.create({"top_k": 0, "top_p": 1.0, "verification": "rejection_sampling", "seed": 0} | {
        "temperature": 0.0, "thinking": True, "max_new_tokens": 8, "batch_size": 1, "limit": None,
        "tie_tolerance": None, "shown": 3, "compiled": False,
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
        ({"tie_tolerance": -1.0}, "tie_tolerance must be 0 or more, or null"),
        ({"shown": -1}, "shown must be 0 or more"),
    ],
)
def test_settings_that_do_not_fit(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_settings(composed(**changes))


def test_paths_without_a_drafter_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DrafterError, match=r"config.json is missing\. Name a directory"):
        name_checkpoints(str(tmp_path))
    (tmp_path / "drafter").mkdir()
    (tmp_path / "drafter/config.json").write_text("{}")
    with pytest.raises(DrafterError, match="It is a training run: use checkpoint=.*drafter"):
        name_checkpoints({"a": "bundled:tiny_dflash", "b": str(tmp_path)})
    for nothing in (None, [], {}):
        with pytest.raises(DrafterError, match="There is no drafter to evaluate"):
            name_checkpoints(nothing)
    for wrong in ([3], {"a": None}, {"a": ["bundled:tiny_dflash"]}, True):
        with pytest.raises(ConfigError, match="does not fit: write DIR"):
            name_checkpoints(wrong)


def test_names_of_checkpoints(tmp_path: Path) -> None:
    for run in ("sft", "opd", "other/sft"):
        (tmp_path / run / "drafter").mkdir(parents=True)
        (tmp_path / run / "drafter/config.json").write_text("{}")
    sft, opd, other = (str(tmp_path / run / "drafter") for run in ("sft", "opd", "other/sft"))
    bundled = "bundled:tiny_dflash"
    assert name_checkpoints(bundled) == {"tiny_dflash": bundled}
    assert name_checkpoints(OmegaConf.create([sft, opd + "/", bundled])) == {
        "sft": sft, "opd": opd + "/", "tiny_dflash": bundled,
    }  # fmt: skip
    assert name_checkpoints([sft, other, sft]) == {"sft": sft, "sft_2": other, "sft_3": sft}
    assert name_checkpoints(OmegaConf.create({"b": sft, "a": opd})) == {"b": sft, "a": opd}


def test_one_path_for_several_benchmarks_is_refused() -> None:
    chosen = {"path": "FILE", "gsm8k": {"path": "FILE"}, "jsonl": {"path": "FILE"}}
    with pytest.raises(ConfigError, match="gsm8k and jsonl were chosen"):
        read_benchmarks(OmegaConf.create({"benchmark": chosen}), None)


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["benchmark.path=mine.jsonl"], "reasoning reads none"),
        (
            ["benchmark=[gsm8k,humaneval]", "benchmark.path=F"],
            r"gsm8k and humaneval were chosen.*benchmark.gsm8k.path=F",
        ),
        (
            ["benchmark=[reasoning,jsonl]", "benchmark.jsonl.path=reasoning.jsonl"],
            "Two benchmarks are called reasoning",
        ),
    ],
)
def test_benchmarks_and_files_that_do_not_go_together(
    overrides: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "reasoning.jsonl").write_text('{"prompt": "x"}\n')
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        config = compose("eval", overrides)
    with pytest.raises(ConfigError, match=message):
        read_benchmarks(config, 1)


def test_a_checkpoint_beside_a_server_is_refused(tmp_path: Path) -> None:
    done = evaluate(tmp_path, "engine=server", "engine.url=http://127.0.0.1:9", "checkpoint=bundled:tiny_dflash")
    refused(done, "checkpoint=bundled:tiny_dflash would have no effect")
