"""Evaluate a drafter: ``python eval.py --help``."""

from __future__ import annotations

from pathlib import Path

import hydra
from omegaconf import DictConfig

from draftopd.cli import app

CONFIGS = Path(__file__).parent / "configs"


@hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name="eval")
def main(config: DictConfig) -> None:
    app.guarded(evaluate, config)


def evaluate(config: DictConfig) -> None:
    from draftopd.cli.evaluation import run

    run(config)


if __name__ == "__main__":
    app.run(main, CONFIGS, "eval")
