"""The anchor buffer is whole or absent, and says what is wrong with a damaged one."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from draftopd.errors import BufferError
from draftopd.io.files import checksum, read_json, write_json
from draftopd.rollout.buffer import FORMAT, AnchorBuffer, BufferWriter, Recorded, describe


def records(count: int, offset: int = 0) -> list[Recorded]:
    return [
        Recorded(
            tokens=list(range(offset, offset + 6 + i)),
            prompt_length=3,
            anchors=[3, 5][: 1 + i % 2],
            accepted=[1, 0][: 1 + i % 2],
            emitted=[2, 1][: 1 + i % 2],
            step=5,
        )
        for i in range(count)
    ]


def write(root: Path, generation: int = 0, count: int = 7, step: int = 5, shard_size: int = 3) -> AnchorBuffer:
    with BufferWriter(root, generation, step, shard_size) as writer:
        writer.add(records(count))
    return AnchorBuffer.latest(root)


def test_round_trip_over_several_shards(tmp_path: Path) -> None:
    buffer = write(tmp_path)
    assert [buffer[i] for i in range(len(buffer))] == records(7)
    assert buffer.lengths == [len(r.tokens) for r in records(7)]
    manifest = buffer.manifest
    assert len(manifest.shards) == 3 and (manifest.generation, manifest.step, manifest.sequences) == (0, 5, 7)
    emitted = [e for r in records(7) for e in r.emitted]
    assert manifest.tau == sum(emitted) / len(emitted)


def test_memory_is_bounded_by_the_shard(tmp_path: Path) -> None:
    with BufferWriter(tmp_path, 0, 0, shard_size=2) as writer:
        for record in records(9):
            writer.add([record])
            assert len(writer._pending) < 2


def test_a_new_generation_takes_the_place_of_the_old(tmp_path: Path) -> None:
    write(tmp_path, generation=0)
    assert write(tmp_path, generation=1, count=2).manifest.generation == 1
    assert [p.name for p in tmp_path.iterdir()] == ["generation-00001"]


def test_an_error_leaves_the_former_generation_and_nothing_else(tmp_path: Path) -> None:
    write(tmp_path)
    with pytest.raises(RuntimeError), BufferWriter(tmp_path, 1, 9, shard_size=1) as writer:
        writer.add(records(4))
        raise RuntimeError
    assert [p.name for p in tmp_path.iterdir()] == ["generation-00000"]
    assert len(AnchorBuffer.latest(tmp_path)) == 7


def test_what_a_killed_writer_left_is_swept_away(tmp_path: Path) -> None:
    (tmp_path / ".generation-00000.partial").mkdir(parents=True)
    (tmp_path / ".generation-00000.partial" / "shard-000-00000.safetensors").write_bytes(b"half")
    assert len(write(tmp_path)) == 7
    assert [p.name for p in tmp_path.iterdir()] == ["generation-00000"]


def test_full_disk_for_real(tmp_path: Path) -> None:
    """A file-size limit of the system cuts the shard off in the middle."""
    write(tmp_path)
    script = (
        "import resource, signal, sys\n"
        "from pathlib import Path\n"
        "from draftopd.errors import FileError\n"
        "from draftopd.rollout.buffer import BufferWriter, Recorded\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "try:\n"
        f"    with BufferWriter(Path({str(tmp_path)!r}), 1, 0) as writer:\n"
        "        writer.add([Recorded(list(range(5000)), 3, [3], [0], [1])])\n"
        "except FileError as error:\n"
        "    print(error)\n"
    )
    assert resource.RLIMIT_FSIZE is not None
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)
    assert "cannot be written" in done.stdout, done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["generation-00000"]


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_damaged_shards_are_named(tmp_path: Path, damage: str) -> None:
    directory = write(tmp_path).directory
    shard = sorted(directory.glob("shard-*"))[1]
    content = bytearray(shard.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 1
        shard.write_bytes(content)
    elif damage == "truncate":
        shard.write_bytes(content[:-7])
    else:
        shard.unlink()
    with pytest.raises(BufferError, match=f"{shard.name}.*roll out again"):
        AnchorBuffer(directory)


@pytest.mark.parametrize(
    "content, message",
    [
        ("{", "not a complete anchor buffer.*not JSON"),
        ("[1]", "not a complete anchor buffer.*no format number"),
        ('{"generation": 0}', "not a complete anchor buffer.*no format number"),
    ],
)
def test_broken_manifests(tmp_path: Path, content: str, message: str) -> None:
    directory = write(tmp_path).directory
    (directory / "manifest.json").write_text(content)
    with pytest.raises(BufferError, match=message):
        AnchorBuffer(directory)


@pytest.mark.parametrize(
    "old, new, message",
    [
        ('"format": 3', '"format": 99', "format 99, this version reads 3"),
        ('"sequences": 7', '"sequences": 3', "manifest.json is damaged: its checksum differs"),
    ],
)
def test_another_format_and_flipped_bits(old: str, new: str, message: str, tmp_path: Path) -> None:
    directory = write(tmp_path).directory
    manifest = directory / "manifest.json"
    assert old in manifest.read_text()
    manifest.write_text(manifest.read_text().replace(old, new))
    with pytest.raises(BufferError, match=message):
        AnchorBuffer(directory)


@pytest.mark.parametrize("shards", [{"../../x.safetensors": 1}, {"/etc/passwd": 1}, [], "x", None])
def test_a_manifest_that_names_other_places(shards: object, tmp_path: Path) -> None:
    """Its checksum is right: somebody made it so."""
    directory = write(tmp_path).directory
    content = read_json(directory / "manifest.json", FORMAT) | {"shards": shards}
    write_json(directory / "manifest.json", content, FORMAT)
    with pytest.raises(BufferError, match="lies outside of it|not a complete anchor buffer"):
        AnchorBuffer(directory)


def test_shards_of_another_layout(tmp_path: Path) -> None:
    directory = write(tmp_path, count=2).directory
    (shard,) = directory.glob("shard-*")
    save_file(load_file(shard), shard, metadata={"draftopd_rows": "9"})
    content = read_json(directory / "manifest.json", FORMAT) | {"shards": {shard.name: checksum(shard)}}
    write_json(directory / "manifest.json", content, FORMAT)
    with pytest.raises(BufferError, match="format 9, this version reads 1"):
        AnchorBuffer(directory)


def test_no_buffer_at_all(tmp_path: Path) -> None:
    with pytest.raises(BufferError, match="roll out first"):
        AnchorBuffer.latest(tmp_path)


def test_ranks_write_one_generation_together(tmp_path: Path) -> None:
    second: list[BufferWriter] = []

    def other_rank_works() -> None:
        if not second:
            second.append(BufferWriter(tmp_path, 0, 0, rank=1))
        elif second[0]._pending == [] and second[0]._shards == 0:
            second[0].add(records(2, offset=50))
            second[0]._flush()

    with BufferWriter(tmp_path, 0, 0, barrier=other_rank_works) as writer:
        writer.add(records(3))
    buffer = AnchorBuffer.latest(tmp_path)
    assert sorted(buffer[i].tokens[0] for i in range(len(buffer))) == [0, 0, 0, 50, 50]


def test_inspection(tmp_path: Path) -> None:
    write(tmp_path)
    said = describe(tmp_path)
    assert "7 sequences" in said and "rolled out at step 5" in said
    with pytest.raises(BufferError, match="No anchor buffer"):
        describe(tmp_path / "nothing")
