"""Bring drafters of any kind from one checkpoint format into another.

    python -m draftopd.interop export runs/opd/.../checkpoints/last.ckpt OUT
    python -m draftopd.interop export runs/opd/.../drafter OUT --format speculators --target Qwen/Qwen3-8B
    python -m draftopd.interop import SPECULATORS_DIR OUT --target Qwen/Qwen3-8B

`public` is the format in which each kind of drafter is published, loaded beside the target: DFlash as z-lab does (vLLM
`method: dflash`, SGLang `DFLASH`, transformers), EAGLE-3 as SafeAILab and SpecForge do (vLLM `method: eagle3`, SGLang
`EAGLE3`). `speculators` is vLLM's own, with the target filled in: `vllm serve OUT`. MTP heads have this format only. A
training checkpoint can be exported while training goes on.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from draftopd.drafters.base import Drafter
from draftopd.drafters.checkpoint import save_drafter
from draftopd.drafters.load import assemble, load_drafter
from draftopd.errors import DrafterError, DraftOPDError
from draftopd.interop.speculators import read_speculators, write_speculators
from draftopd.interop.target_files import TargetFiles
from draftopd.io.hub import resolve
from draftopd.training import checkpoints

_PREFIX = "drafter."


def read_training_checkpoint(path: Path) -> Drafter:
    """The drafter of a training run's ``.ckpt``, in float32.

    Raises:
        FileError: if the file is no such checkpoint, or damaged.
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
    place = Path(resolve(path))
    if place.is_file():
        return read_training_checkpoint(place)
    if (place / "drafter" / "config.json").is_file():
        place = place / "drafter"
    return load_drafter(place, num_target_layers)


def export(options: argparse.Namespace) -> str:
    """Write a drafter in the format asked for; says what can be done with it."""
    target = TargetFiles(options.target) if options.target else None
    drafter = read_any(options.source, target.shape.num_layers if target else None)
    dtype = getattr(torch, options.dtype)
    if options.format == "public":
        save_drafter(drafter, Path(options.output), dtype)
        if drafter.kind == "mtp":
            return f"train it on: python train.py drafter=mtp drafter.checkpoint={options.output}"
        return (
            f'serve it: vllm serve TARGET --speculative-config \'{{"method": "{drafter.kind}", '
            f'"model": "{options.output}", "num_speculative_tokens": {drafter.num_proposals}}}\''
        )
    if target is None:
        raise DrafterError("The speculators format names the target and holds its embedding: name it with --target.")
    write_speculators(drafter, Path(options.output), target, options.verifier or target.path, dtype)
    return f"serve it: vllm serve {options.output}"


def bring_in(options: argparse.Namespace) -> str:
    """Write a drafter in the speculators format in its public one; says what can be done with it."""
    drafter = read_speculators(Path(options.source), TargetFiles(options.target))
    save_drafter(drafter, Path(options.output), getattr(torch, options.dtype))
    return (
        f"train it: python train.py target=hf target.path={options.target} drafter={drafter.kind} "
        f"drafter.checkpoint={options.output}"
    )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m draftopd.interop", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True)
    out = commands.add_parser("export", help="from draftopd to a serving engine's format")
    out.add_argument("source", help="drafter directory, run directory or .ckpt of a training run")
    out.add_argument("--format", choices=("public", "speculators"), default="public")
    out.add_argument("--target", help="the target's directory or hub name (for speculators)")
    out.add_argument("--verifier", help="how the server finds the target; default: --target")
    out.set_defaults(run=export)
    into = commands.add_parser("import", help="from the speculators format to the public one")
    into.add_argument("source", help="directory in the speculators format")
    into.add_argument("--target", required=True, help="the target's directory or hub name")
    into.set_defaults(run=bring_in)
    for command in (out, into):
        command.add_argument("output", help="directory to write")
        command.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    options = parser.parse_args(arguments)
    try:
        advice = options.run(options)
    except DraftOPDError as error:
        sys.exit(f"Error: {error}")
    except OSError as error:
        sys.exit(f"Error: {options.output} cannot be written: {error}. Name a directory that can.")
    print(f"wrote {options.output}\n{advice}")


if __name__ == "__main__":
    main()
