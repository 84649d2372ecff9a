"""Files that are whole or absent, whatever the disk does, and known again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests.support.faults import every_fault

from draftopd.drafters.checkpoint import read_checkpoint, write_checkpoint
from draftopd.errors import FileError
from draftopd.io.files import inside, locked, read_json, replaced, write_json
from draftopd.rollout.buffer import AnchorBuffer, BufferWriter, Recorded
from draftopd.rollout.store import TrajectoryStore
from draftopd.training import checkpoints


def test_success_takes_the_place(tmp_path: Path) -> None:
    path = tmp_path / "figures.json"
    path.write_text("old")
    with replaced(path) as partial:
        partial.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error, raised", [(OSError, FileError), (KeyboardInterrupt, KeyboardInterrupt)])
def test_failure_leaves_what_was(tmp_path: Path, error: type[BaseException], raised: type[BaseException]) -> None:
    path = tmp_path / "figures.json"
    path.write_text("old")
    with pytest.raises(raised), replaced(path) as partial:
        partial.write_text("half")
        raise error
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_failure_leaves_nothing_where_nothing_was(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), replaced(tmp_path / "figures.json") as partial:
        partial.write_text("half")
        raise RuntimeError
    assert not list(tmp_path.iterdir())


def write_buffer(root: Path, version: int) -> None:
    with BufferWriter(root, version, version, shard_size=2) as writer:
        writer.add([Recorded([version, 1, 2], 1, [1], [0], [1])] * 3)


def read_buffer(root: Path) -> set[int]:
    buffer = AnchorBuffer.latest(root)
    return {buffer.manifest.step, *(buffer[i].tokens[0] for i in range(len(buffer)))}


def write_training(root: Path, version: int) -> None:
    content = {"drafter": {}, "state_dict": {"x": torch.tensor([version])}}
    checkpoints.CheckpointFiles().save_checkpoint(content, root / "last.ckpt")


def read_training(root: Path) -> set[int]:
    for path in root.glob("*.ckpt"):
        checkpoints.read(path)
    newest = checkpoints.newest_whole(root)
    assert newest is not None and newest.name == "last.ckpt"
    return {int(checkpoints.read(newest)["state_dict"]["x"])}


def write_drafter(root: Path, version: int) -> None:
    write_checkpoint(root / "drafter", {"version": version}, {"x": torch.tensor([version])})


def read_drafter(root: Path) -> set[int]:
    # Each of the two files is the old one or the new one.
    raw, tensors = read_checkpoint(root / "drafter")
    return {raw["version"], int(tensors["x"])}


#: What writes and what reads the files of a kind, which new ones replace.
KINDS: dict[str, tuple[Callable[[Path, int], None], Callable[[Path], set[int]]]] = {
    "buffer": (write_buffer, read_buffer),
    "training checkpoint": (write_training, read_training),
    "drafter": (write_drafter, read_drafter),
    "report": (
        lambda root, version: write_json(root / "report.json", {"steps": version}, 1),
        lambda root: {read_json(root / "report.json", 1)["steps"]},
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_full_disk_leaves_the_old_or_the_new(kind: str, tmp_path: Path) -> None:
    write, read = KINDS[kind]
    write(tmp_path, 0)
    last = 0

    def check(version: int, failed: bool) -> None:
        nonlocal last
        found = read(tmp_path)
        if kind == "drafter":
            assert found <= {last, version}
        else:
            assert found in ({last}, {version})
        assert failed or found == {version}
        assert not list(tmp_path.rglob("*.partial"))
        last = version
        write(tmp_path, last)

    assert every_fault(lambda version: write(tmp_path, version), check) >= 4


def test_a_full_disk_keeps_the_texts_before(tmp_path: Path) -> None:
    kept: list[int] = []

    def write(number: int) -> None:
        with TrajectoryStore(tmp_path, {"a": 1}) as store:
            store.add([number], [number, 7])

    def check(number: int, failed: bool) -> None:
        store = TrajectoryStore(tmp_path, {"a": 1})
        assert all(store.get([n]) == [n, 7] for n in kept)
        assert failed or store.get([number]) == [number, 7]
        if store.get([number]):
            kept.append(number)
        assert not list(tmp_path.rglob("*.partial"))

    assert every_fault(write, check) >= 4 and kept


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda text: text.replace('"steps": 12', '"steps": 13'), "is damaged: its checksum differs"),
        (lambda text: text[:-9], "is damaged: it is not JSON"),
        (lambda text: text.replace('"format": 1', '"format": 2'), "has format 2, this version reads 1"),
        (lambda text: '{"steps": 12}', "no format number and checksum"),
        (lambda text: "[1]", "no format number and checksum"),
        (lambda text: None, "cannot be read: No such file"),
    ],
)
def test_json_that_is_not_what_was_written(damage: Callable[[str], str | None], message: str, tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    write_json(path, {"steps": 12, "tau": 1 / 3, "lost": float("nan"), 3: ("a",)}, 1)
    assert read_json(path, 1)["steps"] == 12
    text = damage(path.read_text())
    if text is None:
        path.unlink()
    else:
        path.write_text(text)
    with pytest.raises(FileError, match=f"report.json.*{message}"):
        read_json(path, 1)


def test_json_laid_out_otherwise_is_the_same(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    write_json(path, {"b": [1.5], "a": {"10": 1, "9": 2}}, 1)
    path.write_text(json.dumps(json.loads(path.read_text()), sort_keys=True))
    assert read_json(path, 1) == {"b": [1.5], "a": {"10": 1, "9": 2}}


@pytest.mark.parametrize("name", ["../x", "a/../../x", "/etc/passwd", "", ".", "..", 3, None, "a\0b"])
def test_names_that_lead_out(name: object, tmp_path: Path) -> None:
    with pytest.raises(FileError, match="lies outside|names no file"):
        inside(tmp_path, name)


def test_names_that_stay(tmp_path: Path) -> None:
    assert inside(tmp_path, "a/b.safetensors") == tmp_path / "a/b.safetensors"


def test_a_directory_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(FileError, match="file.*cannot be written"):
        write_json(tmp_path / "file" / "report.json", {}, 1)
    with pytest.raises(FileError, match="cannot be written"), locked(tmp_path / "file" / "run"):
        pass


def test_a_run_holds_its_directory_until_it_dies(tmp_path: Path) -> None:
    script = (
        "import sys, time\nfrom pathlib import Path\nfrom draftopd.io.files import locked\n"
        "with locked(Path(sys.argv[1])):\n    print('held', flush=True)\n    time.sleep(60)\n"
    )
    run = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert run.stdout is not None and run.stdout.readline() == "held\n"
    with (
        pytest.raises(FileError, match=f"{tmp_path} is in use by another run .process {run.pid} on "),
        locked(tmp_path),
    ):
        pass
    run.send_signal(signal.SIGKILL)
    run.wait()
    # What it left half-written goes.
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / ".last.ckpt.7.partial").write_bytes(b"half")
    (tmp_path / ".generation-00000.partial").mkdir()
    with locked(tmp_path):
        assert str(os.getpid()) in (tmp_path / ".lock.owner").read_text()
        assert not list(tmp_path.rglob("*.partial"))
    with locked(tmp_path):
        pass
