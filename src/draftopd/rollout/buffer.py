"""The anchor buffer: recorded sequences and their anchors, on disk.

A refresh writes one *generation*: a directory of safetensors shards and a manifest. It is written under a temporary
name and renamed when complete, so that a generation is complete or absent; only then is the former one removed. Shards
are memory-mapped, so that memory does not grow with the buffer.

``python -m draftopd buffer DIR`` shows the content of a buffer.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from pathlib import Path
from types import TracebackType

from safetensors import SafetensorError
from typing_extensions import Self

from draftopd.decoding.generate import Decoded
from draftopd.errors import BufferError, FileError
from draftopd.io.files import checksum, inside, read_json, replaced, sync, write_json, writing
from draftopd.io.json_text import shown, whole
from draftopd.rollout.shards import Shard, pack

FORMAT = 3
_COLUMNS = ("tokens", "anchors", "accepted", "emitted")


@dataclass(frozen=True)
class Recorded:
    """One recorded sequence: prompt and response tokens, and the blocks of a drafter as in :class:`Decoded`.

    ``step`` is the number of optimizer steps that this drafter had taken; it is set on records read from a buffer.
    """

    tokens: list[int]
    prompt_length: int
    anchors: list[int]
    accepted: list[int]
    emitted: list[int]
    step: int | None = None

    @classmethod
    def of(cls, decoded: Decoded) -> Self:
        """The record of a decoded sequence."""
        return cls(decoded.tokens, len(decoded.prompt), decoded.anchors, decoded.accepted, decoded.emitted)


@dataclass(frozen=True)
class Manifest:
    """The content of one generation and the drafter that made it."""

    generation: int
    step: int
    sequences: int
    tokens: int
    blocks: int
    emitted: int
    shards: dict[str, int]

    @property
    def tau(self) -> float:
        """Micro acceptance length of the rollout; NaN without anchors."""
        return self.emitted / self.blocks if self.blocks else float("nan")


def _directory(root: Path, generation: int) -> Path:
    return root / f"generation-{generation:05d}"


class BufferWriter:
    """A context manager that writes one generation; an error inside the block removes it.

    Args:
        root: the buffer's directory.
        generation: number of the refresh; a generation with the same number is replaced.
        step: optimizer steps taken by the drafter of the rollout.
        shard_size: sequences per shard, and the maximum number in memory.
        rank, barrier: in distributed runs every rank writes its own shards of the generation, and rank 0 completes it.
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
        with writing(f"The anchor buffer in {self.root}"):
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
        columns = {name: [getattr(s, name) for s in self._pending] for name in _COLUMNS}
        columns["prompt_lengths"] = [[s.prompt_length] for s in self._pending]
        path = self.partial / f"shard-{self.rank:03d}-{self._shards:05d}.safetensors"
        with writing(f"The anchor buffer in {self.root}"), replaced(path) as partial:
            partial.write_bytes(pack(columns))
        self._shards += 1
        self._pending.clear()

    def _complete(self) -> None:
        with writing(f"The anchor buffer in {self.root}"):
            paths = sorted(self.partial.glob("shard-*.safetensors"))
            counts = {"sequences": 0, "tokens": 0, "blocks": 0, "emitted": 0}
            for path in paths:
                shard = Shard(path)
                counts["sequences"] += shard.rows("tokens")
                counts["tokens"] += shard.offsets("tokens")[-1]
                counts["blocks"] += shard.offsets("anchors")[-1]
                counts["emitted"] += int(shard.column("emitted").sum())
            manifest = Manifest(self.generation, self.step, shards={p.name: checksum(p) for p in paths}, **counts)
            write_json(self.partial / "manifest.json", asdict(manifest), FORMAT)
            final = _directory(self.root, self.generation)
            shutil.rmtree(final, ignore_errors=True)
            self.partial.rename(final)
            sync(self.root)
            for other in self.root.glob("generation-*"):
                if other != final:
                    shutil.rmtree(other, ignore_errors=True)


class AnchorBuffer:
    """A generation read from disk, one sequence at a time.

    Raises:
        BufferError: if it is absent, damaged or of another format.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = Path(directory)
        self.manifest = read_manifest(self.directory)
        self._rows: list[tuple[Shard, int]] = []
        self.lengths: list[int] = []
        for name, expected in self.manifest.shards.items():
            try:
                path = inside(self.directory, name)
            except FileError as error:
                raise BufferError(f"{error} Delete {self.directory} and roll out again.") from error
            try:
                if checksum(path) != expected:
                    raise BufferError(
                        f"{path} is damaged (its checksum differs): delete {self.directory} and roll out again."
                    )
                shard = Shard(path)
                shard.check(*_COLUMNS, "prompt_lengths")
                ends = shard.offsets("tokens")
            except (OSError, SafetensorError, KeyError, ValueError) as error:
                raise BufferError(
                    f"{path} cannot be read ({error}): delete {self.directory} and roll out again."
                ) from error
            self.lengths += [end - start for start, end in pairwise(ends)]
            self._rows += [(shard, i) for i in range(shard.rows("tokens"))]

    @classmethod
    def latest(cls, root: Path) -> AnchorBuffer:
        """The newest complete generation under ``root``."""
        generations = sorted(Path(root).glob("generation-*"))
        if not generations:
            raise BufferError(
                f"No anchor buffer in {root}: use a run's anchors directory, or roll out first (as the refresh "
                "callback does)."
            )
        return cls(generations[-1])

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Recorded:
        shard, row = self._rows[index]
        lengths = shard.row("prompt_lengths", row)
        columns = {name: shard.row(name, row) for name in _COLUMNS}
        size, blocks = len(columns["tokens"]), len(columns["anchors"])
        fits = len(lengths) == 1 and 0 < lengths[0] <= size and min(columns["tokens"]) >= 0
        within = all(0 < anchor < size for anchor in columns["anchors"])
        if not fits or not within or {len(columns["accepted"]), len(columns["emitted"])} != {blocks}:
            raise BufferError(
                f"Sequence {index} of {self.directory} is not valid: its lengths or anchors do not fit its tokens. "
                f"Delete {self.directory} and roll out again."
            )
        return Recorded(prompt_length=lengths[0], step=self.manifest.step, **columns)


def read_manifest(directory: Path) -> Manifest:
    """The manifest of one generation.

    Raises:
        BufferError: if it is absent, unreadable or of another format.
    """
    try:
        manifest = Manifest(**read_json(directory / "manifest.json", FORMAT))
        counts = [getattr(manifest, field.name) for field in fields(manifest) if field.name != "shards"]
        for count in [*counts, *manifest.shards.values()]:
            if whole(count) < 0:
                raise ValueError(f"{count} where a count belongs.")
    except (FileError, ValueError, TypeError, AttributeError) as error:
        raise BufferError(
            f"{directory} is not a complete anchor buffer generation: {shown(str(error))} Delete it and roll out again."
        ) from error
    return manifest


def describe(directory: Path) -> str:
    """A text with the counts and the first three sequences of a generation, or of the latest one of a buffer.

    Raises:
        BufferError: if there is no generation, or it is damaged.
    """
    is_generation = (directory / "manifest.json").exists()
    buffer = AnchorBuffer(directory) if is_generation else AnchorBuffer.latest(directory)
    m = buffer.manifest
    lines = [
        f"{buffer.directory}: {m.sequences} sequences, {m.tokens} tokens, {m.blocks} blocks, tau {m.tau:.3f}",
        f"generation {m.generation}, rolled out at step {m.step}, {len(m.shards)} shards",
    ]
    for index in range(min(3, len(buffer))):
        record = buffer[index]
        response = len(record.tokens) - record.prompt_length
        lines.append(f"  {index}: prompt {record.prompt_length}, response {response} tokens")
        lines.append(f"     anchors {record.anchors[:12]} accepted {record.accepted[:12]}")
    return "\n".join(lines)
