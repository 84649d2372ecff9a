"""Anchor buffers and stores of texts that do not add up, though their checksums do."""

from __future__ import annotations

import json
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.support.refusing import refused, snapshot
from torch import Tensor

from draftopd.errors import BufferError
from draftopd.io.files import seal
from draftopd.rollout.buffer import AnchorBuffer, BufferWriter, Recorded
from draftopd.rollout.store import TrajectoryStore

NAME = "shard-000-00000.safetensors"
Change = Callable[[Path], object]


@pytest.fixture
def generation(tmp_path: Path) -> Path:
    with BufferWriter(tmp_path, 0, 5) as writer:
        writer.add([Recorded([7, 8, 9, 10, 11, 12], 3, [3, 5], [1, 0], [2, 1]), Recorded([4, 5, 6], 2, [2], [0], [1])])
    return tmp_path / "generation-00000"


def manifest(**changes: Any) -> Change:
    """Other values, with a checksum that fits."""

    def change(place: Path) -> None:
        raw = json.loads((place / "manifest.json").read_text()) | changes
        raw = {k: v for k, v in raw.items() if v is not ... and k != "checksum"}
        (place / "manifest.json").write_text(json.dumps(raw | {"checksum": seal(raw)}))

    return change


def content(data: bytes) -> Change:
    return lambda place: (place / "manifest.json").write_bytes(data)


def damage(edit: Callable[[bytearray], object]) -> Change:
    def change(place: Path) -> None:
        data = bytearray((place / NAME).read_bytes())
        edit(data)
        (place / NAME).write_bytes(data)

    return change


def resealed(edit: Callable[[dict[str, Tensor]], object]) -> Change:
    """Other tensors, with a checksum that fits."""

    def change(place: Path) -> None:
        tensors = load_file(place / NAME)
        edit(tensors)
        save_file(tensors, place / NAME)
        manifest(shards={NAME: zlib.crc32((place / NAME).read_bytes())})(place)

    return change


def put(name: str, *values: int, dtype: torch.dtype = torch.int32) -> Change:
    return resealed(lambda tensors: tensors.update({name: torch.tensor(values, dtype=dtype)}))


def offsets(name: str, *values: int) -> Change:
    return put(f"{name}_offsets", *values, dtype=torch.int64)


GENERATION = "is not a complete anchor buffer generation: .*Delete it and roll out again"
BROKEN = f"{NAME} cannot be read .*delete .*and roll out again"
SEQUENCE = "Sequence [01] of .*do not fit its tokens.*roll out again"
ROWS: dict[str, tuple[Change, str]] = {
    "no manifest": (lambda p: (p / "manifest.json").unlink(), GENERATION),
    "manifest empty": (content(b""), GENERATION),
    "manifest cut off": (content(b'{"generation": 0,'), GENERATION),
    "manifest no UTF-8": (content(b"\xff\xfe"), GENERATION),
    "manifest a list": (content(b"[1]"), GENERATION),
    "manifest null": (content(b"null"), GENERATION),
    "manifest nested deeply": (content(b"[" * 9999), "nests too deeply"),
    "manifest without fields": (content(b"{}"), GENERATION),
    "manifest with more": (manifest(more=1), GENERATION),
    "step missing": (manifest(step=...), GENERATION),
    "step a text": (manifest(step="5"), "5 where a whole number belongs"),
    "tokens below 0": (manifest(tokens=-1), "-1 where a count belongs"),
    "blocks infinite": (manifest(blocks=float("inf")), "inf where a whole number belongs"),
    "step a nested list": (content(b'{"generation": 0, "step": ' + b"[" * 900 + b"]" * 900 + b"}"), GENERATION),
    "another format": (manifest(format=99), "format 99, this version reads 3.*roll out again"),
    "a value changed": (content(b'{"format": 3, "checksum": 0, "step": 5}'), "is damaged: its checksum differs"),
    "a shard outside": (manifest(shards={f"../{NAME}": 1}), "lies outside of it. Delete .* and roll out again"),
    "a shard without a name": (manifest(shards={"": 1}), "names no file"),
    "shards a list": (manifest(shards=[NAME]), GENERATION),
    "shards null": (manifest(shards=None), GENERATION),
    "checksum a text": (manifest(shards={NAME: "0"}), "0 where a whole number belongs"),
    "checksum other": (manifest(shards={NAME: 0}), "is damaged .its checksum differs.: delete"),
    "a shard missing": (lambda p: (p / NAME).unlink(), BROKEN),
    "another shard": (manifest(shards={"shard-000-00009.safetensors": 1}), "shard-000-00009.*cannot be read"),
    "shard flipped": (damage(lambda d: d.__setitem__(-1, d[-1] ^ 1)), "checksum differs"),
    "shard cut off": (damage(lambda d: d.__delitem__(slice(-7, None))), "checksum differs"),
    "shard empty": (damage(lambda d: d.clear()), "checksum differs"),
    "a column missing": (resealed(lambda t: t.pop("anchors")), BROKEN),
    "offsets missing": (resealed(lambda t: t.pop("tokens_offsets")), BROKEN),
    "offsets past the end": (offsets("tokens", 0, 6, 99), "the rows of tokens do not add up"),
    "offsets short of the end": (offsets("tokens", 0, 6, 8), "the rows of tokens do not add up"),
    "offsets backwards": (offsets("tokens", 0, 12, 9), "the rows of tokens do not add up"),
    "offsets below 0": (offsets("anchors", -1, 2, 3), "the rows of anchors do not add up"),
    "offsets empty": (offsets("emitted"), "the rows of emitted do not add up"),
    "offsets in 32 bits": (put("tokens_offsets", 0, 6, 9), "the rows of tokens do not add up"),
    "a row more": (offsets("accepted", 0, 2, 3, 3), "accepted has other rows than tokens"),
    "tokens fractions": (resealed(lambda t: t.update(tokens=t["tokens"].float())), "the rows of tokens do not add up"),
    "tokens in two dimensions": (resealed(lambda t: t.update(tokens=t["tokens"].view(3, 3))), "do not add up"),
    "a token below 0": (put("tokens", -7, 8, 9, 10, 11, 12, 4, 5, 6), SEQUENCE),
    "an empty sequence": (offsets("tokens", 0, 9, 9), SEQUENCE),
    "a prompt longer than the text": (put("prompt_lengths", 7, 2), SEQUENCE),
    "a prompt of no tokens": (put("prompt_lengths", 0, 2), SEQUENCE),
    "two prompts for one text": (offsets("prompt_lengths", 0, 2, 2), SEQUENCE),
    "an anchor past the end": (put("anchors", 3, 6, 2), SEQUENCE),
    "an anchor below 0": (put("anchors", -3, 5, 2), SEQUENCE),
    "a block without accepted length": (offsets("accepted", 0, 1, 3), SEQUENCE),
}  # fmt: skip


@pytest.mark.parametrize(("change", "message"), ROWS.values(), ids=ROWS)
def test_buffers(change: Change, message: str, generation: Path) -> None:
    change(generation)

    def read() -> list[Recorded]:
        buffer = AnchorBuffer.latest(generation.parent)
        return [buffer[i] for i in range(len(buffer))]

    refused(read, BufferError, message, generation.parent)


def test_no_buffer(tmp_path: Path) -> None:
    refused(lambda: AnchorBuffer.latest(tmp_path), BufferError, "No anchor buffer in .*roll out first", tmp_path)
    (tmp_path / "generation-00000").write_text("")
    refused(lambda: AnchorBuffer.latest(tmp_path), BufferError, GENERATION, tmp_path)


def test_texts_that_do_not_add_up_are_asked_for_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Nothing is refused here: the store leaves the shard alone, says so, and has no such text."""
    edits: list[Callable[[dict[str, Tensor]], object]] = [
        lambda t: t.pop("responses"),
        lambda t: t.update(responses_offsets=torch.tensor([0, 99])),
        lambda t: t.update(prompts_offsets=torch.tensor([-5, 2])),
        lambda t: t.update(responses_offsets=torch.tensor([0, 1, 2])),
    ]
    for number, edit in enumerate(edits):
        root = tmp_path / str(number)
        with TrajectoryStore(root, {}) as store:
            store.add([1, 2], [3, 4])
        (shard,) = root.glob("*/texts-*")
        tensors = load_file(shard)
        edit(tensors)
        save_file(tensors, shard)
        sealed = shard.with_name(f"texts-0-{zlib.crc32(shard.read_bytes()):08x}.safetensors")
        shutil.move(shard, sealed)
        before = snapshot(root)
        assert TrajectoryStore(root, {}).get([1, 2]) is None
        assert f"{sealed} is damaged" in caplog.text and "produced again" in caplog.text
        assert snapshot(root) == before
