"""A weighted sum of two losses, whose weights change during training."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from draftopd.losses.base import Loss, LossOutput
from draftopd.replay.blocks import Blocks, Scope

Fraction = Annotated[float, Field(ge=0, le=1)]

#: In ascending order of the target's states that they include. ``recorded`` has other states.
_SCOPES: tuple[Scope, ...] = ("none", "until_fail", "proposals")


class Blend(Loss):
    """``(1 - s) first + s second``, where ``s`` changes linearly from ``begin`` to ``end`` over all steps.

    Both see the same blocks. If either loss scores the drafter's own tokens, an autoregressive drafter continues from
    these, and after a slot that differs from the text the labels of a loss with hard labels no longer fit its prefix.

    Args:
        first, second: any losses.
        begin, end: ``s`` at the first and after the last step.

    Raises:
        ValueError: if ``begin`` or ``end`` lies outside [0, 1], or if one loss scores the recorded text and the other
            the drafter's own.
    """

    def __init__(self, *, first: Loss, second: Loss, begin: Fraction = 0.0, end: Fraction = 1.0) -> None:
        for weight in (begin, end):
            if not 0 <= weight <= 1:
                raise ValueError(f"begin and end must lie in [0, 1], found {weight}.")
        self.first, self.second = first, second
        self.begin, self.end = begin, end
        self.scope = _wider(first.scope, second.scope)
        self.uses_proposals = first.uses_proposals or second.uses_proposals
        self.logit_copies = max(first.logit_copies, second.logit_copies)  # computed one after the other

    def __call__(self, blocks: Blocks) -> LossOutput:
        self.first.progress = self.second.progress = self.progress
        weight = self.begin + (self.end - self.begin) * self.progress
        (first, parts), (second, more) = self.first(blocks), self.second(blocks)
        named = {"first": first.detach(), "second": second.detach(), "share": first.new_tensor(weight)}
        named |= {f"first_{name}": value for name, value in parts.items()}
        named |= {f"second_{name}": value for name, value in more.items()}
        return LossOutput(first.lerp(second, weight), named)


def _wider(first: Scope, second: Scope) -> Scope:
    scopes = {first, second}
    if "recorded" in scopes:
        if scopes - {"recorded", "none"}:
            raise ValueError("Both losses of a blend must score the same text: set scored_on of both.")
        return "recorded"
    return max(scopes, key=_SCOPES.index)
