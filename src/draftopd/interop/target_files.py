"""A target's config and single tensors, read without loading the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers.utils import cached_file

from draftopd.errors import TargetError
from draftopd.io.hub import check_places, local_only, resolve, unavailable
from draftopd.io.json_text import parse_json, shown, whole
from draftopd.targets.shape import TargetShape

_INDEX, _WHOLE = "model.safetensors.index.json", "model.safetensors"


class TargetFiles:
    """The config and single tensors of a target, from a local directory or the model hub.

    Args:
        path: directory, hub name or ``bundled:NAME``.

    Raises:
        TargetError: if its config is missing or damaged.
    """

    def __init__(self, path: str) -> None:
        self.path = resolve(path)
        try:
            raw = parse_json(self._file("config.json").read_bytes())
        except (ValueError, OSError) as error:
            raise TargetError(f"config.json of {path} cannot be read: {error}. Copy or download it again.") from error
        if not isinstance(raw, dict):
            raise TargetError(f"config.json of {path} is not a JSON object: name a directory in Hugging Face layout.")
        self.architectures: list[str] = raw.get("architectures") or []
        self.config: dict[str, Any] = raw.get("text_config") or raw
        try:
            depth = whole(self.config["num_hidden_layers"])
            self.shape = TargetShape(whole(self.config["hidden_size"]), whole(self.config["vocab_size"]), depth)
        except KeyError as error:
            raise TargetError(f"config.json of {path} has no {error}: name the target the drafter is for.") from error
        except (ValueError, TypeError) as error:
            raise TargetError(
                f"config.json of {path} does not say how large the target is ({error}): copy or download it again."
            ) from error

    def embedding(self) -> Tensor:
        """``[vocab, hidden]``."""
        return self._tensor("embed_tokens.weight")

    def lm_head(self) -> Tensor:
        """``[vocab, hidden]``; the embedding if the two are tied, or if the files have no LM head."""
        if self.config.get("tie_word_embeddings") or not self._named("lm_head.weight"):
            return self.embedding()
        return self._tensor("lm_head.weight")

    def _named(self, ending: str) -> dict[str, str]:
        """Tensors whose name has this ending, with the file that each is in."""
        try:
            index = self._file(_INDEX, needed=False)
            if index is not None:
                files = dict(parse_json(index.read_bytes())["weight_map"])
            else:
                with safe_open(self._file(_WHOLE), framework="pt") as file:
                    files = dict.fromkeys(file.keys(), _WHOLE)
        except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
            raise TargetError(f"{self.path} cannot be read: {shown(str(error))}. Copy or download it again.") from error
        check_places(files.values(), self.path)
        return {name: file for name, file in files.items() if name.endswith(ending)}

    def _tensor(self, ending: str) -> Tensor:
        found = self._named(ending)
        if len(found) != 1:
            raise TargetError(
                f"{self.path} has {len(found)} tensors named *{ending}, expected one: copy or download it again."
            )
        ((name, location),) = found.items()
        try:
            with safe_open(self._file(location), framework="pt") as file:
                return file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise TargetError(f"{self.path} cannot be read: {error}. Copy or download it again.") from error

    def _file(self, name: str, needed: bool = True) -> Any:
        if Path(self.path).is_dir():
            file = Path(self.path) / name
            if file.is_file():
                return file
            if needed:
                raise TargetError(f"The target {self.path} has no {name}: name a directory in Hugging Face layout.")
            return None
        try:
            found = cached_file(
                self.path, name, local_files_only=local_only(self.path), _raise_exceptions_for_missing_entries=needed
            )
        except OSError as error:
            raise TargetError(unavailable(self.path, error)) from error
        return Path(found) if found else None
