"""The record of a run: configuration, code, versions, seed."""

from __future__ import annotations

import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from draftopd.io.files import replaced, write_json

#: Version of ``run.json``.
FORMAT = 1

PACKAGES = ("draftopd", "torch", "lightning", "transformers", "torchmetrics", "hydra-core", "liger-kernel")


def describe(config: DictConfig) -> dict[str, Any]:
    """Command, configuration, seed, git revision, versions: plain containers."""
    return {
        "command": sys.argv,
        "config": OmegaConf.to_container(config, resolve=True),
        "seed": config.seed,
        "git": _git("rev-parse", "HEAD"),
        "git_dirty": bool(_git("status", "--porcelain")),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
    }


def composed(config: DictConfig) -> str:
    """The text of ``config.yaml``."""
    return OmegaConf.to_yaml(config, resolve=True)


def write_record(directory: Path, config: DictConfig) -> None:
    """Write ``config.yaml`` (composed, resolved) and ``run.json`` beside the checkpoint."""
    directory.mkdir(parents=True, exist_ok=True)
    with replaced(directory / "config.yaml") as partial:
        partial.write_text(composed(config), encoding="utf-8")
    write_json(directory / "run.json", describe(config), FORMAT)


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
