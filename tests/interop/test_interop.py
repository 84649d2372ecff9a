"""Checkpoint formats: round trips are bit-exact, and what does not fit is named."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.cli.conftest import ROOT, SMALL, Script

from draftopd.drafters.dflash import DFlashDrafter
from draftopd.errors import DrafterError, TargetError
from draftopd.interop.__main__ import main, read_training_checkpoint
from draftopd.interop.speculators import read_speculators, write_speculators
from draftopd.interop.target_files import TargetFiles
from draftopd.targets.target import Target

MakeDrafter = Callable[..., DFlashDrafter]


@pytest.fixture
def files(target_dirs: dict[str, Path]) -> TargetFiles:
    return TargetFiles(str(target_dirs["qwen3"]))


@pytest.fixture
def drafter(target: Target, make_drafter: MakeDrafter) -> DFlashDrafter:
    return make_drafter(target)


@pytest.fixture
def exported(drafter: DFlashDrafter, files: TargetFiles, tmp_path: Path) -> Path:
    write_speculators(drafter, tmp_path / "out", files, "org/target", torch.float32)
    return tmp_path / "out"


def equal(first: DFlashDrafter, second: DFlashDrafter) -> bool:
    a, b = first.state_dict(), second.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a) and first.describe() == second.describe()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_speculators_round_trip(
    dtype: torch.dtype, drafter: DFlashDrafter, files: TargetFiles, tmp_path: Path, target_dirs: dict[str, Path]
) -> None:
    rounded = DFlashDrafter.assemble(
        drafter.config,
        {k: getattr(drafter, k) for k in ("block_size", "target_layer_ids", "mask_token_id", "num_target_layers")},
        {name: t.to(dtype) for name, t in drafter.state_dict().items()},
        "test",
    )
    write_speculators(rounded, tmp_path, files, "org/target", dtype)
    assert equal(read_speculators(tmp_path, files), rounded)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["aux_hidden_state_layer_ids"] == [1, 3] and config["speculators_model_type"] == "dflash"
    verifier = config["speculators_config"]["verifier"]
    assert verifier == {"name_or_path": "org/target", "architectures": ["Qwen3ForCausalLM"]}
    assert config["speculators_config"]["proposal_methods"][0]["speculative_tokens"] == 3
    tensors = load_file(tmp_path / "model.safetensors")
    embedding = load_file(target_dirs["qwen3"] / "model.safetensors")["model.embed_tokens.weight"]
    assert torch.equal(tensors["embed_tokens.weight"], embedding.to(dtype))
    assert torch.equal(tensors["lm_head.weight"], embedding.to(dtype))  # tied


@pytest.mark.parametrize("kind", ["qwen3", "llama", "gemma3"])
def test_embedding_and_head_are_the_targets(kind: str, target_dirs: dict[str, Path]) -> None:
    files, target = TargetFiles(str(target_dirs[kind])), Target.load(str(target_dirs[kind]), dtype="float32")
    assert torch.equal(files.lm_head().float(), target.head.weight)
    assert torch.equal(files.embedding().float(), target.model.get_input_embeddings().weight)
    assert (files.num_layers, files.hidden_size, files.vocab_size) == (4, 32, 64)


def test_a_target_in_several_files(target_dirs: dict[str, Path], tmp_path: Path) -> None:
    model = Target.load(str(target_dirs["llama"]), dtype="float32").model
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    assert torch.equal(TargetFiles(str(tmp_path)).lm_head(), model.lm_head.weight)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"speculators_model_type": "eagle3"}, "speculator of type eagle3, expected dflash"),
        ({"transformer_layer_config": None}, "no transformer_layer_config"),
        ({"draft_vocab_size": 32}, "reduced vocabulary of 32"),
        ({"sample_from_anchor": True}, "sample_from_anchor"),
        ({"aux_hidden_state_layer_ids": [0, 2]}, "layer id 0"),
        ({"aux_hidden_state_layer_ids": [1, 9]}, "target layer 8, but .* has 4 layers"),
        ({"aux_hidden_state_layer_ids": "x"}, "lacks or garbles"),
        ({"block_size": None}, "lacks or garbles"),
    ],
)
def test_configs_that_do_not_fit(change: dict, message: str, exported: Path, files: TargetFiles) -> None:
    path = exported / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(DrafterError, match=message):
        read_speculators(exported, files)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t.pop("fc.weight"), "Missing: .*fc.weight"),
        (lambda t: t.update({"extra.weight": torch.zeros(2)}), "extra: .*extra.weight"),
        (lambda t: t.update({"norm.weight": torch.zeros(3)}), r"misshapen: .*norm.weight \(3,\) instead of \(32,\)"),
        (lambda t: t.update({"d2t": torch.zeros(2)}), "reduced vocabulary"),
        (lambda t: t.update({"layers.0.self_attn.qkv_proj.weight": torch.zeros(2)}), "variant with .*qkv_proj"),
    ],
)
def test_tensors_that_do_not_fit(change: Callable, message: str, exported: Path, files: TargetFiles) -> None:
    tensors = load_file(exported / "model.safetensors")
    change(tensors)
    save_file(tensors, exported / "model.safetensors")
    with pytest.raises(DrafterError, match=message):
        read_speculators(exported, files)


def test_another_target_is_refused(drafter: DFlashDrafter, target_dirs: dict[str, Path], tmp_path: Path) -> None:
    other = TargetFiles(str(target_dirs["vocab_6"]))
    with pytest.raises(DrafterError, match="vocabulary is 64, but that of .* is 6"):
        write_speculators(drafter, tmp_path / "out", other, "x")
    assert not (tmp_path / "out").exists()


def test_the_last_layer_cannot_be_said(
    target: Target, make_drafter: MakeDrafter, files: TargetFiles, tmp_path: Path
) -> None:
    with pytest.raises(DrafterError, match="last layer .3.*export it as dflash"):
        write_speculators(make_drafter(target, target_layer_ids=(0, 3)), tmp_path / "out", files, "x")


@pytest.mark.parametrize("content, message", [(None, "has no config.json"), ({"vocab_size": 3}, "num_hidden_layers")])
def test_targets_that_are_none(content: dict | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(TargetError, match=message):
        TargetFiles(str(tmp_path))


def test_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, back = str(tmp_path / "out"), str(tmp_path / "back")
    target = ("--target", "bundled:tiny_target")
    main(["export", "bundled:tiny_dflash", out, "--format", "speculators", *target])
    main(["import", out, back, *target])
    assert equal(DFlashDrafter.load(back), DFlashDrafter.load("bundled:tiny_dflash"))
    assert "vllm serve" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="name it with --target"):
        main(["export", "bundled:tiny_dflash", out, "--format", "speculators"])
    with pytest.raises(SystemExit, match="No drafter in"):
        main(["export", str(tmp_path / "nothing"), out])


@pytest.mark.slow
def test_a_running_trainings_checkpoint(chat_targets: dict[str, str], script: Script, tmp_path: Path) -> None:
    run = tmp_path / "run"
    done = script(
        "train.py", "target=hf", f"target.path={chat_targets['qwen3']}", "drafter.num_layers=1", "drafter.block_size=4",
        *SMALL, f"hydra.run.dir={run}",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    exported = read_training_checkpoint(run / "checkpoints" / "last.ckpt")
    exported.save(tmp_path / "out")
    first, second = (load_file(d / "model.safetensors") for d in (tmp_path / "out", run / "drafter"))
    assert first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)
    command = [sys.executable, "-m", "draftopd.interop", "export", str(run), str(tmp_path / "again")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "again" / "config.json").read_text() == (run / "drafter" / "config.json").read_text()


@pytest.mark.parametrize("content", [b"not a checkpoint", b""])
def test_files_that_are_no_checkpoints(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    path.write_bytes(content)
    with pytest.raises(DrafterError, match="no checkpoint of a training run"):
        read_training_checkpoint(path)
    torch.save({"state_dict": {}}, path)
    with pytest.raises(DrafterError, match="no checkpoint of a training run"):
        read_training_checkpoint(path)
