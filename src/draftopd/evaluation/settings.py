"""How a benchmark is decoded."""

from __future__ import annotations

from dataclasses import dataclass

from draftopd.decoding.sampling import Sampling
from draftopd.decoding.verify import Verification
from draftopd.errors import ConfigError


@dataclass(frozen=True)
class Settings:
    """What both decoders of an evaluation share.

    Args:
        temperature, top_k, top_p: see :class:`Sampling`.
        verification: acceptance rule above temperature 0.
        thinking: the chat template's mode.
        max_new_tokens: response limit.
        batch_size: prompts decoded together.
        limit: at most so many prompts.
        seed: of draws above temperature 0.

    Raises:
        ConfigError: if a value lies outside its range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    verification: Verification = "rejection_sampling"
    thinking: bool = True
    max_new_tokens: int = 256
    batch_size: int = 1
    limit: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        try:
            Sampling(self.temperature, self.top_k, self.top_p)
        except ValueError as error:
            raise ConfigError(str(error)) from error
        for name in ("max_new_tokens", "batch_size", "limit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be 1 or more, found {value}.")
        if not 0 <= self.seed < 2**32:
            raise ConfigError(f"seed must lie in 0 to 2**32 - 1, found {self.seed}.")

    @property
    def sampling(self) -> Sampling:
        return Sampling(self.temperature, self.top_k, self.top_p)
