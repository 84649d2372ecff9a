"""Loads a drafter of the kind that its checkpoint holds."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from draftopd.drafters.base import Drafter
from draftopd.drafters.checkpoint import assemble_as, fitted, read_checkpoint
from draftopd.drafters.config import architecture_of
from draftopd.drafters.dflash import DFlashDrafter
from draftopd.drafters.eagle3 import Eagle3Drafter
from draftopd.drafters.mtp import MTPDrafter
from draftopd.errors import DrafterError
from draftopd.io.hub import resolve
from draftopd.targets.target import Target

#: Kinds of drafters.
KINDS: tuple[type[Drafter], ...] = (DFlashDrafter, Eagle3Drafter, MTPDrafter)


def load_drafter(directory: str | Path, num_target_layers: int | None = None) -> Drafter:
    """Read a checkpoint in a public format, in float32.

    Args:
        num_target_layers: depth of its target, needed if the checkpoint does not say it.

    Raises:
        DrafterError: if it is missing or damaged, or not a drafter.
    """
    path = Path(resolve(str(directory)))
    return assemble(*read_checkpoint(path), str(path), num_target_layers)


def load_for(target: Target, directory: str | Path, block_size: int | None = None) -> Drafter:
    """Read a checkpoint for this target; see :func:`~draftopd.drafters.checkpoint.load_as`."""
    return fitted(load_drafter(directory, target.num_layers), target, block_size)


def assemble(
    raw: dict[str, Any], tensors: Mapping[str, Tensor], where: str, num_target_layers: int | None = None
) -> Drafter:
    """The drafter of a ``config.json`` and its tensors; see :func:`~draftopd.drafters.checkpoint.assemble_as`.

    Raises:
        DrafterError: if it is of another kind, or its fields and tensors do not fit.
    """
    kinds = {name: kind for kind in KINDS for name in kind.config_class.architectures}
    architecture = architecture_of(raw)
    if architecture not in kinds:
        raise DrafterError(
            f"{where} holds a {architecture}, expected one of {', '.join(kinds)}: name a drafter's directory, or "
            "bring it into its public format (python -m draftopd import)."
        )
    return assemble_as(kinds[architecture], raw, tensors, where, num_target_layers)
