"""Cross entropy on the recorded tokens, as in SFT (DFlash, arXiv 2602.06036), and its weights by confidence."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from draftopd.losses import liger
from draftopd.losses.base import Stream, StreamLoss
from draftopd.losses.chunked import per_slot
from draftopd.losses.weighting import (
    cross_entropy_gamma,
    expected_length_gradient,
    exponential_decay,
    marginal_gain,
    reach,
)
from draftopd.replay.blocks import Blocks


class CrossEntropy(StreamLoss):
    """``-log q(recorded token)``, slot ``k`` weighted ``exp(-(k-1) / gamma)``.

    Args:
        gamma: decay constant; None takes DFlash's for the block size (7, 5, 4 for 16, 10, 8).
        options: see :class:`~draftopd.losses.base.StreamLoss`; a proposal counts as accepted while it equals the
            recorded token.

    Raises:
        ValueError: if gamma is not above 0.
    """

    logit_copies = 3

    def __init__(self, *, gamma: float | None = None, **options: Any) -> None:
        super().__init__(**options)
        if gamma is not None and not gamma > 0:
            raise ValueError(f"gamma must be above 0, found {gamma}.")
        self.gamma = gamma
        self.scope = "none"
        # If both streams are treated alike, the stream of a slot does not matter.
        self.uses_proposals = (
            self.accept_until_fail
            or self.include_correction
            or self.normalization != "token"
            or self.accepted_weight != self.rejected_weight
        )

    def decay(self, slots: int, stream: Stream) -> Tensor:
        return exponential_decay(slots, self.gamma or cross_entropy_gamma(slots + 1))

    def usable(self, blocks: Blocks) -> Tensor:
        return blocks.recorded & blocks.head.covers(blocks.labels)

    def values(self, blocks: Blocks, used: Tensor, stream: Stream) -> Tensor:
        draft_states, labels = blocks.draft_states[used], blocks.labels[used]
        rows = blocks.head.row_of(labels)
        if liger.fits(draft_states, blocks.head):
            return liger.cross_entropy(draft_states, blocks.head, rows)
        return per_slot(_cross_entropy, draft_states, blocks.head, rows)


class _ByConfidence(CrossEntropy):
    """Cross entropy weighted by the drafter's confidence in the recorded tokens; ``gamma`` None means no decay."""

    def decay(self, slots: int, stream: Stream) -> Tensor:
        return torch.ones(slots) if self.gamma is None else exponential_decay(slots, self.gamma)


class DPace(_ByConfidence):
    """D-PACE (arXiv 2605.18810): a slot weighs the gradient of the expected accepted length in its log-confidence.

    With the drafter's confidence in the recorded token ``c_k``, smoothed to ``(1 - smoothing) c_k + smoothing``,
    slot ``k`` weighs ``sum_{i>=k} prod_{j<=i} c_j``. The weights carry no gradient and are normalised over the batch.

    Args:
        smoothing: in [0, 1]; 1 weighs slot ``k`` by the number of slots from it on.
        options: see :class:`CrossEntropy`; ``gamma`` adds a decay, None does not.

    Raises:
        ValueError: if smoothing lies outside [0, 1].
    """

    def __init__(self, *, smoothing: float = 0.5, **options: Any) -> None:
        super().__init__(**options)
        if not 0 <= smoothing <= 1:
            raise ValueError(f"smoothing must lie in [0, 1], found {smoothing}.")
        self.smoothing = smoothing

    def importance(self, blocks: Blocks, values: Tensor, used: Tensor) -> Tensor:
        return expected_length_gradient(torch.exp(-values), used, self.smoothing)


class Reach(_ByConfidence):
    """A slot weighs the probability that drafting reaches it: a smooth accept-until-fail.

    With the drafter's confidence in the recorded token ``c_k``, slot ``k`` weighs ``prod_{j<k} c_j``. Unlike D-PACE's
    weight this leaves out the slot's own confidence, so that a slot which is still wrong keeps its weight. ``future``
    also multiplies by the tokens that depend on the slot, ``1 + c_{k+1} + c_{k+1} c_{k+2} + ...``: the gradient of the
    expected accepted length in ``c_k``. The weights carry no gradient and are normalised over the batch.

    Args:
        future: weigh by the marginal gain.
        options: see :class:`CrossEntropy`; ``gamma`` adds a decay, None does not.
    """

    def __init__(self, *, future: bool = False, **options: Any) -> None:
        super().__init__(**options)
        self.future = future

    def importance(self, blocks: Blocks, values: Tensor, used: Tensor) -> Tensor:
        confidence = torch.exp(-values)
        return marginal_gain(confidence, used) if self.future else reach(confidence, used)


def _cross_entropy(draft_logits: Tensor, rows: Tensor) -> Tensor:
    return F.cross_entropy(draft_logits, rows, reduction="none")
