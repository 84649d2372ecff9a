"""Drafter checkpoints: ``config.json`` and ``model.safetensors`` in one directory."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from draftopd.drafters.base import Drafter
from draftopd.drafters.config import DrafterConfig
from draftopd.errors import DrafterError, FileError
from draftopd.io.files import checksum, read_json, replaced, write_json, writing
from draftopd.io.hub import resolve
from draftopd.io.json_text import listed, parse_json, shown
from draftopd.targets.target import Target

log = logging.getLogger(__name__)

_CONFIG, _WEIGHTS = "config.json", "model.safetensors"

#: Checksums of the two files, beside them because the public format has no field for them, and their format.
_CHECKSUMS, FORMAT = "checksums.json", 1

Made = TypeVar("Made", bound=Drafter)


def read_checkpoint(directory: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The JSON object of ``config.json`` and the tensors of ``model.safetensors``.

    Raises:
        DrafterError: if one is missing or damaged.
    """
    try:
        raw = parse_json((directory / _CONFIG).read_bytes())
        tensors = load_file(directory / _WEIGHTS)
        _check_written(directory)
    except FileNotFoundError as error:
        raise DrafterError(
            f"No drafter in {directory}: {Path(error.filename or 'model.safetensors').name} is missing. "
            "Name a directory with config.json and model.safetensors."
        ) from error
    except (ValueError, SafetensorError, OSError) as error:
        raise DrafterError(
            f"The drafter in {directory} cannot be read: {shown(str(error))}. Copy or train it again."
        ) from error
    if not isinstance(raw, dict):
        raise DrafterError(
            f"config.json of {directory} is not a JSON object: name a directory with a drafter's config.json."
        )
    return raw, tensors


def _check_written(directory: Path) -> None:
    """Refuse weights that have changed since they were written, if their checksums are there."""
    checksums = directory / _CHECKSUMS
    if not checksums.exists():
        return
    try:
        written = read_json(checksums, FORMAT)
    except FileError as error:
        log.warning("%s The drafter beside it is read unchecked.", error)
        return
    weights, config = directory / _WEIGHTS, directory / _CONFIG
    if checksum(weights) != written.get(_WEIGHTS):
        raise DrafterError(
            f"{weights} is damaged: its checksum differs. Copy it again, or export it from the run's checkpoint "
            f"(python -m draftopd export). If it was changed on purpose, delete {_CHECKSUMS} beside it."
        )
    if checksum(config) != written.get(_CONFIG):
        # A serving engine may need an edit.
        log.warning("%s was changed, or damaged, since the drafter was written.", config)


def assemble_as(
    kind: type[Made],
    raw: dict[str, Any],
    tensors: Mapping[str, Tensor],
    where: str,
    num_target_layers: int | None = None,
) -> Made:
    """The drafter of a ``config.json`` and its tensors, in float32.

    Args:
        where: names the checkpoint in errors.
        num_target_layers: depth of its target, where the checkpoint does not say it.

    Raises:
        DrafterError: if a field is missing or garbled, or a tensor is missing, extra or misshapen.
    """
    config = kind.config_class.from_json(raw, where, tensors, num_target_layers)
    own = {name: tensor for name, tensor in tensors.items() if name not in config.ignored_tensors}
    drafter = _filled(kind, config, own, where)
    drafter.check_weights(where)
    return drafter


def load_as(kind: type[Made], target: Target, directory: str | Path, block_size: int | None = None) -> Made:
    """Read a checkpoint of a known kind of drafter for this target.

    Args:
        block_size: replaces the one it was trained with; None keeps it.

    Raises:
        DrafterError: if the checkpoint is missing, damaged or of another kind, or does not fit the target.
    """
    path = Path(resolve(str(directory)))
    return fitted(assemble_as(kind, *read_checkpoint(path), str(path), target.num_layers), target, block_size)


def fitted(drafter: Made, target: Target, block_size: int | None = None) -> Made:
    """The drafter with another block size, checked against the target; see :func:`load_as`."""
    if block_size is not None:
        drafter.block_size = block_size
    drafter.config.check_fits(target.shape)
    return drafter


def save_drafter(
    drafter: Drafter,
    directory: Path,
    dtype: torch.dtype = torch.bfloat16,
    tensors: Mapping[str, Tensor] | None = None,
) -> None:
    """Write a drafter in its public format; see :func:`write_checkpoint`.

    Args:
        tensors: its whole weights, if the drafter is sharded.
    """
    write_checkpoint(directory, drafter.config.to_json(), drafter.state_dict() if tensors is None else tensors, dtype)


def _filled(kind: type[Made], config: DrafterConfig, tensors: Mapping[str, Tensor], where: str) -> Made:
    """The drafter with a checkpoint's tensors, weights in float32; nothing is allocated before the tensors fit."""
    if config.num_layers > len(tensors):
        raise DrafterError(
            f"config.json of {where} describes {config.num_layers} layers, but there are {len(tensors)} tensors: copy "
            "it again."
        )
    try:
        with torch.device("meta"):
            own = kind(config).state_dict()
        _compare(own, tensors, where)
        drafter = kind(config)
    except (TypeError, ValueError, AttributeError, KeyError, ArithmeticError, RuntimeError, MemoryError) as error:
        raise DrafterError(
            f"config.json of {where} does not describe a drafter that can be built ({shown(str(error))}): copy it "
            "again, or name another."
        ) from error
    drafter.load_state_dict({name: t.float() if t.is_floating_point() else t for name, t in tensors.items()})
    return drafter


def _compare(own: Mapping[str, Tensor], tensors: Mapping[str, Tensor], where: str) -> None:
    """Refuse tensors that do not fit the drafter's ``own``."""
    expected, found = ({name: tuple(t.shape) for name, t in group.items()} for group in (own, tensors))
    if expected != found:
        missing, extra = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
        both = sorted(expected.keys() & found.keys())
        shapes = [f"{n} {found[n]} instead of {expected[n]}" for n in both if expected[n] != found[n]]
        raise DrafterError(
            f"The tensors of {where} are not those of its config.json: copy both again. "
            f"Missing: {_few(missing)}; extra: {_few(extra)}; misshapen: {_few(shapes)}."
        )
    other = [f"{n} {t.dtype}" for n, t in tensors.items() if t.is_floating_point() != own[n].is_floating_point()]
    if other:
        raise DrafterError(
            f"The tensors of {where} have other types than a drafter's: {listed(sorted(other))}. Quantized "
            "checkpoints are not read: use one in bfloat16, float16 or float32."
        )
    broken = [n for n, t in tensors.items() if t.is_floating_point() and not bool(torch.isfinite(t.float()).all())]
    if broken:
        raise DrafterError(
            f"The tensors {listed(sorted(broken))} of {where} hold NaN or infinity: use an earlier checkpoint, or "
            "train again with a lower learning rate."
        )


def _few(names: list[str], limit: int = 6) -> str:
    """The first of them, and how many more there are."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return f"{[shown(name, 100) for name in names[:limit]]}{more}" if names else "none"


def write_checkpoint(
    directory: Path, raw: dict[str, Any], tensors: Mapping[str, Tensor], dtype: torch.dtype = torch.bfloat16
) -> None:
    """Write ``model.safetensors`` and ``config.json``, each whole or not at all.

    ``checksums.json`` beside them is for :func:`read_checkpoint`; other readers ignore it.

    Args:
        dtype: precision of the weights; integer tables keep theirs.

    Raises:
        FileError: if they cannot be written; the earlier files then stay.
    """
    with writing(directory):
        directory.mkdir(parents=True, exist_ok=True)
        # Until both files are new, no checksum fits.
        (directory / _CHECKSUMS).unlink(missing_ok=True)
    cast = {n: t.detach().to("cpu", dtype if t.is_floating_point() else t.dtype) for n, t in tensors.items()}
    with replaced(directory / _WEIGHTS) as partial:
        save_file({n: t.contiguous() for n, t in cast.items()}, partial, metadata={"format": "pt"})
    with replaced(directory / _CONFIG) as partial:
        raw = raw | {"torch_dtype": str(dtype).removeprefix("torch.")}
        partial.write_text(json.dumps(raw, indent=2) + "\n", encoding="utf-8")
    write_json(directory / _CHECKSUMS, {name: checksum(directory / name) for name in (_WEIGHTS, _CONFIG)}, FORMAT)
