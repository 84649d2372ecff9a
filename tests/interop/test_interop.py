"""Checkpoint formats: round trips are bit-exact, and what does not fit is named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.support.models import DRAFTERS, MakeDrafter
from tests.support.runs import SMALL, Script

from draftopd.__main__ import main
from draftopd.cli.interop import read_training_checkpoint
from draftopd.drafters.base import Drafter
from draftopd.drafters.checkpoint import save_drafter
from draftopd.drafters.eagle3 import Eagle3Drafter
from draftopd.drafters.load import load_drafter
from draftopd.errors import DrafterError, TargetError
from draftopd.interop.speculators import read_speculators, write_speculators
from draftopd.interop.target_files import TargetFiles
from draftopd.targets.load import load_target
from draftopd.targets.target import Target


@pytest.fixture
def files(target_dirs: dict[str, Path]) -> TargetFiles:
    return TargetFiles(str(target_dirs["qwen3"]))


@pytest.fixture
def drafter(target: Target, make_any: MakeDrafter) -> Drafter:
    return make_any("dflash", target)


@pytest.fixture
def exported(drafter: Drafter, files: TargetFiles, tmp_path: Path) -> Path:
    write_speculators(drafter, tmp_path / "out", files, "org/target", torch.float32)
    return tmp_path / "out"


def equal(first: Drafter, second: Drafter) -> bool:
    a, b = first.state_dict(), second.state_dict()
    same = first.config.to_json() == second.config.to_json()
    return same and a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("drafts", DRAFTERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trips(
    dtype: torch.dtype, drafts: str, target: Target, make_any: MakeDrafter, files: TargetFiles, tmp_path: Path
) -> None:
    """Public format and speculators: the same bits, tables included, and the same bytes written again."""
    drafter = make_any(drafts, target)
    save_drafter(drafter, tmp_path / "public", dtype)
    rounded = load_drafter(tmp_path / "public")
    assert type(rounded) is type(drafter) and rounded.config.to_json() == drafter.config.to_json()
    for name, tensor in drafter.state_dict().items():
        expected = tensor.to(dtype).float() if tensor.is_floating_point() else tensor
        assert torch.equal(rounded.state_dict()[name], expected)
    write_speculators(rounded, tmp_path / "speculators", files, "org/target", dtype)
    back = read_speculators(tmp_path / "speculators", files)
    assert equal(back, rounded)
    save_drafter(back, tmp_path / "again", dtype)
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "public" / name).read_bytes()
    config = json.loads((tmp_path / "speculators" / "config.json").read_text())
    assert config["speculators_model_type"] == drafts.removesuffix("_reduced")
    verifier = config["speculators_config"]["verifier"]
    assert verifier == {"name_or_path": "org/target", "architectures": ["Qwen3ForCausalLM"]}
    assert config["speculators_config"]["proposal_methods"][0]["speculative_tokens"] == 3


def test_what_a_speculator_holds_of_its_target(
    target: Target, make_any: MakeDrafter, files: TargetFiles, tmp_path: Path, target_dirs: dict[str, Path]
) -> None:
    embedding = load_file(target_dirs["qwen3"] / "model.safetensors")["model.embed_tokens.weight"]
    write_speculators(make_any("dflash", target), tmp_path / "d", files, "org/target", torch.float32)
    tensors = load_file(tmp_path / "d" / "model.safetensors")
    assert torch.equal(tensors["embed_tokens.weight"], embedding)
    assert torch.equal(tensors["lm_head.weight"], embedding)  # tied
    assert json.loads((tmp_path / "d" / "config.json").read_text())["aux_hidden_state_layer_ids"] == [1, 3]
    eagle = make_any("eagle3_reduced", target)
    write_speculators(eagle, tmp_path / "e", files, "org/target", torch.float32)
    tensors = load_file(tmp_path / "e" / "model.safetensors")
    assert torch.equal(tensors["embed_tokens.weight"], embedding)
    assert torch.equal(tensors["lm_head.weight"], eagle.lm_head.weight)
    assert "layers.0.hidden_norm.weight" in tensors and tensors["t2d"].dtype == torch.bool
    taps = json.loads((tmp_path / "e" / "config.json").read_text())["eagle_aux_hidden_state_layer_ids"]
    assert taps == [i + 1 for i in eagle.target_layer_ids]


@pytest.mark.parametrize("kind", ["qwen3", "llama", "gemma3"])
def test_embedding_and_head_are_the_targets(kind: str, target_dirs: dict[str, Path]) -> None:
    files, target = TargetFiles(str(target_dirs[kind])), load_target(str(target_dirs[kind]), dtype="float32")
    assert torch.equal(files.lm_head().float(), target.head.weight)
    assert torch.equal(files.embedding().float(), target.model.get_input_embeddings().weight)
    assert files.shape == (32, 64, 4)


def test_a_target_in_several_files(target_dirs: dict[str, Path], tmp_path: Path) -> None:
    model = load_target(str(target_dirs["llama"]), dtype="float32").model
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    assert torch.equal(TargetFiles(str(tmp_path)).lm_head(), model.lm_head.weight)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"speculators_model_type": "peagle"}, "speculator of type peagle, expected dflash"),
        ({"transformer_layer_config": None}, "no transformer_layer_config"),
        ({"draft_vocab_size": 32}, "reduced vocabulary of 32"),
        ({"sample_from_anchor": True}, "sample_from_anchor"),
        ({"aux_hidden_state_layer_ids": [0, 2]}, "layer id 0"),
        ({"aux_hidden_state_layer_ids": [1, 9]}, r"reads target layers \[8\], but the target has layers 0 to 3"),
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
    (exported / "checksums.json").unlink()
    with pytest.raises(DrafterError, match=message):
        read_speculators(exported, files)


def test_another_target_is_refused(drafter: Drafter, target_dirs: dict[str, Path], tmp_path: Path) -> None:
    other = TargetFiles(str(target_dirs["vocab_6"]))
    with pytest.raises(DrafterError, match="vocabulary is 64, but this target's is 6"):
        write_speculators(drafter, tmp_path / "out", other, "x")
    assert not (tmp_path / "out").exists()


def test_the_last_layer_cannot_be_said(
    target: Target, make_drafter: MakeDrafter, files: TargetFiles, tmp_path: Path
) -> None:
    with pytest.raises(DrafterError, match="last layer .3.*in its public format"):
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
    assert equal(load_drafter(back), load_drafter("bundled:tiny_dflash"))
    assert "vllm serve" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="name it with --target"):
        main(["export", "bundled:tiny_dflash", out, "--format", "speculators"])
    with pytest.raises(SystemExit, match="No drafter in"):
        main(["export", str(tmp_path / "nothing"), out])


class TestEagle3:
    """Checkpoints as others publish them."""

    @pytest.fixture
    def public(self, target: Target, make_any: MakeDrafter, tmp_path: Path) -> Path:
        save_drafter(make_any("eagle3_reduced", target), tmp_path / "public", torch.float32)
        return tmp_path / "public"

    def change(self, public: Path, drop: tuple[str, ...] = (), **config: object) -> None:
        raw = json.loads((public / "config.json").read_text()) | config
        (public / "config.json").write_text(json.dumps({k: v for k, v in raw.items() if k not in drop}))

    def tensors(self, public: Path, **changes: torch.Tensor | None) -> None:
        tensors = load_file(public / "model.safetensors") | changes
        save_file({k: v for k, v in tensors.items() if v is not None}, public / "model.safetensors")
        (public / "checksums.json").unlink()

    def test_layers_as_each_engine_counts_them(self, public: Path) -> None:
        raw = json.loads((public / "config.json").read_text())
        assert raw["eagle_aux_hidden_state_layer_ids"] == [1, 3, 4]  # inputs, as vLLM reads them
        assert raw["eagle_config"]["eagle_aux_hidden_state_layer_ids"] == [0, 2, 3]  # outputs, as SGLang does
        self.change(public, drop=("eagle_aux_hidden_state_layer_ids",))
        assert load_drafter(public).target_layer_ids == (0, 2, 3)
        self.change(public, drop=("eagle_aux_hidden_state_layer_ids", "eagle_config"))
        assert load_drafter(public).target_layer_ids == (0, 2, 3)  # the usual ones

    def test_a_checkpoint_that_says_less(self, public: Path, target: Target) -> None:
        self.change(public, drop=("num_target_layers", "block_size", "norm_before_residual"))
        with pytest.raises(DrafterError, match="how deep its target is"):
            load_drafter(public)
        drafter = load_drafter(public, target.num_layers)
        assert (drafter.block_size, drafter.target_layer_ids) == (8, (0, 2, 3))

    def test_an_embedding_of_its_own(self, public: Path, target: Target, tmp_path: Path) -> None:
        embedding = torch.randn(64, 32)
        self.tensors(public, **{"embed_tokens.weight": embedding})
        drafter = load_drafter(public)
        assert isinstance(drafter, Eagle3Drafter) and drafter.embed_tokens is not None
        entry = drafter.entry(target, torch.tensor([[3]]), torch.ones(1, 1, 32))
        expected = drafter.midlayer.input_layernorm(embedding[3])
        torch.testing.assert_close(entry.states[0, 0, :32], expected)
        assert not drafter.embed_tokens.weight.requires_grad
        save_drafter(drafter, tmp_path / "again", torch.float32)
        assert torch.equal(load_file(tmp_path / "again" / "model.safetensors")["embed_tokens.weight"], embedding)

    def test_another_width_needs_one(self, public: Path) -> None:
        self.change(public, target_hidden_size=48)
        with pytest.raises(DrafterError, match=r"embed_tokens.weight of its own"):
            load_drafter(public)

    def test_tables_of_a_whole_vocabulary_are_left_aside(
        self, target: Target, make_any: MakeDrafter, tmp_path: Path
    ) -> None:
        save_drafter(make_any("eagle3", target), tmp_path, torch.float32)
        self.tensors(tmp_path, t2d=torch.ones(64, dtype=torch.bool), d2t=torch.zeros(64, dtype=torch.long))
        assert load_drafter(tmp_path).t2d is None

    def test_tables_that_disagree(self, public: Path) -> None:
        self.tensors(public, d2t=torch.zeros(43, dtype=torch.long))
        with pytest.raises(DrafterError, match="t2d and d2t"):
            load_drafter(public)

    @pytest.mark.parametrize(
        ("config", "tensors", "message"),
        [
            ({"norm_output": True}, {}, "variant with .*norm_output"),
            ({}, {"fc_norm.0.weight": torch.zeros(2)}, "variant with .*fc_norm.0.weight"),
            ({"num_hidden_layers": 2}, {}, "has 2 layers"),
            ({"architectures": ["LlamaForCausalLM"]}, {}, "holds a LlamaForCausalLM"),
            ({"draft_vocab_size": "x"}, {}, "lacks or garbles"),
            ({"draft_vocab_size": 50}, {}, "misshapen: .*lm_head.weight"),
            ({}, {"fc.weight": None}, "Missing: .*fc.weight"),
            ({}, {"midlayer.self_attn.q_norm.weight": torch.zeros(2)}, "extra: .*q_norm.weight"),
        ],
    )
    def test_refusals(self, public: Path, config: dict, tensors: dict, message: str) -> None:
        self.change(public, **config)
        self.tensors(public, **tensors)
        with pytest.raises(DrafterError, match=message):
            load_drafter(public)


@pytest.mark.slow
@pytest.mark.parametrize("drafts", ["dflash", "eagle3", "mtp"])
def test_a_running_trainings_checkpoint(
    drafts: str, chat_targets: dict[str, str], script: Script, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shape = {"dflash": ("drafter.num_layers=1",), "eagle3": ("drafter.draft_vocab_size=99",), "mtp": ()}[drafts]
    done = script(
        "train.py", "target=hf", f"target.path={chat_targets['qwen3']}", f"drafter={drafts}", "drafter.block_size=4",
        *shape, *SMALL, f"hydra.run.dir={run}",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    exported = read_training_checkpoint(run / "checkpoints" / "last.ckpt")
    save_drafter(exported, tmp_path / "out")
    first, second = (load_file(d / "model.safetensors") for d in (tmp_path / "out", run / "drafter"))
    assert first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)
    main(["export", str(run), str(tmp_path / "again")])
    assert (tmp_path / "again" / "config.json").read_text() == (run / "drafter" / "config.json").read_text()


def test_a_target_that_scales_its_embeddings_is_refused(
    target_dirs: dict[str, Path], make_any: MakeDrafter, tmp_path: Path
) -> None:
    target = load_target(str(target_dirs["gemma3"]), dtype="float32")
    files = TargetFiles(str(target_dirs["gemma3"]))
    with pytest.raises(DrafterError, match="scales its embeddings.*public format"):
        write_speculators(make_any("dflash", target), tmp_path / "out", files, "x")
    assert not (tmp_path / "out").exists()


def test_an_output_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit, match="cannot be written"):
        main(["export", "bundled:tiny_dflash", str(tmp_path / "file")])


@pytest.mark.parametrize("name", ["../elsewhere.safetensors", "/etc/passwd", 3])
def test_an_index_that_names_other_places(name: object, target_dirs: dict[str, Path], tmp_path: Path) -> None:
    place = tmp_path / "target"
    place.mkdir()
    (place / "config.json").write_text((target_dirs["llama"] / "config.json").read_text())
    weights = (target_dirs["llama"] / "model.safetensors").read_bytes()
    (tmp_path / "elsewhere.safetensors").write_bytes(weights)
    index = {"weight_map": {"model.embed_tokens.weight": name}}
    (place / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(TargetError, match="only safetensors files beside it are read"):
        TargetFiles(str(place)).embedding()


@pytest.mark.parametrize("content", ["[]", "{}", '{"weight_map": 3}', "{"])
def test_an_index_that_is_none(content: str, target_dirs: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((target_dirs["llama"] / "config.json").read_text())
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(TargetError, match="cannot be read"):
        TargetFiles(str(tmp_path)).embedding()
