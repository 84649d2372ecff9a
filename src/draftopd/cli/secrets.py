"""Refuses secrets in a configuration before Hydra's files and the run's record are written."""

from __future__ import annotations

import os
import re

from omegaconf import DictConfig, OmegaConf

from draftopd.cli.keys import walk

#: Last parts of keys whose values are secret.
_SECRET = ("api_key", "apikey", "token", "password", "secret", "authorization")


def exposed(config: DictConfig) -> str | None:
    """An error message about a secret in a configuration, or None. It does not repeat the secret."""
    for key, value in walk(OmegaConf.to_container(config), lists=True):
        # A missing value holds no secret, and neither does a reference to another key.
        if not isinstance(value, str) or value == "???" or re.search(r"(?<!\\)\$\{", value):
            continue
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
