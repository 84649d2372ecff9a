"""Parts that several commands build from a configuration's top level."""

from __future__ import annotations

from omegaconf import DictConfig

from draftopd.decoding.rules import Rules
from draftopd.decoding.sampling import Sampling
from draftopd.errors import ConfigError


def rules_of(config: DictConfig, stop: frozenset[int] = frozenset()) -> Rules:
    """How responses are drawn, verified and ended.

    Args:
        stop: token ids that end a response.

    Raises:
        ConfigError: if a number lies outside its range.
    """
    try:
        sampling = Sampling(config.temperature, config.top_k, config.top_p)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return Rules(sampling, config.verification, stop, config.max_new_tokens)
