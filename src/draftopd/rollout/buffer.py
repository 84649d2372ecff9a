"""The anchor buffer: recorded sequences and their anchors, on disk.

A refresh writes one *generation*: a directory of safetensors shards and a manifest. It is written
under a temporary name and renamed when complete, so a generation is whole or absent; the former one
is removed only then. Reading maps one shard at a time, so memory does not grow with the buffer.

``python -m draftopd.rollout.buffer DIR`` shows what a buffer holds.
"""

from __future__ import annotations

import json
import shutil
import sys
import zlib
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from types import TracebackType

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from draftopd.errors import BufferError
from draftopd.files import replaced

FORMAT = 1
_RAGGED = ("tokens", "anchors", "accepted", "emitted")


@dataclass(frozen=True)
class Recorded:
    """One recorded sequence: prompt and response tokens, and where blocks began."""

    tokens: list[int]
    prompt_length: int
    anchors: list[int]
    accepted: list[int]
    emitted: list[int]


@dataclass(frozen=True)
class Manifest:
    """What one generation holds and which drafter made it."""

    generation: int
    step: int
    sequences: int
    tokens: int
    blocks: int
    emitted: int
    shards: dict[str, int]
    format: int = FORMAT

    @property
    def tau(self) -> float:
        """Micro acceptance length of the rollout that made it; NaN without anchors."""
        return self.emitted / self.blocks if self.blocks else float("nan")


def _directory(root: Path, generation: int) -> Path:
    return root / f"generation-{generation:05d}"


class BufferWriter:
    """Write one generation, in a ``with`` block; leaving it by an error leaves nothing behind.

    Args:
        root: the buffer's directory.
        generation: number of the refresh; replaces an equal one.
        step: optimizer steps taken by the drafter that rolled out.
        shard_size: sequences a shard, the most that are held in memory.
        rank, barrier: in distributed runs every rank writes its own shards of one generation, and
            rank 0 completes it.
    """

    def __init__(
        self,
        root: Path,
        generation: int,
        step: int,
        shard_size: int = 1024,
        rank: int = 0,
        barrier: Callable[[], None] = lambda: None,
    ) -> None:
        self.root, self.generation, self.step = Path(root), generation, step
        self.shard_size, self.rank, self.barrier = shard_size, rank, barrier
        self.partial = self.root / f".generation-{generation:05d}.partial"
        self._pending: list[Recorded] = []
        self._shards = 0

    def __enter__(self) -> BufferWriter:
        with _disk(self.root):
            if self.rank == 0:
                shutil.rmtree(self.partial, ignore_errors=True)
                self.partial.mkdir(parents=True)
        self.barrier()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self._flush()
                self.barrier()
                if self.rank == 0:
                    self._complete()
                self.barrier()
        finally:
            if self.rank == 0:
                shutil.rmtree(self.partial, ignore_errors=True)

    def add(self, sequences: Iterable[Recorded]) -> None:
        for sequence in sequences:
            self._pending.append(sequence)
            if len(self._pending) >= self.shard_size:
                self._flush()

    def _flush(self) -> None:
        if not self._pending:
            return
        tensors = {"prompt_lengths": torch.tensor([s.prompt_length for s in self._pending], dtype=torch.int32)}
        for name in _RAGGED:
            rows = [getattr(s, name) for s in self._pending]
            tensors[name] = torch.tensor([x for row in rows for x in row], dtype=torch.int32)
            ends = torch.tensor([0, *map(len, rows)], dtype=torch.int64).cumsum(0)
            tensors[f"{name}_offsets"] = ends
        path = self.partial / f"shard-{self.rank:03d}-{self._shards:05d}.safetensors"
        with _disk(self.root), replaced(path) as partial:
            save_file(tensors, partial)
        self._shards += 1
        self._pending.clear()

    def _complete(self) -> None:
        with _disk(self.root):
            paths = sorted(self.partial.glob("shard-*.safetensors"))
            counts = {"sequences": 0, "tokens": 0, "blocks": 0, "emitted": 0}
            for path in paths:
                with safe_open(path, framework="pt") as shard:
                    emitted = shard.get_tensor("emitted")
                    counts["sequences"] += len(shard.get_tensor("prompt_lengths"))
                    counts["tokens"] += len(shard.get_tensor("tokens"))
                    counts["blocks"] += len(emitted)
                    counts["emitted"] += int(emitted.sum())
            manifest = Manifest(self.generation, self.step, shards={p.name: _checksum(p) for p in paths}, **counts)
            with replaced(self.partial / "manifest.json") as partial:
                partial.write_text(json.dumps(asdict(manifest), indent=2) + "\n", encoding="utf-8")
            final = _directory(self.root, self.generation)
            shutil.rmtree(final, ignore_errors=True)
            self.partial.rename(final)
            for other in self.root.glob("generation-*"):
                if other != final:
                    shutil.rmtree(other, ignore_errors=True)


class AnchorBuffer:
    """Read a generation, sequence by sequence.

    Raises:
        BufferError: if it is absent, of another format, or damaged.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = Path(directory)
        self.manifest = read_manifest(self.directory)
        self._places: list[tuple[str, int]] = []
        self.lengths: list[int] = []
        for name, checksum in self.manifest.shards.items():
            path = self.directory / name
            try:
                if _checksum(path) != checksum:
                    raise BufferError(
                        f"{path} is damaged (its checksum differs): delete {self.directory} and roll out again."
                    )
                ends = _shard(path)["tokens_offsets"]
            except (OSError, SafetensorError, KeyError) as error:
                raise BufferError(
                    f"{path} cannot be read ({error}): delete {self.directory} and roll out again."
                ) from error
            self.lengths += (ends[1:] - ends[:-1]).tolist()
            self._places += [(name, i) for i in range(len(ends) - 1)]

    @classmethod
    def latest(cls, root: Path) -> AnchorBuffer:
        """The newest complete generation under ``root``."""
        found = sorted(Path(root).glob("generation-*"))
        if not found:
            raise BufferError(f"No anchor buffer in {root}: run a rollout first (the refresh callback does).")
        return cls(found[-1])

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> Recorded:
        name, row = self._places[index]
        shard = _shard(self.directory / name)
        ragged = {}
        for key in _RAGGED:
            start, end = shard[f"{key}_offsets"][row : row + 2].tolist()
            ragged[key] = shard[key][start:end].tolist()
        return Recorded(prompt_length=int(shard["prompt_lengths"][row]), **ragged)


def read_manifest(directory: Path) -> Manifest:
    """The manifest of one generation.

    Raises:
        BufferError: if it is absent, unreadable or of another format.
    """
    try:
        raw = json.loads((directory / "manifest.json").read_text(encoding="utf-8"))
        manifest = Manifest(**raw)
    except (OSError, ValueError, TypeError) as error:
        raise BufferError(
            f"{directory} is no anchor buffer generation: {error}. Delete it and roll out again."
        ) from error
    if manifest.format != FORMAT:
        raise BufferError(
            f"{directory} has buffer format {manifest.format}, this version reads {FORMAT}: roll out again."
        )
    return manifest


@lru_cache(maxsize=2)
def _shard(path: Path) -> dict[str, torch.Tensor]:
    with safe_open(path, framework="pt") as shard:
        return {name: shard.get_tensor(name) for name in shard.keys()}  # noqa: SIM118


def _checksum(path: Path) -> int:
    value = 0
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            value = zlib.crc32(block, value)
    return value


class _disk:
    """Turn the disk's errors into one clear message."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, (OSError, SafetensorError)):
            raise BufferError(
                f"The anchor buffer in {self.root} cannot be written: {error}. Free space or choose another "
                "directory (hydra.run.dir=DIR); the former buffer and the checkpoints are untouched."
            ) from error


def _describe(root: Path) -> None:
    buffer = AnchorBuffer(root) if (root / "manifest.json").exists() else AnchorBuffer.latest(root)
    m = buffer.manifest
    print(f"{buffer.directory}: {m.sequences} sequences, {m.tokens} tokens, {m.blocks} blocks, tau {m.tau:.3f}")
    print(f"generation {m.generation}, rolled out at step {m.step}, {len(m.shards)} shards")
    for index in range(min(3, len(buffer))):
        record = buffer[index]
        print(f"  {index}: prompt {record.prompt_length}, response {len(record.tokens) - record.prompt_length} tokens")
        print(f"     anchors {record.anchors[:12]} accepted {record.accepted[:12]}")


if __name__ == "__main__":
    try:
        _describe(Path(sys.argv[1]))
    except (IndexError, BufferError) as error:
        sys.exit(str(error) if isinstance(error, BufferError) else "usage: python -m draftopd.rollout.buffer DIR")
