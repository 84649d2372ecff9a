"""The command: a plan of the runs the README names, and clear errors."""

from __future__ import annotations

from pathlib import Path

import pytest

from draftopd.cli.planning import plan

SHARDED = "+trainer.strategy._target_=lightning.pytorch.strategies.ModelParallelStrategy"


def test_a_large_target_needs_its_layers_sharded(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["target=qwen3_30b_a3b", "trainer.devices=8"]
    plan(command)
    whole = capsys.readouterr().out
    assert "30.53 B weights" in whole and "Does not fit" in whole and "trainer=fsdp trainer.devices=8" in whole
    plan([*command, SHARDED, "drafter.activation_checkpointing=true"])
    sharded = capsys.readouterr().out
    assert "layers sharded" in sharded and "\nFits: " in sharded


def test_what_would_help_is_a_key_of_the_run(capsys: pytest.CaptureFixture[str]) -> None:
    """Texts that trajectories= decodes have their batch size there."""
    plan(["experiment=sft", "target=qwen3_4b", "data=paper_mix", "max_new_tokens=4096"])
    printed = capsys.readouterr().out
    assert "  trajectories.batch_size=32: " in printed and "rollout.batch_size" not in printed


@pytest.mark.parametrize("drafter", ["eagle3", "mtp"])
def test_other_drafters_and_texts_without_decoding(drafter: str, capsys: pytest.CaptureFixture[str]) -> None:
    plan([f"drafter={drafter}", "rollout=fresh", "plan.gpu=L4", "plan.tau=3"])
    printed = capsys.readouterr().out
    assert "Fits" in printed and "run: anchors" in printed and "1 x L4" in printed


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["plan.gpu=H1000"], "plan.gpu=H1000 is not one of H100"),
        (["plan.tflop=5"], "did you mean 'tflops'"),
        (["+plan.utilisation=2"], "plan.utilisation=2 does not fit"),
        (["target=hf", "target.path=/no/such/place"], "only its config.json"),
        (["drafter.checkpoint=null", "drafter.target_layer_ids=[99]"], "reads target layers [99]"),
        (["trainer=ddp", "trainer.devices=0"], "trainer.devices=N"),
        (["trainer.precision=64-true"], "trainer.precision=64-true is not planned for"),
        (["los=forward_kl"], "did you mean 'loss'"),
    ],
)
def test_wrong_input_ends_with_one_message(arguments: list[str], message: str) -> None:
    with pytest.raises(SystemExit) as stopped:
        plan(arguments)
    assert message in str(stopped.value)


def test_a_plan_needs_no_place_for_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").write_text("a file")
    plan([])
    assert "Fits" in capsys.readouterr().out


def test_a_directory_with_config_json_is_enough(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    known = Path(__file__).parents[2] / "src" / "draftopd" / "planning" / "known_shapes" / "Qwen3-4B.json"
    (tmp_path / "config.json").write_text(
        known.read_text().replace('"num_hidden_layers": 36', '"num_hidden_layers": 9')
    )
    plan(["target=hf", f"target.path={tmp_path}", "plan.memory=1000"])
    printed = capsys.readouterr().out
    assert "as draftopd knows" not in printed and "1.30 B weights" in printed
