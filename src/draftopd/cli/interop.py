"""Converts drafters of any kind from one checkpoint format to another."""

from __future__ import annotations

from pathlib import Path

import torch

from draftopd.drafters.base import Drafter
from draftopd.drafters.checkpoint import save_drafter
from draftopd.drafters.load import assemble, load_drafter
from draftopd.errors import DrafterError
from draftopd.interop.speculators import read_speculators, write_speculators
from draftopd.interop.target_files import TargetFiles
from draftopd.io.hub import resolve
from draftopd.training import checkpoints

_PREFIX = "drafter."


def read_training_checkpoint(path: Path) -> Drafter:
    """The drafter of a training run's ``.ckpt``, in float32.

    Raises:
        FileError: if the file is not such a checkpoint, or is damaged.
    """
    checkpoint = checkpoints.read(path)
    described, weights = checkpoint["drafter"], checkpoint["state_dict"]
    tensors = {name.removeprefix(_PREFIX): t for name, t in weights.items() if name.startswith(_PREFIX)}
    return assemble(described, tensors, str(path))


def read_any(path: str, num_target_layers: int | None = None) -> Drafter:
    """A drafter from its directory, a run's directory, or a training checkpoint.

    Args:
        num_target_layers: depth of its target, where the drafter does not say it.
    """
    found = Path(resolve(path))
    if found.is_file():
        return read_training_checkpoint(found)
    inner = found / "drafter"
    return load_drafter(inner if (inner / "config.json").is_file() else found, num_target_layers)


def export(
    source: str,
    output: str,
    format: str = "public",
    target: str | None = None,
    verifier: str | None = None,
    dtype: str = "bfloat16",
) -> str:
    """Write a drafter in the ``public`` or the ``speculators`` format, and return the command that uses it.

    Args:
        source: directory of a drafter or a run, or a training checkpoint.
        target: directory or name of the target; ``verifier``: how the server finds it.

    Raises:
        DrafterError: if the drafter cannot be read, or the format does not take it.
        TargetError: if the target cannot be read.
    """  # fmt: skip
    files = TargetFiles(target) if target else None
    drafter, precision = read_any(source, files.shape.num_layers if files else None), getattr(torch, dtype)
    if format == "public":
        save_drafter(drafter, Path(output), precision)
        if drafter.kind == "mtp":
            return f"train it on: python train.py drafter=mtp drafter.checkpoint={output}"
        return (
            f'serve it: vllm serve TARGET --speculative-config \'{{"method": "{drafter.kind}", "model": "{output}", '
            f'"num_speculative_tokens": {drafter.num_proposals}}}\''
        )
    if files is None:
        raise DrafterError("The speculators format names the target and holds its embedding: name it with --target.")
    write_speculators(drafter, Path(output), files, verifier or files.path, precision)
    return f"serve it: vllm serve {output}"


def bring_in(source: str, output: str, target: str, dtype: str = "bfloat16") -> str:
    """Write a drafter of the speculators format in its public one, and return the command that uses it.

    Raises:
        DrafterError: if the drafter cannot be read, or does not fit the target.
        TargetError: if the target cannot be read.
    """
    drafter = read_speculators(Path(source), TargetFiles(target))
    save_drafter(drafter, Path(output), getattr(torch, dtype))
    return (
        f"train it: python train.py target=hf target.path={target} drafter={drafter.kind} drafter.checkpoint={output}"
    )
