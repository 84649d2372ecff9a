"""What is fuzzed: valid files or answers, and what reads them."""

from __future__ import annotations

import json
import math
import shutil
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from draftopd.bundled.tokenizer import build_tokenizer
from draftopd.cli.interop import read_any
from draftopd.data.prompts import JsonlPrompts, PromptEncoder
from draftopd.decoding.generate import Decoder
from draftopd.decoding.rules import Rules
from draftopd.drafters.base import Drafter
from draftopd.drafters.checkpoint import save_drafter
from draftopd.drafters.dflash import DFlashDrafter
from draftopd.drafters.eagle3 import Eagle3Drafter
from draftopd.drafters.load import load_for
from draftopd.drafters.mtp import MTPDrafter
from draftopd.evaluation.served import _Server
from draftopd.evaluation.suites import Suite
from draftopd.interop.speculators import read_speculators, write_speculators
from draftopd.interop.target_files import TargetFiles
from draftopd.io.connection import Address
from draftopd.io.files import seal
from draftopd.io.json_text import parse_json
from draftopd.replay.batch import ReplayBatch
from draftopd.replay.packing import Layout
from draftopd.rollout.buffer import AnchorBuffer, BufferWriter, Recorded
from draftopd.rollout.recorded import JsonlTrajectories
from draftopd.rollout.request import Request
from draftopd.rollout.server_answers import AnswerError, from_generate, from_text, from_token_ids
from draftopd.targets.load import load_target, load_tokenizer
from draftopd.targets.target import Target
from draftopd.training.nonfinite import keep_batch, read_batch
from tests.support.models import randomize, small_model

ANSWERS = Path(__file__).parents[1] / "rollout" / "answers"


@dataclass(frozen=True)
class Subject:
    """``read`` takes mutations of the ``seeds``; other errors than DraftOPDError and ``refusals`` are findings."""

    seeds: list[bytes]
    read: Callable[[bytes], object]
    refusals: tuple[type[Exception], ...] = ()


def subjects(root: Path) -> dict[str, Subject]:
    """All of them, with their files under ``root``."""
    model = small_model("qwen3")
    model.save_pretrained(root / "target")
    target, tokenizer = Target(model), build_tokenizer(vocab_size=400, corpus=200)
    request = Request(
        target, None, tokenizer, lambda: [[5, 6]], range(3), Rules(stop=frozenset({3}), max_new_tokens=8), 64, seed=0
    )
    found = {"prompts": _prompts(root, PromptEncoder(tokenizer)), "recorded texts": _texts(root, request)}
    tokenizer.save_pretrained(root / "target")
    found |= {"suites": _suites(root), "kept batch": _batch(root)}
    found |= _targets(root) | _buffers(root) | _drafters(root, target) | _answers(request)
    return found


def _targets(root: Path) -> dict[str, Subject]:
    place = root / "spoiled"
    shutil.copytree(root / "target", place)

    def reader(file: str, load: Callable[[str], object]) -> Subject:
        whole = (place / file).read_bytes()

        def read(data: bytes) -> None:
            (place / file).write_bytes(data)
            try:
                load(str(place))
            finally:
                (place / file).write_bytes(whole)

        return Subject([whole], read)

    loads = {"config.json": load_target, "model.safetensors": load_target, "tokenizer_config.json": load_tokenizer}
    loads |= {"tokenizer.json": load_tokenizer, "generation_config.json": load_target}
    return {f"target's {file}": reader(file, load) for file, load in loads.items()}


def _prompts(root: Path, encoder: PromptEncoder) -> Subject:
    rows: list[Any] = [
        {"prompt": "Mia has 3 apples."},
        {"messages": [{"role": "user", "content": "zwei äöü"}], "id": 3},
    ]

    def read(data: bytes) -> None:
        (root / "prompts.jsonl").write_bytes(data)
        source = JsonlPrompts(str(root / "prompts.jsonl"))
        encoder.take(source, range(min(2, len(source))))

    return Subject([_lines(rows), _lines(rows[:1])], read)


def _texts(root: Path, request: Request) -> Subject:
    decoder = Decoder(request.target, None, Rules(stop=request.rules.stop, max_new_tokens=request.rules.max_new_tokens))
    texts = decoder.decode_batch([[5, 6, i] for i in range(3)])
    rows = [{"prompt_token_ids": text.prompt, "token_ids": text.response, "x": None} for text in texts]

    def read(data: bytes) -> None:
        (root / "texts.jsonl").write_bytes(data)
        for _ in JsonlTrajectories(str(root / "texts.jsonl")).collect(request):
            pass

    return Subject([_lines(rows)], read)


def _suites(root: Path) -> Subject:
    rows = [{"question": "How many?", "turns": ["One.", "Two."], "id": i} for i in range(2)]

    def read(data: bytes) -> None:
        (root / "suite.jsonl").write_bytes(data)
        for options in ({"template": "{question}", "id_field": "id"}, {"turns_field": ["turns"]}):
            Suite("own", "no/such", path=str(root / "suite.jsonl"), **options).examples()

    return Subject([_lines(rows)], read)


def _batch(root: Path) -> Subject:
    one = torch.ones(1, 4, dtype=torch.long)
    batch = ReplayBatch(one, one[:, 0], one[:, 0], one, one.bool(), one[:, 0], Layout(one[:, 0], one[:, 0]))
    path = keep_batch(root, 1, [batch], [math.nan], {"step": 1, "rank": 0, "ranks": 1})
    assert path is not None

    def read(data: bytes) -> None:
        path.write_bytes(data)
        read_batch(path)

    return Subject([path.read_bytes()], read)


def _buffers(root: Path) -> dict[str, Subject]:
    with BufferWriter(root / "anchors", 0, 5) as writer:
        writer.add([Recorded([7, 8, 9, 10, 11, 12], 3, [3, 5], [1, 0], [2, 1]), Recorded([4, 5, 6], 2, [2], [0], [1])])
    (place,) = (root / "anchors").iterdir()
    (shard,) = place.glob("shard-*")
    manifest, rows = (place / "manifest.json").read_bytes(), shard.read_bytes()

    def read(data: bytes, of: Path) -> None:
        (place / "manifest.json").write_bytes(manifest)
        shard.write_bytes(rows)
        of.write_bytes(data)
        if of == shard:  # sealed again, so that its content counts
            (place / "manifest.json").write_bytes(
                _sealed(json.loads(manifest) | {"shards": {shard.name: zlib.crc32(data)}})
            )
        else:
            of.write_bytes(_resealed(data))
        buffer = AnchorBuffer.latest(root / "anchors")
        for index in range(len(buffer)):
            buffer[index]

    return {
        "buffer's manifest": Subject([manifest], lambda data: read(data, place / "manifest.json")),
        "buffer's shard": Subject([rows], lambda data: read(data, shard)),
    }


def _drafters(root: Path, target: Target) -> dict[str, Subject]:
    found = {}
    vocabulary = list(range(0, target.vocab_size, 2))
    drafters: dict[str, Drafter] = {
        "dflash": DFlashDrafter.build(target, None, num_layers=1, block_size=4, mask_token_id=63),
        "eagle3": Eagle3Drafter.build(
            target, None, lambda: [vocabulary], block_size=4, draft_vocab_size=len(vocabulary)
        ),
        "mtp": MTPDrafter.build(target, None, block_size=4),
    }
    files = TargetFiles(str(root / "target"))
    for kind, drafter in drafters.items():
        randomize(drafter, 0)
        save_drafter(drafter, root / kind)
        found |= _checkpoint(root / kind, f"{kind}'s", lambda place: load_for(target, place))
        write_speculators(drafter, root / f"{kind} speculator", files, "x")
        found |= _checkpoint(
            root / f"{kind} speculator", f"{kind} speculator's", lambda place: read_speculators(place, files)
        )
    path = root / "last.ckpt"
    weights = {f"drafter.{name}": tensor for name, tensor in drafters["dflash"].state_dict().items()}
    torch.save({"drafter": drafters["dflash"].config.to_json(), "state_dict": weights}, path)

    def read(data: bytes) -> None:
        path.write_bytes(data)
        read_any(str(path))

    return found | {"training checkpoint": Subject([path.read_bytes()], read)}


def _checkpoint(place: Path, name: str, load: Callable[[Path], object]) -> dict[str, Subject]:
    (place / "checksums.json").unlink()  # as one from elsewhere: its content counts
    whole = {file: (place / file).read_bytes() for file in ("config.json", "model.safetensors")}

    def reader(file: str) -> Callable[[bytes], None]:
        def read(data: bytes) -> None:
            for other, content in whole.items():
                (place / other).write_bytes(data if other == file else content)
            load(place)

        return read

    return {f"{name} {file}": Subject([content], reader(file)) for file, content in whole.items()}


def _answers(request: Request) -> dict[str, Subject]:
    given = {path.stem: path.read_bytes() for path in sorted(ANSWERS.glob("*.json"))}
    prompt = json.loads(given["vllm"])["choices"][0]["prompt_token_ids"]
    readers = {"vllm": from_token_ids, "sglang": from_token_ids, "sglang_generate": from_generate}
    engines = {api: _Server(Address("http://x", "engine"), None, api) for api in ("token_ids", "sglang_generate")}

    def reader(name: str) -> Callable[[bytes], None]:
        def read(data: bytes) -> None:
            try:
                answer = parse_json(data.decode("utf-8", "replace"))
            except ValueError as error:
                raise AnswerError("no JSON") from error  # a server would be asked again, and refused at last
            readers.get(name, from_text)(answer, prompt, request)
            engines["sglang_generate" if name == "sglang_generate" else "token_ids"]._read(answer, 256, 1.0)

        return read

    return {f"answer of {name}": Subject([data], reader(name), (AnswerError,)) for name, data in given.items()}


def _resealed(data: bytes) -> bytes:
    """With a checksum that fits, where it can have one, so that the values count."""
    try:
        return _sealed(parse_json(data))
    except (ValueError, TypeError, RecursionError):
        return data


def _sealed(content: Any) -> bytes:
    bare = {name: value for name, value in dict(content).items() if name != "checksum"}
    return json.dumps(bare | {"checksum": seal(bare)}).encode()


def _lines(rows: list[Any]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
