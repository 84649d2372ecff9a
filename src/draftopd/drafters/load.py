"""A drafter of whatever kind its checkpoint holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from draftopd.drafters import dflash_format, eagle3_format, mtp_format
from draftopd.drafters.base import Drafter, HasShape
from draftopd.drafters.checkpoint import architecture_of, read_checkpoint
from draftopd.drafters.dflash import DFlashDrafter
from draftopd.drafters.eagle3 import Eagle3Drafter
from draftopd.drafters.mtp import MTPDrafter
from draftopd.errors import DrafterError
from draftopd.io.hub import resolve

#: Drafters by the architecture that their ``config.json`` names.
DRAFTERS: dict[str, type[Drafter]] = {
    dflash_format.ARCHITECTURE: DFlashDrafter,
    **dict.fromkeys(eagle3_format.ARCHITECTURES, Eagle3Drafter),
    mtp_format.ARCHITECTURE: MTPDrafter,
}


def kind_of(raw: dict[str, Any], where: str) -> type[Drafter]:
    """The kind of drafter that a ``config.json`` describes.

    Raises:
        DrafterError: if it is none of these.
    """
    architecture = architecture_of(raw)
    if architecture not in DRAFTERS:
        raise DrafterError(
            f"{where} holds a {architecture}, expected one of {', '.join(DRAFTERS)}: name a drafter's directory, or "
            "bring it into its public format (python -m draftopd.interop import)."
        )
    return DRAFTERS[architecture]


def assemble(
    raw: dict[str, Any], tensors: dict[str, Tensor], where: str, num_target_layers: int | None = None
) -> Drafter:
    """See :meth:`Drafter.assemble`."""
    return kind_of(raw, where).assemble(raw, tensors, where, num_target_layers)


def load_drafter(directory: str | Path, num_target_layers: int | None = None) -> Drafter:
    """See :meth:`Drafter.load`."""
    place = Path(resolve(str(directory)))
    return assemble(*read_checkpoint(place), str(place), num_target_layers)


def load_for(target: HasShape, directory: str | Path, block_size: int | None = None) -> Drafter:
    """See :meth:`Drafter.load_for`."""
    place = Path(resolve(str(directory)))
    return kind_of(read_checkpoint(place)[0], str(place)).load_for(target, place, block_size)
