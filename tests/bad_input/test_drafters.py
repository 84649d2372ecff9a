"""Drafter checkpoints that are damaged, garbled, another's, or made to harm."""

from __future__ import annotations

import json
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.support.refusing import Copy, refused
from tests.support.spoiling import DEEP, Change, Harm, config, content, pickled

from draftopd.cli.interop import read_any
from draftopd.drafters.load import load_for
from draftopd.errors import DrafterError, FileError
from draftopd.targets.target import Target


def dflash(**changes: Any) -> Change:
    """Other fields of ``dflash_config``."""
    inner = {"mask_token_id": 63, "target_layer_ids": [0, 2]} | changes
    return config(dflash_config={k: v for k, v in inner.items() if v is not ...})


def speculators(**changes: Any) -> Change:
    """Other fields of an MTP head's layer."""

    def change(place: Path) -> None:
        raw = json.loads((place / "config.json").read_text())
        raw["transformer_layer_config"] |= changes
        (place / "config.json").write_text(json.dumps(raw))

    return change


def tensors(**changes: Any) -> Change:
    """Other tensors, ``_`` for ``.`` at a name's end; None takes one out, a function changes it."""

    def change(place: Path) -> None:
        found = load_file(place / "model.safetensors")
        for name, new in changes.items():
            key = name.replace("__", ".")
            if new is None:
                del found[key]
            else:
                found[key] = new(found[key]) if callable(new) else new
        save_file(found, place / "model.safetensors")

    return change


def damage(edit: Callable[[bytearray], object]) -> Change:
    def change(place: Path) -> None:
        data = bytearray((place / "model.safetensors").read_bytes())
        edit(data)
        (place / "model.safetensors").write_bytes(data)

    return change


def header(raw: Any) -> bytes:
    """A safetensors file of this header and 64 bytes."""
    text = raw if isinstance(raw, bytes) else json.dumps(raw).encode()
    return struct.pack("<Q", len(text)) + text + bytes(64)


def spoil(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor.view(-1)[0] = value
        return tensor

    return change


READ = "cannot be read: .*Copy or train it again"
NUMBER = "where a whole number belongs"
LAYERS = "does not describe qwen3 layers: "
FIELDS = "lacks or garbles .*expected the DFlash fields"

DFLASH: dict[str, tuple[Change, str]] = {
    "no config": (lambda p: (p / "config.json").unlink(), "config.json is missing. Name a directory"),
    "no tensors": (lambda p: (p / "model.safetensors").unlink(), "model.safetensors is missing. Name a directory"),
    "config empty": (content("config.json", b""), READ),
    "config cut off": (content("config.json", b'{"architectures": ['), READ),
    "config no UTF-8": (content("config.json", b"\xff\xfe{\x00}\x00"), READ),
    "config with BOM": (content("config.json", b"\xef\xbb\xbf{}"), "byte order mark: save it as UTF-8"),
    "config a list": (content("config.json", b"[]"), "is not a JSON object"),
    "config nested deeply": (content("config.json", DEEP), "nests too deeply"),
    "config with endless number": (content("config.json", b'{"block_size": ' + b"9" * 5000 + b"}"), READ),
    "config with NUL": (content("config.json", b'{"a": "\x00"}'), READ),
    "config a directory": (
        lambda p: ((p / "config.json").unlink(), (p / "config.json").mkdir()), READ,
    ),
    "architecture missing": (config(architectures=...), r"holds a \?, expected one of DFlashDraftModel"),
    "architecture other": (config(architectures=["LlamaForCausalLM"]), "holds a LlamaForCausalLM, expected one of"),
    "architecture a number": (config(architectures=5), r"holds a \?"),
    "architecture an object": (config(architectures={"0": "DFlashDraftModel"}), r"holds a \?"),
    "architecture a list": (config(architectures=[["DFlashDraftModel"]]), r"holds a \?"),
    "architecture an escape sequence": (config(architectures=["\x1b[2J" * 99]), r"holds a \[2J"),
    "no dflash_config": (config(dflash_config=...), f"'target_layer_ids'|{FIELDS}"),
    "dflash_config a list": (config(dflash_config=[1]), FIELDS),
    "dflash_config a text": (config(dflash_config="x"), FIELDS),
    "no taps": (dflash(target_layer_ids=...), FIELDS),
    "taps empty": (dflash(target_layer_ids=[]), "target_layer_ids, which is empty"),
    "taps a number": (dflash(target_layer_ids=3), FIELDS),
    "taps null": (dflash(target_layer_ids=[None, 2]), f"None {NUMBER}"),
    "taps fractions": (dflash(target_layer_ids=[0.5, 2]), f"0.5 {NUMBER}"),
    "taps outside": (dflash(target_layer_ids=[0, 9]), r"reads target layers \[9\], but the target has layers 0 to 3"),
    "taps below 0": (dflash(target_layer_ids=[-1, 2]), r"reads target layers \[-1\]"),
    "mask missing": (dflash(mask_token_id=...), "'mask_token_id'"),
    "mask outside": (dflash(mask_token_id=64), "mask_token_id 64 lies outside the target's vocabulary of 64"),
    "mask below 0": (dflash(mask_token_id=-1), "mask_token_id -1 lies outside"),
    "block_size missing": (config(block_size=...), "'block_size'"),
    "block_size a text": (config(block_size="many"), f"many {NUMBER}"),
    "block_size true": (config(block_size=True), f"True {NUMBER}"),
    "block_size 1": (config(block_size=1), "block_size 1 proposes nothing"),
    "block_size below 0": (config(block_size=-4), "block_size -4 proposes nothing"),
    "block_size huge": (config(block_size=10**12), "above the maximum: use 1024 or less"),
    "block_size infinite": (content("config.json", b'{"architectures": ["DFlashDraftModel"], "block_size": 1e999}'),
        f"inf {NUMBER}"),
    "depth missing": (config(num_target_layers=None), FIELDS),
    "depth other": (config(num_target_layers=36), "number of target layers is 36, but this target's is 4: use"),
    "vocabulary other": (config(vocab_size=99), "vocabulary is 99, but this target's is 64"),
    "hidden_size a text": (config(hidden_size="wide"), f"{LAYERS}wide {NUMBER}"),
    "hidden_size other": (config(hidden_size=48), r"misshapen: \['fc.weight \(32, 64\) instead of .* and 15 more"),
    "hidden_size 0": (config(hidden_size=0), f"{LAYERS}hidden_size is 0, expected 1 to"),
    "hidden_size below 0": (config(hidden_size=-32), f"{LAYERS}hidden_size is -32"),
    "hidden_size huge": (config(hidden_size=2**30), "can be built .*overflowed|misshapen"),
    "hidden_size past all": (config(hidden_size=10**30), "expected 1 to 2147483647"),
    "intermediate_size huge": (config(intermediate_size=2**30), "misshapen"),
    "layers none": (config(num_hidden_layers=0), "num_hidden_layers is 0"),
    "layers below 0": (config(num_hidden_layers=-1), "num_hidden_layers is -1"),
    "layers too many": (config(num_hidden_layers=3, layer_types=None), "Missing: .*layers.2"),
    "layers more than tensors": (config(num_hidden_layers=1000, layer_types=None), "describes 1000 layers, but there"),
    "layers huge": (config(num_hidden_layers=10**9, layer_types=None), "expected at most 1024"),
    "heads none": (config(num_attention_heads=0), "num_attention_heads is 0"),
    "heads uneven": (config(num_key_value_heads=3), "4 heads of 16 do not fit 3 key/value heads"),
    "head_dim odd": (config(head_dim=15), "even rotary dimension|4 heads of 15"),
    "layer_types short": (config(layer_types=["full_attention"]), LAYERS),
    "layer_types unknown": (config(layer_types=["full_attention", "linear"]), LAYERS),
    "layer_types numbers": (config(layer_types=[1, 2]), LAYERS),
    "layer_types nested": (config(layer_types=[["full_attention"]] * 2), LAYERS),
    "layer_types sliding": (
        config(layer_types=["full_attention", "sliding_attention"], use_sliding_window=True, sliding_window=8),
        "sliding-window layers, which this drafter does not have",
    ),
    "activation unknown": (config(hidden_act="import os"), "a drafter that can be built|not describe qwen3"),
    "activation a number": (config(hidden_act=3), "a drafter that can be built|not describe qwen3"),
    "rope a list": (config(rope_parameters=[1]), LAYERS),
    "rope a text": (config(rope_parameters="linear"), LAYERS),
    "rope of unknown type": (config(rope_parameters={"rope_type": "odd"}), "built|not describe qwen3"),
    "rope without its factor": (config(rope_parameters={"rope_type": "linear"}), "built|not describe qwen3"),
    "rope_theta a text": (config(rope_theta="x"), LAYERS),
    "rope_theta below 0": (config(rope_theta=-1.0), "rope_theta -1.0 is out of range"),
    "rms_norm_eps a text": (config(rms_norm_eps="small"), LAYERS),
    "rms_norm_eps below 0": (config(rms_norm_eps=-1.0), "rms_norm_eps -1.0"),
    "rms_norm_eps NaN": (config(rms_norm_eps=float("nan")), "rms_norm_eps nan"),
    "tensors empty": (content("model.safetensors", b""), READ),
    "tensors 4 bytes": (damage(lambda d: d.__delitem__(slice(4, None))), READ),
    "tensors cut in the header": (damage(lambda d: d.__delitem__(slice(900, None))), READ),
    "tensors cut at the end": (damage(lambda d: d.__delitem__(slice(-1, None))), READ),
    "tensors with more at the end": (damage(lambda d: d.extend(b"more")), READ),
    "header length flipped": (damage(lambda d: d.__setitem__(6, 0x7F)), READ),
    "header a list": (content("model.safetensors", header([])), READ),
    "header nested deeply": (content("model.safetensors", header(DEEP)), READ),
    "header no UTF-8": (content("model.safetensors", header(b"\xff" * 99)), READ),
    "a tensor of negative size": (
        content("model.safetensors", header({"a": {"dtype": "F32", "shape": [-4, -4], "data_offsets": [0, 64]}})), READ,
    ),
    "a tensor of huge size": (
        content("model.safetensors", header({"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}})),
        READ,
    ),
    "a tensor whose size overflows": (
        content("model.safetensors", header({"a": {"dtype": "F32", "shape": [2**62, 16], "data_offsets": [0, 64]}})),
        READ,
    ),
    "a tensor of unknown dtype": (
        content("model.safetensors", header({"a": {"dtype": "F33", "shape": [16], "data_offsets": [0, 64]}})), READ,
    ),
    "two tensors in one place": (
        content("model.safetensors", header(
            {n: {"dtype": "F32", "shape": [16], "data_offsets": [0, 64]} for n in "ab"})), READ,
    ),
    "tensors a numpy archive": (content("model.safetensors", b"\x93NUMPY\x01\x00" + bytes(200)), READ),
    "tensors GGUF": (content("model.safetensors", b"GGUF\x03\x00\x00\x00" + bytes(200)), READ),
    "tensors a zip": (content("model.safetensors", b"PK\x03\x04" + bytes(200)), READ),
    "tensors HTML": (content("model.safetensors", b"<!DOCTYPE html><html>404</html>"), READ),
    "tensors a pointer of Git LFS": (
        content("model.safetensors", b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"), READ,
    ),
    "tensors a pickle": (pickled("model.safetensors"), READ),
    "a pickle instead": (pickled("pytorch_model.bin"), "model.safetensors is missing"),
    "a tensor missing": (tensors(norm__weight=None), r"Missing: \['norm.weight'\]; extra: none; misshapen: none"),
    "a tensor extra": (tensors(extra=torch.zeros(2)), r"Missing: none; extra: \['extra'\]"),
    "a tensor misshapen": (tensors(fc__weight=torch.zeros(32, 96)), r"fc.weight \(32, 96\) instead of \(32, 64\)"),
    "a tensor transposed": (tensors(fc__weight=lambda t: t.T.contiguous()), "misshapen"),
    "a tensor without numbers": (tensors(fc__weight=torch.zeros(0)), "misshapen"),
    "whole numbers for weights": (tensors(norm__weight=torch.ones(32, dtype=torch.int8)), "torch.int8.*Quantized"),
    "truth values for weights": (tensors(norm__weight=torch.ones(32, dtype=torch.bool)), "norm.weight torch.bool"),
    "NaN": (tensors(norm__weight=spoil(float("nan"))), "norm.weight of .*hold NaN or infinity: use an earlier"),
    "infinity": (tensors(fc__weight=spoil(float("-inf"))), "fc.weight of .*hold NaN or infinity"),
    "NaN in eight bits": (
        tensors(norm__weight=torch.full((32,), float("nan")).to(torch.float8_e4m3fn)), "hold NaN or infinity",
    ),
    "another maker's variant": (
        tensors(**{"layers.0.self_attn.qkv_proj.weight": torch.zeros(128, 32)}),
        "DFlash variant with .*qkv_proj.weight.*name another",
    ),
}  # fmt: skip

EAGLE3: dict[str, tuple[Change, str]] = {
    "other widths": (config(target_hidden_size=48), "needs embed_tokens.weight of its own"),
    "target_hidden_size below 0": (config(target_hidden_size=-1), "target_hidden_size, which is -1"),
    "draft vocabulary a text": (config(draft_vocab_size="x"), f"x {NUMBER}"),
    "draft vocabulary below 0": (config(draft_vocab_size=-5), "draft_vocab_size, which is -5"),
    "draft vocabulary of another length": (config(draft_vocab_size=50), "misshapen: .*lm_head.weight"),
    "draft vocabulary past all": (config(draft_vocab_size=10**15), "misshapen|can be built"),
    "no tables": (tensors(t2d=None, d2t=None), r"Missing: \['d2t', 't2d'\]"),
    "d2t out of range": (tensors(d2t=spoil(10**6)), "t2d and d2t .*do not name the same tokens"),
    "d2t below 0": (tensors(d2t=spoil(-7)), "t2d and d2t"),
    "d2t twice the same": (tensors(d2t=lambda t: t - torch.arange(len(t))), "t2d and d2t"),
    "d2t of another length": (tensors(d2t=lambda t: t[:-1].clone()), "misshapen: .*d2t"),
    "d2t of fractions": (tensors(d2t=lambda t: t.float()), "other types than a drafter's.*d2t torch.float32"),
    "t2d with another token": (tensors(t2d=lambda t: ~t), "t2d and d2t"),
    "t2d of another length": (tensors(t2d=lambda t: t[:-1].clone()), "misshapen: .*t2d"),
    "taps an object": (config(eagle_config=5), "lacks or garbles"),
    "taps texts": (config(eagle_aux_hidden_state_layer_ids=["a"]), f"a {NUMBER}"),
    "two layers": (config(num_hidden_layers=2), "has 2 layers; an EAGLE-3 drafter has one"),
    "a variant": (config(norm_output=True), "variant with .*norm_output.*name another"),
}

MTP: dict[str, tuple[Change, str]] = {
    "other type": (config(speculators_model_type="eagle3"), "expected an MTPDraftModel: use another"),
    "two heads": (config(num_nextn_predict_layers=2), "has 2 layers; an MTP drafter here has one"),
    "other layers": (config(transformer_layer_config={"model_type": "qwen3_next"}), "qwen3_next layers, expected"),
    "layers a list": (config(transformer_layer_config=[1]), "unknown layers, expected qwen3"),
    "no proposals": (config(speculators_config={"proposal_methods": []}), "lacks or garbles"),
    "proposals a text": (
        config(speculators_config={"proposal_methods": [{"speculative_tokens": "3"}]}), f"3 {NUMBER}",
    ),
    "proposals below 0": (
        config(speculators_config={"proposal_methods": [{"speculative_tokens": -3}]}), "block_size -2 proposes nothing",
    ),
    "depth null": (speculators(num_hidden_layers=None), "lacks or garbles"),
    "depth below 0": (speculators(num_hidden_layers=-4), "number of target layers is -4"),
}  # fmt: skip

ROWS = [(kind, name, *row) for kind, table in (("dflash", DFLASH), ("eagle3_reduced", EAGLE3), ("mtp", MTP))
        for name, row in table.items()]  # fmt: skip


@pytest.mark.parametrize(("kind", "change", "message"), [(k, c, m) for k, _, c, m in ROWS],
                         ids=[f"{k}: {n}" for k, n, _, _ in ROWS])  # fmt: skip
def test_checkpoints(kind: str, change: Change, message: str, copy: Copy, whole_target: Target, tmp_path: Path) -> None:
    place = copy(kind)
    change(place)
    refused(lambda: load_for(whole_target, place), DrafterError, message, tmp_path)


def ckpt(value: Any) -> Change:
    return lambda place: torch.save(value, place / "last.ckpt")


def flipped(place: Path) -> None:
    torch.save({"drafter": {}, "state_dict": {"drafter.norm": torch.ones(64)}}, place / "last.ckpt")
    data = (place / "last.ckpt").read_bytes()
    at = data.index(torch.ones(64).numpy().tobytes())
    (place / "last.ckpt").write_bytes(data[:at] + b"\1" + data[at + 1 :])


CKPT = "is not a checkpoint of a training run, or is damaged: .*Name a run's"
TRAINING: dict[str, tuple[Change, str]] = {
    "empty": (content("last.ckpt", b""), CKPT),
    "text": (content("last.ckpt", b"not a checkpoint"), CKPT),
    "a list": (ckpt([1]), CKPT),
    "nothing of a drafter": (ckpt({"state_dict": {}}), "it holds no drafter"),
    "drafter a list": (ckpt({"drafter": [], "state_dict": {}}), "it holds no drafter"),
    "weights a list": (ckpt({"drafter": {}, "state_dict": []}), CKPT),
    "weights of numbers": (ckpt({"drafter": {}, "state_dict": {"drafter.norm": 1}}), "it holds no drafter"),
    "weights without names": (ckpt({"drafter": {}, "state_dict": {1: torch.ones(1)}}), CKPT),
    "a drafter of no kind": (ckpt({"drafter": {}, "state_dict": {}}), r"holds a \?, expected one of"),
    "a pickle that harms": (lambda p: torch.save({"drafter": Harm(p)}, p / "last.ckpt"), "which is never loaded"),
    "a flipped bit": (flipped, "last.ckpt is damaged: the checksum of .* differs"),
    "another format": (ckpt({"drafter": {}, "state_dict": {}, "draftopd_format": 99}), "has format 99, this version"),
    "a bare pickle that harms": (lambda p: (p / "last.ckpt").write_bytes(pickle.dumps(Harm(p))), CKPT),
}


@pytest.mark.parametrize(("change", "message"), TRAINING.values(), ids=TRAINING)
def test_training_checkpoints(change: Change, message: str, tmp_path: Path) -> None:
    change(tmp_path)
    kind = DrafterError if "expected one of" in message else FileError
    refused(lambda: read_any(str(tmp_path / "last.ckpt")), kind, message, tmp_path)
