"""One door: every verb has a help, a wrong one is named, and nothing heavy is imported for either."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

import pytest
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from tests.support.paths import ROOT

from draftopd.__main__ import main
from draftopd.cli import app
from draftopd.rollout.buffer import BufferWriter, Recorded

#: Every verb, and words of its help.
VERBS = {
    "train": "python train.py rollout=", "eval": "python eval.py checkpoint=DIR", "plan": "plan.NAME=VALUE",
    "collect": "one row per run", "export": "--format {public,speculators}", "import": "SPECULATORS_DIR",
    "buffer": "first three sequences", "paper": "arXiv 2605.29343", "pretrain": "--family {qwen3,llama}",
}  # fmt: skip


@pytest.mark.parametrize("verb", VERBS)
def test_help(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([verb, "--help"])
    assert not ended.value.code and VERBS[verb] in capsys.readouterr().out


def test_help_lists_the_verbs_and_imports_nothing_heavy() -> None:
    script = (
        "import sys\nfrom draftopd.__main__ import main\n"
        f"for words in [[], ['--help'], *([verb, '--help'] for verb in {list(VERBS)})]:\n"
        "    try:\n        main(words)\n    except SystemExit as ended:\n        assert not ended.code\n"
        "print('loaded:', *{'torch', 'transformers', 'lightning', 'hydra', 'pydantic'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    page, _, loaded = done.stdout.rpartition("loaded:")
    assert loaded.split() == []
    listed = page.partition("verbs:\n")[2].partition("usage:")[0]
    assert [line.split()[0] for line in listed.splitlines() if line.startswith("    ") and line[4] != " "] == [*VERBS]


def test_help_is_hydras_own() -> None:
    """Which takes a second to make, and is printed where other words stand beside the flag."""
    command = [sys.executable, "-m", "draftopd", "train", "--help", "seed=0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == app.help_page(ROOT / "configs", "train").strip()


@pytest.mark.parametrize(
    "words, message",
    [
        (["expot"], "Error: expot is not a verb of draftopd: did you mean 'export'?"),
        (["train", "los=forward_kl"], "Error: los is not a configuration key: did you mean 'loss'?"),
        (["eval", "limt=3"], "Error: limt is not a configuration key: did you mean 'limit'?"),
        (["plan", "los=forward_kl"], "Error: los is not a configuration key: did you mean 'loss'?"),
        (["collect", "."], "Error: No training run has ended under"),
        (["buffer", "nothing"], "Error: No anchor buffer"),
        (["paper", "nothing.json"], "Error: nothing.json is not the results.json of an evaluation"),
        (["import", "nothing", "out", "--target", "bundled:tiny_target"], "Error: "),
    ],
)
def test_wrong_words(words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert str(ended.value.code).startswith(message)
    assert not list(tmp_path.iterdir())


def test_an_unknown_flag(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["plan", "--bogus"])
    assert ended.value.code == 2 and "--bogus" in capsys.readouterr().err


def test_buffer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with BufferWriter(tmp_path, 0, 0) as writer:
        writer.add([Recorded([1, 2, 3], 1, [1], [0], [1])])
    main(["buffer", str(tmp_path)])
    said = capsys.readouterr().out
    assert "1 sequences, 3 tokens, 1 blocks" in said and "0: prompt 1, response 2 tokens" in said


def test_paper(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = {"benchmark": "gsm8k", "drafter": "opd", "speedup": 2.0, "tau_macro": 3.0, "temperature": 0.0}
    results = tmp_path / "results.json"
    results.write_text(json.dumps({"target": "Qwen/Qwen3-8B", "summaries": [row]}))
    main(["paper", str(results)])
    assert "| Qwen3-8B | Draft-OPD | 4.89x | 5.73 | 2.00x | 3.00 |" in capsys.readouterr().out


def test_a_run_keeps_its_whole_command_and_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lightning starts the other processes of a run with ``sys.argv``; Hydra reads only what follows the verb."""
    found = []

    def leave(code: object) -> NoReturn:
        raise SystemExit(code)

    def told(_: object, config: DictConfig) -> None:
        found.append((list(sys.argv), config.seed, HydraConfig.get().job.name))

    monkeypatch.setattr(app, "guarded", told)
    monkeypatch.setattr(app, "_leave", leave)
    logging = ["hydra/job_logging=none", "hydra/hydra_logging=none"]
    words = ["train", "seed=7", f"hydra.run.dir={tmp_path}", *logging]
    monkeypatch.setattr(sys, "argv", ["draftopd", *words])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code is None and found == [(["draftopd", *words], 7, "train")]
    assert (tmp_path / ".hydra" / "overrides.yaml").read_text().splitlines() == ["- seed=7"]


def test_configurations_of_a_checkout_and_of_an_installed_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert app.configs() == ROOT / "configs"
    (tmp_path / "draftopd" / "configs").mkdir(parents=True)
    monkeypatch.setattr(app, "__file__", str(tmp_path / "draftopd" / "cli" / "app.py"))
    assert app.configs() == tmp_path / "draftopd" / "configs"
