"""Datasets on the hub or in local files, loaded with the optional ``datasets`` package."""

from __future__ import annotations

from typing import Any

from draftopd.errors import PromptError
from draftopd.io.hub import limit_waiting


def load_dataset(
    path: str, name: str | None = None, split: str = "train", data_files: Any = None, *, instead: str
) -> Any:
    """The rows of one split, as ``datasets.load_dataset`` returns them.

    Args:
        path, name, split, data_files: passed to ``datasets.load_dataset``.
        instead: last sentence of the error message, with an alternative to this dataset.

    Raises:
        PromptError: if the package is missing or the dataset cannot be loaded.
    """
    try:
        import datasets
    except ImportError as error:
        raise PromptError(f"The dataset {path} needs the datasets package: pip install datasets.") from error
    limit_waiting()
    try:
        return datasets.load_dataset(path, name, split=split, data_files=data_files)
    except Exception as error:
        reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}".rstrip(". ")
        raise PromptError(f"The dataset {path} could not be loaded ({reason}). {instead}") from error
