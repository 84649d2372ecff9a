"""Targets as they really lie on disk are none of those that the checks before loading refuse."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.support.models import small_model
from torch import Tensor

from draftopd.errors import TargetError
from draftopd.io.hub import check_size
from draftopd.targets.load import load_target


def rewrite(place: Path, tensors: dict[str, Tensor], **config: Any) -> None:
    save_file(tensors, place / "model.safetensors", metadata={"format": "pt"})
    raw = json.loads((place / "config.json").read_text()) | config
    (place / "config.json").write_text(json.dumps(raw))


def saved(kind: str, place: Path, **shape: Any) -> dict[str, Tensor]:
    small_model(kind, **shape).to(torch.bfloat16).save_pretrained(place)
    return load_file(place / "model.safetensors")


def test_shards_with_an_index(tmp_path: Path) -> None:
    model = small_model("qwen3")
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    found = load_target(str(tmp_path), dtype="float32").model.state_dict()
    torch.testing.assert_close(dict(found), dict(model.state_dict()), rtol=0, atol=0)


def test_an_index_that_the_config_names(tmp_path: Path) -> None:
    model = small_model("qwen3")
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    (tmp_path / "model.safetensors.index.json").rename(tmp_path / "own.safetensors.index.json")
    raw = json.loads((tmp_path / "config.json").read_text()) | {"transformers_weights": "own.safetensors.index.json"}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    found = load_target(str(tmp_path), dtype="float32").model.state_dict()
    torch.testing.assert_close(dict(found), dict(model.state_dict()), rtol=0, atol=0)


def test_fp8(tmp_path: Path) -> None:
    tensors = saved("qwen3", tmp_path)
    name = "model.layers.1.mlp.up_proj.weight"
    whole = tensors[name].float()
    for key in [key for key in tensors if key.endswith("proj.weight")]:
        scale = tensors[key].float().abs().max() / 448
        tensors |= {key: (tensors[key].float() / scale).to(torch.float8_e4m3fn), f"{key}_scale_inv": scale.view(1, 1)}
    quantized = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128], "fmt": "e4m3"}
    rewrite(tmp_path, tensors, quantization_config=quantized)
    target = load_target(str(tmp_path))
    if not torch.cuda.is_available():  # dequantized there
        torch.testing.assert_close(target.model.state_dict()[name].float(), whole, rtol=0.1, atol=0.01)


def test_mxfp4(tmp_path: Path) -> None:
    """gpt-oss: experts of four bits in blocks of 32 with a scale each."""
    tensors = saved("gpt_oss", tmp_path, intermediate_size=32)
    for key in [key for key in tensors if key.endswith(("gate_up_proj", "down_proj"))]:
        experts, inner, outer = tensors.pop(key).shape
        blocks = torch.full((experts, outer, inner // 32, 16), 0x22, dtype=torch.uint8)  # 2 is the number 1
        tensors |= {f"{key}_blocks": blocks, f"{key}_scales": torch.full(blocks.shape[:3], 126, dtype=torch.uint8)}
    rewrite(tmp_path, tensors, quantization_config={"quant_method": "mxfp4"})
    target = load_target(str(tmp_path))
    if not torch.cuda.is_available():
        assert (target.model.state_dict()["model.layers.1.mlp.experts.down_proj"] == 0.5).all()


def test_the_cap_allows_one_bit_a_weight(tmp_path: Path) -> None:
    """No file is as large as these: only their sizes count."""
    for name, size in (("a.safetensors", 2**33), ("b.safetensors", 2**33)):
        with (tmp_path / name).open("wb") as file:
            file.truncate(size)
    check_size(str(tmp_path), 8 * 2**34)
    with pytest.raises(TargetError, match="describes .* parameters"):
        check_size(str(tmp_path), 17 * 2**34)
