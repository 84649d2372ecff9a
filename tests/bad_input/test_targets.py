"""Targets and tokenizers that are damaged, garbled, or would bring code with them."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.support.refusing import Copy, refused
from tests.support.spoiling import DEEP, Change, Harm, config, content, pickled

from draftopd.errors import TargetError
from draftopd.interop.target_files import TargetFiles
from draftopd.targets.load import load_target, load_tokenizer, stop_tokens
from draftopd.targets.target import Target


def index(places: Any) -> Change:
    """Tensors in files that an index names."""

    def change(place: Path) -> None:
        (place / "model.safetensors").rename(place / "part.safetensors")
        (place / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))

    return change


def named(weights: Any, places: Any = None) -> Change:
    """Weights that the config names, with such an index."""

    def change(place: Path) -> None:
        config(transformers_weights=weights)(place)
        if places:
            (place / weights).write_text(json.dumps({"metadata": {}, "weight_map": places}))
        (place / "adapter_model.bin").write_bytes(b"")

    return change


def tensors(edit: Callable[[dict[str, torch.Tensor]], object]) -> Change:
    def change(place: Path) -> None:
        found = load_file(place / "model.safetensors")
        edit(found)
        save_file(found, place / "model.safetensors", metadata={"format": "pt"})

    return change


def coded(place: Path) -> None:
    """A target that brings its own classes, which leave a file where they are imported."""
    config(model_type="own", auto_map={"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"})(place)
    (place / "own.py").write_text(f"import os\nos.mkdir({str(place / 'harmed')!r})\n")


LOAD = "could not be loaded: .*Copy or download it again, or name another"
LAYER = "model.layers.1.self_attn.q_proj.weight"
TARGETS: dict[str, tuple[Change, str]] = {
    "no config": (lambda p: (p / "config.json").unlink(), LOAD),
    "config empty": (content("config.json", b""), LOAD),
    "config cut off": (content("config.json", b'{"model_type": '), LOAD),
    "config a list": (content("config.json", b"[]"), LOAD),
    "config no UTF-8": (content("config.json", b"\xff\xfe"), LOAD),
    "config nested deeply": (content("config.json", DEEP), LOAD),
    "model unknown": (config(model_type="nonesuch"), "nonesuch"),
    "model a list": (config(model_type=["qwen3"]), LOAD),
    "model missing": (config(model_type=...), LOAD),
    "hidden_size a text": (config(hidden_size="wide"), LOAD),
    "hidden_size below 0": (config(hidden_size=-32), "a hidden_size of -32, but its embedding"),
    "hidden_size missing": (config(hidden_size=...), r"a hidden_size of 4096, but its embedding is \[64, 32\]: copy"),
    "hidden_size huge": (config(hidden_size=2**20), "a hidden_size of 1048576, but its embedding"),
    "layers huge": (config(num_hidden_layers=10**5, layer_types=None), "100000 layers: copy or download"),
    "layers too many": (config(num_hidden_layers=600, layer_types=None), "parameters, but its safetensors files hold"),
    "vocab_size huge": (config(vocab_size=2**24), "describes [0-9]+ parameters, but its .*hold [0-9]+ bytes: copy"),
    "intermediate_size huge": (config(intermediate_size=2**22), "parameters, but its safetensors files hold"),
    "layers below 0": (config(num_hidden_layers=-1), LOAD),
    "heads none": (config(num_attention_heads=0), LOAD),
    "vocabulary null": (config(vocab_size=None), LOAD),
    "activation unknown": (config(hidden_act="import os"), LOAD),
    "rope a text": (config(rope_parameters="x"), LOAD),
    "layer_types unknown": (config(layer_types=["odd"] * 4), f"{LOAD}|odd layers"),
    "dtype unknown": (config(dtype="float99"), LOAD),
    "no weights": (lambda p: (p / "model.safetensors").unlink(), LOAD),
    "weights empty": (content("model.safetensors", b""), LOAD),
    "weights cut off": (lambda p: content("model.safetensors", (p / "model.safetensors").read_bytes()[:5000])(p), LOAD),
    "weights a pickle": (pickled("model.safetensors"), LOAD),
    "weights misshapen": (config(intermediate_size=40), LOAD),
    "a tensor missing": (tensors(lambda t: t.pop(LAYER)), f"lacks the tensors .*{LAYER}.*copy or download"),
    "only a pickle": (pickled("pytorch_model.bin"), LOAD),
    "an index of a pickle": (index({LAYER: "pytorch_model.bin"}), "names pytorch_model.bin: only safetensors files"),
    "an index that leads out": (index({LAYER: "../part.safetensors"}), r"names \.\./part.safetensors: only"),
    "an index to the root": (index({LAYER: "/etc/part.safetensors"}), "names /etc/part.safetensors: only"),
    "an index of numbers": (index({LAYER: 5}), "names 5: only"),
    "an index of a list": (index([LAYER]), "index.json cannot be read.*copy or download"),
    "an index of nothing": (index(None), "index.json cannot be read"),
    "an index to a missing file": (index({LAYER: "other.safetensors"}), f"{LOAD}|lacks the tensors"),
    "a pickle that the config names": (named("adapter_model.bin"), "config.json of .* names adapter_model.bin: only"),
    "weights elsewhere": (named("../model.safetensors"), r"config.json of .* names \.\./model.safetensors: only"),
    "weights of a list": (named(["model.safetensors"]), "config.json of .* names .*: only safetensors files beside it"),
    "a named index that leads out": (
        named("own.safetensors.index.json", {LAYER: "../part.safetensors"}), r"index of .* names \.\./part.safetensors",
    ),
    "code of its own": (coded, LOAD),
}  # fmt: skip


@pytest.mark.parametrize(("change", "message"), TARGETS.values(), ids=TARGETS)
def test_targets(change: Change, message: str, copy: Copy, tmp_path: Path) -> None:
    place = copy("target")
    change(place)
    refused(lambda: load_target(str(place), dtype="float32"), TargetError, message, tmp_path)


def test_a_config_names_no_kernel_to_download(copy: Copy) -> None:
    """transformers would fetch and run it; how attention is computed is for the user to say."""
    place = copy("target")
    config(attn_implementation="kernels-community/x", _attn_implementation="kernels-community/x")(place)
    assert load_target(str(place), dtype="float32").model.config._attn_implementation == "sdpa"


TOKENIZERS: dict[str, tuple[Change, str]] = {
    "no files": (lambda p: [f.unlink() for f in p.glob("token*")], "no tokenizer.json, or an empty one: copy"),
    "empty": (content("tokenizer.json", b""), LOAD),
    "cut off": (lambda p: content("tokenizer.json", (p / "tokenizer.json").read_bytes()[:900])(p), LOAD),
    "a list": (content("tokenizer.json", b"[]"), LOAD),
    "another kind": (config("tokenizer.json", model={"type": "Odd"}), LOAD),
    "a vocabulary of texts": (config("tokenizer.json", model={"type": "BPE", "vocab": {"a": "b"}, "merges": []}), LOAD),
    "ids below 0": (config("tokenizer.json", model={"type": "BPE", "vocab": {"a": -1}, "merges": []}), LOAD),
    "settings empty": (content("tokenizer_config.json", b""), LOAD),
    "settings a list": (content("tokenizer_config.json", b"[]"), LOAD),
    "settings nested deeply": (content("tokenizer_config.json", DEEP), LOAD),
}  # fmt: skip


@pytest.mark.parametrize(("change", "message"), TOKENIZERS.values(), ids=TOKENIZERS)
def test_tokenizers(change: Change, message: str, copy: Copy, tmp_path: Path) -> None:
    place = copy("target")
    change(place)
    refused(lambda: load_tokenizer(str(place)), TargetError, message, tmp_path)


def test_a_tokenizers_own_code_is_not_run(copy: Copy) -> None:
    place = copy("target")
    coded(place)
    config("tokenizer_config.json", tokenizer_class="Own", auto_map={"AutoTokenizer": ["own.Own", None]})(place)
    with contextlib.suppress(TargetError):
        load_tokenizer(str(place))
    assert not (place / "harmed").exists()


@pytest.mark.parametrize("eos", ["x", [1, "x"], 2.5, {"a": 1}, [None]])
def test_stop_tokens(
    eos: Any, whole_target: Target, tokenizer: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(whole_target.model.generation_config, "eos_token_id", eos)
    refused(lambda: stop_tokens(whole_target, tokenizer), TargetError, "eos_token_id .*write token ids", tmp_path)


FILES: dict[str, tuple[Change, str]] = {
    "config nested deeply": (content("config.json", DEEP), "nests too deeply.*Copy or download"),
    "config a number": (content("config.json", b"3"), "not a JSON object: name a directory"),
    "config a directory": (lambda p: ((p / "config.json").unlink(), (p / "config.json").mkdir()), "has no config.json"),
    "text_config a list": (config(text_config=[1]), "does not say how large the target is"),
    "layers a text": (config(num_hidden_layers="four"), "four where a whole number belongs.*copy or download"),
    "layers missing": (config(num_hidden_layers=...), "has no 'num_hidden_layers': name the target"),
    "weights a pickle": (pickled("model.safetensors"), "cannot be read: .*Copy or download"),
    "an index that leads out": (index({"model.embed_tokens.weight": "../x.safetensors"}), "only safetensors files"),
    "an index of a list": (index([1]), "cannot be read"),
    "an index to a missing file": (index({"model.embed_tokens.weight": "x.safetensors"}), "has no x.safetensors: name"),
    "no embedding": (tensors(lambda t: t.pop("model.embed_tokens.weight")), "has 0 tensors named .embed_tokens.weight"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "message"), FILES.values(), ids=FILES)
def test_target_files(change: Change, message: str, copy: Copy, tmp_path: Path) -> None:
    place = copy("target")
    change(place)
    refused(lambda: TargetFiles(str(place)).embedding(), TargetError, message, tmp_path)


def test_the_pickles_here_would_harm(tmp_path: Path) -> None:
    import pickle

    pickle.loads(pickle.dumps(Harm(tmp_path)))
    assert (tmp_path / "harmed").is_dir()
