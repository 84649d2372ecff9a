"""The losses as the configuration files describe them."""

from __future__ import annotations

from copy import deepcopy
from functools import cache

from hydra import compose, initialize_config_dir
from omegaconf import DictConfig
from tests.support.paths import ROOT

LOSSES = tuple(sorted(path.stem for path in (ROOT / "configs" / "loss").glob("*.yaml")))


@cache
def _composed(name: str) -> DictConfig:
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        return compose("train", [f"loss={name}"]).loss


def loss_config(name: str, recorded: bool = False) -> DictConfig:
    """The group's configuration; with ``recorded``, a loss that distils does so on the recorded text."""
    config = deepcopy(_composed(name))
    for part in (config, config.get("first", {}), config.get("second", {})):
        if recorded and "scored_on" in part:
            part.scored_on = "recorded"
    return config
