"""Safetensors files of rows of token ids of different lengths."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

#: Format version of a shard, stored in its metadata.
FORMAT = "1"


def pack(columns: Mapping[str, Sequence[Sequence[int]]]) -> bytes:
    """The bytes of a shard of columns with equally many rows: tensors ``NAME`` (numbers) and ``NAME_offsets``."""
    tensors = {}
    for name, rows in columns.items():
        tensors[name] = torch.tensor([x for row in rows for x in row], dtype=torch.int32)
        tensors[f"{name}_offsets"] = torch.tensor([0, *map(len, rows)], dtype=torch.int64).cumsum(0)
    return save(tensors, metadata={"draftopd_rows": FORMAT})


class Shard:
    """A shard opened for reading; rows are read from the disk on access.

    Raises:
        OSError, SafetensorError, KeyError, ValueError: if the file is absent, damaged or of another format.
    """

    def __init__(self, path: Path) -> None:
        self._file = safe_open(path, framework="pt").__enter__()
        version = (self._file.metadata() or {}).get("draftopd_rows", FORMAT)
        if version != FORMAT:
            raise ValueError(f"it has format {version}, this version reads {FORMAT}")
        self._offsets: dict[str, list[int]] = {}

    def offsets(self, name: str) -> list[int]:
        """The offsets at which a column's rows begin, followed by the end of the last one."""
        if name not in self._offsets:
            try:
                self._offsets[name] = self._file.get_tensor(f"{name}_offsets").tolist()
            except SafetensorError as error:
                raise KeyError(name) from error
        return self._offsets[name]

    def rows(self, name: str) -> int:
        return len(self.offsets(name)) - 1

    def check(self, *columns: str) -> None:
        """Refuse columns whose offsets do not fit their values, or that have different numbers of rows.

        Raises:
            KeyError, ValueError: with the name of the column.
        """
        for name in columns:
            try:
                size, kind = self._file.get_slice(name).get_shape(), self._file.get_slice(name).get_dtype()
                offsets = self._file.get_tensor(f"{name}_offsets")
            except SafetensorError as error:
                raise KeyError(name) from error
            whole = kind == "I32" and len(size) == 1 and offsets.dtype == torch.int64 and offsets.ndim == 1
            if not whole or not len(offsets) or offsets[0] != 0 or offsets[-1] != size[0] or (offsets.diff() < 0).any():
                raise ValueError(f"the rows of {name} do not add up")
            if len(offsets) != self.rows(columns[0]) + 1:
                raise ValueError(f"{name} has other rows than {columns[0]}")

    def row(self, name: str, index: int) -> list[int]:
        start, end = self.offsets(name)[index : index + 2]
        return self._file.get_slice(name)[start:end].tolist()

    def column(self, name: str) -> Tensor:
        """All rows of a column, concatenated."""
        return self._file.get_tensor(name)
