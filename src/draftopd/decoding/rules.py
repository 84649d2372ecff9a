"""The rules by which responses are drawn, verified and ended in rollout, replay, validation and evaluation."""

from __future__ import annotations

from dataclasses import dataclass

from draftopd.decoding.sampling import Sampling
from draftopd.decoding.verify import Verification


@dataclass(frozen=True)
class Rules:
    """How responses are drawn, verified and ended.

    Args:
        sampling: temperature, top-k and top-p, applied to the distributions of target and drafter alike.
        verification: acceptance rule above temperature 0; at temperature 0 both rules are the same.
        stop: token ids that end a response and are its last token.
        max_new_tokens: maximum length of a response.
    """

    sampling: Sampling = Sampling()
    verification: Verification = "rejection_sampling"
    stop: frozenset[int] = frozenset()
    max_new_tokens: int = 256

    @property
    def rejection(self) -> bool:
        """Whether proposals are drawn and tested by rejection sampling."""
        return self.verification == "rejection_sampling" and not self.sampling.greedy

    @property
    def draft_sampling(self) -> Sampling:
        """How the drafter chooses proposals: by sampling if :attr:`rejection` is True, else its most likely tokens."""
        return self.sampling if self.rejection else Sampling()
