"""A store of texts by prompt, shared by all refreshes and runs that name its directory.

Each set of settings (target, temperature, limits) has its own subdirectory. The checksum of a shard is part of its
name. A damaged shard is ignored, and its texts are produced again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
import uuid
import zlib
from pathlib import Path
from types import TracebackType
from typing import Any

from safetensors import SafetensorError

from draftopd.io.files import checksum, replaced, write_json, writing
from draftopd.rollout.shards import FORMAT, Shard, pack

log = logging.getLogger(__name__)

#: A shard is written after this many texts or seconds, which bounds the loss of an interruption.
SHARD_TEXTS = 512
SHARD_SECONDS = 20.0


class TrajectoryStore:
    """The texts of one set of settings; a context manager that writes pending texts at the end of its block.

    Args:
        root: the store's directory.
        settings: everything but the prompt that texts depend on.

    Raises:
        FileError: if the directory cannot be written.
    """

    def __init__(self, root: Path, settings: dict[str, Any]) -> None:
        written = json.dumps(settings, sort_keys=True, default=str)
        self.directory = Path(root) / hashlib.blake2b(written.encode(), digest_size=8).hexdigest()
        self._rows: dict[bytes, tuple[Path, int]] = {}
        self._shards: dict[Path, Shard] = {}
        self._pending: dict[bytes, tuple[list[int], list[int]]] = {}
        self._written_at = time.monotonic()
        with writing(f"The trajectory store in {self.directory}"):
            self.directory.mkdir(parents=True, exist_ok=True)
            if not (self.directory / "settings.json").exists():
                write_json(self.directory / "settings.json", settings, int(FORMAT))
            for path in sorted(self.directory.glob("texts-*.safetensors")):
                self._index(path)

    def __len__(self) -> int:
        return len(self._rows) + len(self._pending)

    def __enter__(self) -> TrajectoryStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.flush()  # after an error too, because every text is complete

    def get(self, prompt: list[int]) -> list[int] | None:
        """The response to a prompt, or None if there is none yet."""
        key = _key(prompt)
        if key in self._pending:
            return self._pending[key][1]
        if key not in self._rows:
            return None
        path, index = self._rows[key]
        return self._shards[path].row("responses", index)

    def add(self, prompt: list[int], response: list[int]) -> None:
        """Add a text, which is written with the next shard."""
        self._pending[_key(prompt)] = (prompt, response)
        late = time.monotonic() - self._written_at > SHARD_SECONDS
        if late or len(self._pending) >= SHARD_TEXTS:
            self.flush()

    def flush(self) -> None:
        """Write the pending texts as one shard."""
        self._written_at = time.monotonic()
        if not self._pending:
            return
        prompts, responses = zip(*self._pending.values(), strict=True)
        with writing(f"The trajectory store in {self.directory}"):
            content = pack({"prompts": prompts, "responses": responses})
            path = self.directory / f"texts-{uuid.uuid4().hex[:12]}-{zlib.crc32(content):08x}.safetensors"
            with replaced(path) as partial:
                partial.write_bytes(content)
            self._shards[path] = Shard(path)
        self._rows |= {key: (path, index) for index, key in enumerate(self._pending)}
        self._pending.clear()

    def _index(self, path: Path) -> None:
        try:
            if path.stem.rsplit("-", 1)[-1] != f"{checksum(path):08x}":
                raise ValueError("its checksum differs")
            shard = Shard(path)
            shard.check("prompts", "responses")
            keys = [_key(shard.row("prompts", index)) for index in range(shard.rows("prompts"))]
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            log.warning("%s is damaged (%s): its texts are produced again.", path, error)
            return
        self._shards[path] = shard
        self._rows |= {key: (path, index) for index, key in enumerate(keys)}


def _key(prompt: list[int]) -> bytes:
    return hashlib.blake2b(json.dumps(prompt).encode(), digest_size=16).digest()
