"""How benchmarks are decoded."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from draftopd.decoding.rules import Rules
from draftopd.decoding.sampling import Sampling
from draftopd.decoding.verify import Verification
from draftopd.errors import ConfigError

#: Logit gaps up to which a difference from plain decoding is a tie that rounding decided.
TIES = {torch.float32: 1e-3, torch.float16: 0.1, torch.bfloat16: 0.5}


@dataclass(frozen=True)
class Settings:
    """What all decoders of an evaluation share.

    Args:
        temperature, top_k, top_p: see :class:`Sampling`.
        verification: acceptance rule above temperature 0.
        thinking: the chat template's mode.
        max_new_tokens: response limit.
        batch_size: prompts decoded together.
        limit: maximum number of examples per benchmark; None: the benchmark's own number.
        seed: of draws above temperature 0.
        tie_tolerance: logit gap up to which a difference from plain decoding is a tie; None: by the target's
            precision, see :data:`TIES`.
        shown: number of examples per benchmark whose drafts the report shows.
        compiled: run the decoding steps, including plain ones, through torch.compile.

    Raises:
        ConfigError: if a value is out of range.
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
    tie_tolerance: float | None = None
    shown: int = 3
    compiled: bool = False

    def __post_init__(self) -> None:
        try:
            Sampling(self.temperature, self.top_k, self.top_p)
        except ValueError as error:
            raise ConfigError(str(error)) from error
        for name, minimum in (("max_new_tokens", 1), ("batch_size", 1), ("limit", 1), ("shown", 0)):
            value = getattr(self, name)
            if value is not None and value < minimum:
                raise ConfigError(f"{name} must be {minimum} or more, found {value}.")
        if self.tie_tolerance is not None and not self.tie_tolerance >= 0:
            raise ConfigError(f"tie_tolerance must be 0 or more, or null, found {self.tie_tolerance}.")
        if not 0 <= self.seed < 2**32:
            raise ConfigError(f"seed must lie in 0 to 2**32 - 1, found {self.seed}.")

    @property
    def sampling(self) -> Sampling:
        return Sampling(self.temperature, self.top_k, self.top_p)

    def rules(self, stop: frozenset[int]) -> Rules:
        """The decoding rules of responses that end at these token ids."""
        return Rules(self.sampling, self.verification, stop, self.max_new_tokens)

    def tolerance(self, dtype: torch.dtype) -> float:
        """The logit gap of a tie for a target of this precision."""
        return TIES.get(dtype, TIES[torch.float32]) if self.tie_tolerance is None else self.tie_tolerance
