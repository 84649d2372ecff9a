"""Refuses secrets in a configuration before Hydra's files and the run's record are written."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf

#: Last parts of keys whose values are secret.
_SECRET = ("api_key", "apikey", "token", "password", "secret", "authorization")


def exposed(config: DictConfig) -> str | None:
    """An error message about a secret in a configuration, or None. It does not repeat the secret."""
    for key, value in _leaves(config, ""):
        name = key.rpartition(".")[2].lower()
        if name == "api_key_env" and value not in os.environ:
            return (
                f"{key} names no environment variable that is set: give the variable's name, not the key, and set it."
            )
        if name in _SECRET:
            return f"{key} would be written into the run's records: leave it out, and use an environment variable."
        _, _, rest = value.partition("://")
        if rest and "@" in rest.replace("?", "/").replace("#", "/").split("/")[0]:
            return (
                f"{key} is an address with a user or password, which the run's records would show: leave these out, "
                "and name a key's environment variable with api_key_env."
            )
    return None


def _leaves(node: DictConfig | ListConfig, prefix: str) -> Iterator[tuple[str, str]]:
    """Every text in a configuration and its dotted key, without missing values and references to other keys."""
    keys: list[Any] = list(node) if isinstance(node, DictConfig) else list(range(len(node)))
    for key in keys:
        if OmegaConf.is_missing(node, key) or OmegaConf.is_interpolation(node, key):
            continue
        value, path = node[key], f"{prefix}{key}"
        if isinstance(value, DictConfig | ListConfig):
            yield from _leaves(value, f"{path}.")
        elif isinstance(value, str):
            yield path, value
