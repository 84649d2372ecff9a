"""Memory and time of a training run before it is started: no weights, no GPU.

    python -m draftopd.cli.plan target=qwen3_30b_a3b trainer.devices=8
    python -m draftopd.cli.plan experiment=paper target=qwen3_8b plan.gpu=A100 module.activation_checkpointing=true

Takes the overrides of train.py, and plan.NAME=VALUE for what is assumed; docs/planning.md lists these.
"""

from __future__ import annotations

import sys
from pathlib import Path


def main(arguments: list[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    flags = [a for a in arguments if a.startswith("-")]
    if flags:
        asked = set(flags) <= {"-h", "--help"}
        print(__doc__)
        sys.exit(0 if asked else f"Error: {flags[0]} is no option of a plan: write KEY=VALUE.")
    from draftopd.cli.planning import plan

    plan(arguments, configs())


def configs() -> Path:
    """The configurations: beside this package's sources, or in the working directory."""
    beside = Path(__file__).parents[2] / "configs"
    found = beside if (beside / "train.yaml").is_file() else Path.cwd() / "configs"
    if not (found / "train.yaml").is_file():
        sys.exit("Error: no configs/train.yaml here: run the command in a checkout of draftopd.")
    return found


if __name__ == "__main__":
    main()
