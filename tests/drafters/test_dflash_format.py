"""The public DFlash checkpoint layout."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.support.faults import flip
from tests.support.models import MakeDrafter

from draftopd.drafters import checkpoint
from draftopd.drafters.checkpoint import read_checkpoint, save_drafter
from draftopd.drafters.dflash import DFlashConfig, DFlashDrafter
from draftopd.drafters.load import load_drafter
from draftopd.errors import DrafterError, FileError
from draftopd.targets.target import Target

#: The public checkpoint for Qwen3-8B.
QWEN3_8B = {
    "architectures": ["DFlashDraftModel"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "auto_map": {"AutoModel": "dflash.DFlashDraftModel"},
    "block_size": 16,
    "dflash_config": {"mask_token_id": 151669, "target_layer_ids": [1, 9, 17, 25, 33]},
    "dtype": "bfloat16",
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 12288,
    "layer_types": ["full_attention"] * 5,
    "max_position_embeddings": 40960,
    "max_window_layers": 5,
    "model_type": "qwen3",
    "num_attention_heads": 32,
    "num_hidden_layers": 5,
    "num_key_value_heads": 8,
    "num_target_layers": 36,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}


@pytest.fixture
def drafter(target: Target, make_drafter: MakeDrafter) -> DFlashDrafter:
    """With parameters that bfloat16 holds exactly."""
    drafter = make_drafter(target, num_layers=2, block_size=5)
    with torch.no_grad():
        for parameter in drafter.parameters():
            parameter.copy_(parameter.bfloat16())
    return drafter


@pytest.fixture
def saved(drafter: DFlashDrafter, tmp_path: Path) -> Path:
    save_drafter(drafter, tmp_path / "drafter")
    return tmp_path / "drafter"


def edit_config(directory: Path, drop: tuple[str, ...] = (), **changes: object) -> None:
    path = directory / "config.json"
    raw = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in raw.items() if name not in drop}))


def test_round_trip_is_bit_equal(drafter: DFlashDrafter, saved: Path, tmp_path: Path) -> None:
    loaded = load_drafter(str(saved))
    own, found = drafter.state_dict(), loaded.state_dict()
    assert own.keys() == found.keys() == load_file(saved / "model.safetensors").keys()
    assert all(torch.equal(own[name], found[name]) and found[name].dtype == torch.float32 for name in own)
    assert loaded.config.to_json() == drafter.config.to_json() and loaded.config.target == drafter.config.target
    save_drafter(loaded, tmp_path / "again")
    for name in ("config.json", "model.safetensors"):
        assert (saved / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    assert sorted(path.name for path in saved.iterdir()) == ["checksums.json", "config.json", "model.safetensors"]


def test_a_loaded_drafter_drafts_the_same(target: Target, drafter: DFlashDrafter, saved: Path) -> None:
    features = torch.randn(1, 9, 64)
    anchors, ids = torch.tensor([[4, 8]]), torch.arange(9)[None]
    drafts = [
        model.replay(target, features, ids, anchors, lambda hidden: hidden.argmax(-1))
        for model in (drafter, load_drafter(saved))
    ]
    assert torch.equal(drafts[0].hidden, drafts[1].hidden)


def test_float32_is_kept_when_asked(target: Target, make_drafter: MakeDrafter, tmp_path: Path) -> None:
    drafter = make_drafter(target)
    save_drafter(drafter, tmp_path, dtype=torch.float32)
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == "float32"
    loaded = load_drafter(tmp_path).state_dict()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in drafter.state_dict().items())


def test_config_holds_the_public_keys(saved: Path) -> None:
    raw = json.loads((saved / "config.json").read_text())
    assert raw["architectures"] == ["DFlashDraftModel"]
    assert raw["model_type"] == "qwen3"
    assert raw["auto_map"] == {"AutoModel": "dflash.DFlashDraftModel"}
    assert raw["dflash_config"] == {"mask_token_id": 63, "target_layer_ids": [0, 2]}
    expected = {
        "block_size": 5, "num_target_layers": 4, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 48, "rms_norm_eps": 1e-6, "rope_theta": 1000.0,
        "rope_scaling": None, "max_position_embeddings": 256, "layer_types": ["full_attention"] * 2,
        "sliding_window": None, "vocab_size": 64, "tie_word_embeddings": False,
    }  # fmt: skip
    assert {name: raw[name] for name in expected} == expected


def test_tensors_have_the_public_names_and_shapes(saved: Path) -> None:
    tensors = load_file(saved / "model.safetensors")
    expected = {"fc.weight": [32, 64], "hidden_norm.weight": [32], "norm.weight": [32]}
    for i in range(2):
        expected |= {
            f"layers.{i}.self_attn.q_proj.weight": [64, 32], f"layers.{i}.self_attn.k_proj.weight": [32, 32],
            f"layers.{i}.self_attn.v_proj.weight": [32, 32], f"layers.{i}.self_attn.o_proj.weight": [32, 64],
            f"layers.{i}.self_attn.q_norm.weight": [16], f"layers.{i}.self_attn.k_norm.weight": [16],
            f"layers.{i}.mlp.gate_proj.weight": [48, 32], f"layers.{i}.mlp.up_proj.weight": [48, 32],
            f"layers.{i}.mlp.down_proj.weight": [32, 48], f"layers.{i}.input_layernorm.weight": [32],
            f"layers.{i}.post_attention_layernorm.weight": [32],
        }  # fmt: skip
    assert {name: list(tensor.shape) for name, tensor in tensors.items()} == expected
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}


def test_block_size_inside_dflash_config(saved: Path) -> None:
    inner = {"mask_token_id": 63, "target_layer_ids": [0, 2], "block_size": 7}
    edit_config(saved, drop=("block_size",), dflash_config=inner)
    assert load_drafter(saved).block_size == 7


def test_rope_settings(saved: Path, tmp_path: Path) -> None:
    for scaling in ({"rope_type": "linear", "factor": 2.0}, {"type": "linear", "factor": 2.0}):
        edit_config(saved, rope_theta=5e5, rope_scaling=scaling)
        loaded = load_drafter(saved)
        save_drafter(loaded, tmp_path / "again")
        for found in (loaded, load_drafter(tmp_path / "again")):
            expected = 0.5 / 5e5 ** (torch.arange(8) / 8)
            assert torch.allclose(found.rotary_emb.inv_freq, expected)
    edit_config(saved, drop=("rope_theta", "rope_scaling"), rope_parameters={"rope_type": "default", "rope_theta": 7e3})
    assert load_drafter(saved).config.layers.rope_parameters["rope_theta"] == 7e3


def test_the_public_qwen3_8b_shape(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(QWEN3_8B))
    save_file({"norm.weight": torch.zeros(1)}, tmp_path / "model.safetensors")
    config = DFlashConfig.from_json(read_checkpoint(tmp_path)[0], "test")
    with torch.device("meta"):
        drafter = DFlashDrafter(config)
    assert (drafter.block_size, config.mask_token_id, config.target) == (16, 151669, (4096, 151936, 36))
    assert drafter.target_layer_ids == (1, 9, 17, 25, 33)
    shapes = {name: tuple(parameter.shape) for name, parameter in drafter.named_parameters()}
    assert len(shapes) == 3 + 5 * 11
    assert shapes["fc.weight"] == (4096, 5 * 4096)
    assert shapes["layers.4.self_attn.q_proj.weight"] == (4096, 4096)
    assert shapes["layers.4.self_attn.k_proj.weight"] == (1024, 4096)
    assert shapes["layers.4.self_attn.k_norm.weight"] == (128,)
    assert shapes["layers.4.mlp.down_proj.weight"] == (4096, 12288)
    written = config.to_json()
    assert {name: written.get(name) for name in QWEN3_8B.keys() - {"dtype", "use_cache"}} == {
        name: value for name, value in QWEN3_8B.items() if name not in ("dtype", "use_cache")
    }


@pytest.mark.parametrize("fails", ["model.safetensors", "config.json"])
def test_a_failed_save_leaves_the_old_file_whole(
    drafter: DFlashDrafter, saved: Path, fails: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {path.name: path.read_bytes() for path in saved.iterdir()}

    def disk_full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    if fails == "model.safetensors":
        monkeypatch.setattr(checkpoint, "save_file", disk_full)
    else:
        monkeypatch.setattr(Path, "write_text", disk_full)
    with torch.no_grad():
        drafter.fc.weight += 1
    with pytest.raises(FileError, match=f"{fails} cannot be written.*No space left"):
        save_drafter(drafter, saved)
    # What is no longer true of one of them is gone.
    assert sorted(path.name for path in saved.iterdir()) == ["config.json", "model.safetensors"]
    assert (saved / fails).read_bytes() == before[fails]
    load_drafter(saved)


@pytest.mark.parametrize("kept", [True, False])
def test_a_flipped_bit_in_the_weights(saved: Path, kept: bool) -> None:
    """Found where the checksums are kept; a checkpoint from elsewhere has none."""
    flip(saved / "model.safetensors")
    if kept:
        with pytest.raises(DrafterError, match="model.safetensors is damaged: its checksum differs.*checksums.json"):
            load_drafter(saved)
    else:
        (saved / "checksums.json").unlink()
        load_drafter(saved)


@pytest.mark.parametrize(
    "name, message", [("config.json", "config.json was changed"), ("checksums.json", "read unchecked")]
)
def test_an_edited_config_is_told_and_read(
    name: str, message: str, saved: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (saved / name).write_text((saved / name).read_text().replace("{", '{"more": 1,', 1))
    load_drafter(saved)
    assert message in caplog.text
