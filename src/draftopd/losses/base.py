"""The loss protocol, and what nearly all losses share: one value a slot, weighted by stream and position."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from draftopd.decoding.sampling import LEAST_TEMPERATURE
from draftopd.distributed import ranks
from draftopd.losses.chunked import SlotFunction, per_slot
from draftopd.losses.divergence import keep_top_k
from draftopd.losses.weighting import power_decay, weighted_mean
from draftopd.replay.blocks import Blocks, Scope


class LossOutput(NamedTuple):
    """The scalar to minimise, and detached scalars to log beside it."""

    loss: Tensor
    parts: dict[str, Tensor]


#: The text that the target is asked on: the drafter's own tokens, or the recorded ones as in SFT, which needs no
#: second pass of the target.
ScoredOn = Literal["proposals", "recorded"]

#: ``stream``: each stream is averaged by itself, then both by their weights; ``token``: all slots jointly.
Normalization = Literal["stream", "token"]

Stream = Literal["accepted", "rejected"]

#: What a token counts as that the target excludes (a logit of -inf): its probability is 0 all the same, but ``0 log 0``
#: is then 0, and a drafter that proposes it pays a finite reverse KL. Logits within 1e4 of one another come to no such
#: number unless divided by a temperature below 0.01.
LEAST_LOG_P = -1e6


class Loss(ABC):
    """A function of replayed blocks, and of nothing else but how far training has come."""

    scope: Scope = "proposals"
    #: Whether it depends on what the drafter proposed; where not, a step need not find that out.
    uses_proposals = True
    #: Share of all optimizer steps that are done, in [0, 1); set before each.
    progress = 0.0

    @abstractmethod
    def __call__(self, blocks: Blocks) -> LossOutput: ...


class StreamLoss(Loss):
    """A value a slot on the accepted and on the rejected stream, and the weighted mean of both.

    Args:
        gamma: decay over the block's positions: slot ``k`` of the rejected stream weighs ``gamma^(k-1)``.
        accepted_gamma: the same for the accepted stream; None takes ``gamma``.
        accepted_weight, rejected_weight: weights of the streams; a weight of 0 skips its stream.
        include_correction: count the correction slot ``n + 1`` in the accepted stream too.
        accept_until_fail: keep only the first slot of the rejected stream (Spec-AUF, arXiv 2607.01893).
        normalization: see :data:`Normalization`.

    Raises:
        ValueError: if a weight is negative, both are 0, or gamma lies outside (0, 1].
    """

    def __init__(
        self,
        gamma: float = 1.0,
        accepted_gamma: float | None = None,
        accepted_weight: float = 1.0,
        rejected_weight: float = 1.0,
        include_correction: bool = False,
        accept_until_fail: bool = False,
        normalization: Normalization = "token",
    ) -> None:
        gammas = (gamma if accepted_gamma is None else accepted_gamma, gamma)
        for decay in gammas:
            if not 0 < decay <= 1:
                raise ValueError(f"gamma and accepted_gamma must lie in (0, 1], found {decay}.")
        if min(accepted_weight, rejected_weight) < 0 or accepted_weight + rejected_weight == 0:
            raise ValueError(
                f"Stream weights must be 0 or more and not both 0, found {accepted_weight} and {rejected_weight}."
            )
        if normalization not in get_args(Normalization):
            raise ValueError(f"normalization must be 'stream' or 'token', found {normalization!r}.")
        self.gammas = dict(zip(get_args(Stream), gammas, strict=True))
        self.stream_weights = (accepted_weight, rejected_weight)
        self.include_correction = include_correction
        self.accept_until_fail = accept_until_fail
        self.normalization = normalization
        self.scope = "until_fail" if accept_until_fail or rejected_weight == 0 else "proposals"

    #: Whether both streams have the same value at a slot.
    same_on_both = True

    @abstractmethod
    def values(self, blocks: Blocks, used: Tensor, stream: Stream) -> Tensor:
        """``[n]``: the values of a stream's slots, those where ``used [N, K]`` is True."""

    def decay(self, slots: int, stream: Stream) -> Tensor:
        """``[K]``: what each position of a stream weighs."""
        return power_decay(slots, self.gammas[stream])

    def usable(self, blocks: Blocks) -> Tensor:
        """``[N, K]``: slots that may count at all."""
        return blocks.valid

    def weights(self, blocks: Blocks, stream: Stream) -> Tensor:
        """``[N, K]``: what each slot weighs within a stream, the stream's own weight left out."""
        if stream == "accepted":
            member = blocks.accepted_stream(self.include_correction)
        else:
            member = blocks.rejected_stream()
            if self.accept_until_fail:
                member = member & blocks.until_fail()
        decay = self.decay(blocks.proposals.shape[1], stream).to(blocks.draft_states.device)
        return decay * (member & self.usable(blocks))

    def importance(self, blocks: Blocks, values: Tensor, used: Tensor) -> Tensor:
        """``[N, K]``: a factor on the weights that depends on the values ``[N, K]``, known where ``used``.

        Only where :attr:`same_on_both`.
        """
        return torch.ones_like(values)

    def __call__(self, blocks: Blocks) -> LossOutput:
        weights = [w * self.weights(blocks, s) for s, w in zip(get_args(Stream), self.stream_weights, strict=True)]
        masks = [weight > 0 for weight in weights]
        if self.same_on_both:
            # A slot may stand in both streams: it is computed once.
            used = masks[0] | masks[1]
            every = blocks.draft_states.new_zeros(used.shape, dtype=torch.float32)
            every = every.masked_scatter(used, self.values(blocks, used, "accepted"))
            factor = self.importance(blocks, every.detach(), used)
            values, weights = [every[mask] for mask in masks], [weight * factor for weight in weights]
        else:
            values = [self.values(blocks, m, s) for s, m in zip(get_args(Stream), masks, strict=True)]
        kept = [weight[mask] for weight, mask in zip(weights, masks, strict=True)]
        means = [weighted_mean(v, w) for v, w in zip(values, kept, strict=True)]
        if self.normalization == "token":
            loss = weighted_mean(torch.cat(values), torch.cat(kept))
        else:
            # A stream without a slot in this batch, on any rank, has no mean and takes no part.
            present = ranks.total(torch.stack([w.sum() for w in kept])) > 0
            loss = weighted_mean(torch.stack(means), present * means[0].new_tensor(self.stream_weights))
        return LossOutput(loss, {name: mean.detach() for name, mean in zip(get_args(Stream), means, strict=True)})


def on_recorded(scored_on: ScoredOn) -> bool:
    """Whether the target is asked on the recorded text.

    Raises:
        ValueError: if it is neither of :data:`ScoredOn`.
    """
    if scored_on not in get_args(ScoredOn):
        raise ValueError(f"scored_on must be 'proposals' or 'recorded', found {scored_on!r}.")
    return scored_on == "recorded"


class TargetView:
    """How the target's distribution is shown to the drafter.

    Args:
        temperature: the target's logits are divided by it. 1 is the target's own distribution; the nearer to 0,
            the nearer to its argmax, which is what decoding at temperature 0 accepts.
        top_k: keep only the target's ``k`` most likely tokens and spread what is left evenly over the others, as
            where an engine gives no more; None keeps the whole distribution.
        renormalize: renormalise the target's law over the drafter's vocabulary, where that is smaller: a divergence
            needs it, an acceptance rate must not.

    Raises:
        ValueError: if a number lies outside its range.
    """

    def __init__(self, temperature: float = 1.0, top_k: int | None = None, renormalize: bool = True) -> None:
        if not LEAST_TEMPERATURE <= temperature < float("inf"):
            raise ValueError(f"target_temperature must be {LEAST_TEMPERATURE:g} or more, found {temperature}.")
        if top_k is not None and top_k < 1:
            raise ValueError(f"target_top_k must be 1 or more, or null, found {top_k}.")
        self.temperature, self.top_k, self.renormalize = temperature, top_k, renormalize
        self._spread = torch.zeros(())
        self._slots = 0
        self._counting = False

    def compare(self, fn: SlotFunction, blocks: Blocks, used: Tensor, *extras: Tensor) -> Tensor:
        """``fn(draft_logits, log_p, *extras)`` at the slots where ``used [N, K]`` is True: ``[n]``.

        ``log_p`` are the target's log-probabilities of the tokens that the drafter's head has.

        Args:
            extras: ``[N, K]`` each, handed on slot by slot.

        Raises:
            ValueError: if the blocks carry none of the target's states.
        """
        if blocks.target_states is None:
            raise ValueError("This loss distils from the target, but the blocks carry none of the target's states.")
        head = blocks.head

        def with_target(draft_logits: Tensor, states: Tensor, *more: Tensor) -> Tensor:
            with torch.no_grad():
                log_p = self._divided(blocks.target_logits(states)).log_softmax(-1).clamp_(min=LEAST_LOG_P)
                if self.top_k is not None:
                    log_p, mass = keep_top_k(log_p, self.top_k)
                    if self._counting:
                        self._spread = self._spread.to(mass) + mass.sum()
                        self._slots += len(mass)
                kept = head.restrict(log_p)
                if self.renormalize and kept.shape != log_p.shape:
                    kept = kept.log_softmax(-1)
            return fn(draft_logits, kept, *more)

        self._counting = True  # and not where a backward pass computes the chunks again
        try:
            return per_slot(
                with_target, blocks.draft_states[used], head, blocks.target_states[used], *(e[used] for e in extras)
            )
        finally:
            self._counting = False

    def _divided(self, logits: Tensor) -> Tensor:
        return logits if self.temperature == 1 else logits / self.temperature

    def report(self) -> dict[str, Tensor]:
        """The approximation's error since the last report: the mean mass outside the top k."""
        if self.top_k is None:
            return {}
        mean = self._spread / max(1, self._slots)
        self._spread, self._slots = torch.zeros(()), 0
        return {"target_mass_outside_top_k": mean}


class DistilledLoss(StreamLoss):
    """A :class:`StreamLoss` that compares the drafter with the target's distribution.

    Args:
        gamma, accept_until_fail, accepted_gamma, accepted_weight, rejected_weight, include_correction,
            normalization: see :class:`StreamLoss`.
        target_temperature, target_top_k: see :class:`TargetView`.
        scored_on: see :data:`ScoredOn`.

    Raises:
        ValueError: if ``scored_on`` is neither.
    """

    #: See :class:`TargetView`.
    renormalize = True

    def __init__(
        self,
        gamma: float = 1.0,
        accept_until_fail: bool = False,
        target_temperature: float = 1.0,
        accepted_gamma: float | None = None,
        accepted_weight: float = 1.0,
        rejected_weight: float = 1.0,
        include_correction: bool = False,
        normalization: Normalization = "token",
        target_top_k: int | None = None,
        scored_on: ScoredOn = "proposals",
    ) -> None:
        super().__init__(
            gamma, accepted_gamma, accepted_weight, rejected_weight, include_correction, accept_until_fail,
            normalization,
        )  # fmt: skip
        self.view = TargetView(target_temperature, target_top_k, self.renormalize)
        if on_recorded(scored_on):
            self.scope = "recorded"

    def __call__(self, blocks: Blocks) -> LossOutput:
        loss, parts = super().__call__(blocks)
        return LossOutput(loss, parts | self.view.report())


class SlotLoss(DistilledLoss):
    """One divergence between target and drafter on every slot: subclasses give :meth:`slot`."""

    @abstractmethod
    def slot(self, draft_logits: Tensor, target_logits: Tensor) -> Tensor:
        """``[n, vocab], [n, vocab] -> [n]``, differentiable in the first; the second are log-probabilities."""

    def values(self, blocks: Blocks, used: Tensor, stream: Stream) -> Tensor:
        return self.view.compare(self.slot, blocks, used)
