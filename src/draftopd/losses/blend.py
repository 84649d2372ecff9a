"""Two losses at once, the second's share changing along training: schedules between losses, curricula, combinations."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from draftopd.losses.base import Loss, LossOutput
from draftopd.replay.blocks import Blocks, Scope

Share = Annotated[float, Field(ge=0, le=1)]

#: From the least of the target's states to the most. The recorded text's are others.
_SCOPES: tuple[Scope, ...] = ("none", "until_fail", "proposals")


class Blend(Loss):
    """``(1 - s) first + s second``; ``s`` goes in a straight line from ``begin`` to ``end`` over all steps.

    Both see the same blocks. An autoregressive drafter goes on from its own tokens where either loss asks the target
    about them, so that beside such a loss one with hard labels meets, behind a slot that differs from the text, labels
    of a text that the drafter has left.

    Args:
        first, second: any losses.
        begin, end: the second's share at the first and after the last step.

    Raises:
        ValueError: if a share lies outside [0, 1], or one loss asks the target on the recorded text, the other on the
            drafter's own.
    """

    def __init__(self, *, first: Loss, second: Loss, begin: Share = 0.0, end: Share = 1.0) -> None:
        for share in (begin, end):
            if not 0 <= share <= 1:
                raise ValueError(f"begin and end are shares, in [0, 1], found {share}.")
        self.first, self.second = first, second
        self.begin, self.end = begin, end
        self.scope = _wider(first.scope, second.scope)
        self.uses_proposals = first.uses_proposals or second.uses_proposals
        self.logit_copies = max(first.logit_copies, second.logit_copies)  # one follows the other

    def __call__(self, blocks: Blocks) -> LossOutput:
        self.first.progress = self.second.progress = self.progress
        share = self.begin + (self.end - self.begin) * self.progress
        (first, parts), (second, more) = self.first(blocks), self.second(blocks)
        named = {"first": first.detach(), "second": second.detach(), "share": first.new_tensor(share)}
        named |= {f"first_{name}": value for name, value in parts.items()}
        named |= {f"second_{name}": value for name, value in more.items()}
        return LossOutput(first.lerp(second, share), named)


def _wider(first: Scope, second: Scope) -> Scope:
    scopes = {first, second}
    if "recorded" in scopes:
        if scopes - {"recorded", "none"}:
            raise ValueError("Both losses of a blend must ask the target on the same text: set scored_on of both.")
        return "recorded"
    return max(scopes, key=_SCOPES.index)
