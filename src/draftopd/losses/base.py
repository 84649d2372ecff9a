"""The loss protocol, and the plain case: one divergence, one weighted mean."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from draftopd.losses.blocks import Blocks
from draftopd.losses.chunked import SlotFunction, per_slot
from draftopd.losses.weighting import power_decay, weighted_mean


class LossOutput(NamedTuple):
    """The scalar to minimise, and detached scalars to log beside it."""

    loss: Tensor
    parts: dict[str, Tensor]


#: Which of the target's states a loss needs: on the drafter's own tokens in every slot; up to the first
#: rejection only, where own and recorded tokens are the same (at temperature 0); or none.
TeacherScope = Literal["proposals", "until_fail", "none"]


class Loss(ABC):
    """A pure function of replayed blocks."""

    teacher: TeacherScope = "proposals"

    @abstractmethod
    def __call__(self, blocks: Blocks) -> LossOutput: ...


class SlotLoss(Loss):
    """One per-slot loss on every slot: subclasses give :meth:`slot`, this class the weighted mean.

    Args:
        gamma: slot ``k`` weighs ``gamma^(k-1)``; 1 weighs all alike.
        accept_until_fail: drop the slots after the first rejection.
        teacher_temperature: the target's logits are divided by it. 1 is the target's own distribution;
            the nearer to 0, the nearer to its argmax, which is what decoding at temperature 0 accepts.
    """

    def __init__(self, gamma: float = 1.0, accept_until_fail: bool = False, teacher_temperature: float = 1.0) -> None:
        if not 0 < gamma <= 1:
            raise ValueError(f"gamma must lie in (0, 1], found {gamma}.")
        self.gamma = gamma
        self.accept_until_fail = accept_until_fail
        self.teacher_temperature = positive(teacher_temperature, "teacher_temperature")
        self.teacher = "until_fail" if accept_until_fail else "proposals"

    @abstractmethod
    def slot(self, student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
        """``[n, vocab], [n, vocab] -> [n]``, differentiable in the first."""

    def __call__(self, blocks: Blocks) -> LossOutput:
        weights = power_decay(blocks.proposals.shape[1], self.gamma).to(blocks.student.device) * blocks.valid
        if self.accept_until_fail:
            weights = weights * blocks.until_fail()
        loss = weighted_mean(*distilled(self.slot, blocks, weights, self.teacher_temperature))
        return LossOutput(loss, {"slot": loss.detach()})


def positive(value: float, name: str) -> float:
    """The value, refused where it is not above 0."""
    if not value > 0:
        raise ValueError(f"{name} must be above 0, found {value}.")
    return value


def distilled(
    fn: SlotFunction, blocks: Blocks, weights: Tensor, teacher_temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """``fn(student_logits, teacher_logits)`` at the slots that weigh something.

    Args:
        fn: a divergence of one slot.
        weights: ``[N, K]``; slots of weight 0 are not computed.
        teacher_temperature: the target's logits are divided by it.

    Returns:
        values ``[n]`` and weights ``[n]`` of those slots.
    """
    if blocks.teacher is None:
        raise ValueError("This loss distils from the target, but the blocks carry no teacher states.")
    used = weights > 0
    head = blocks.head

    def with_teacher(student_logits: Tensor, teacher: Tensor) -> Tensor:
        with torch.no_grad():
            teacher_logits = head.logits(teacher) / teacher_temperature
        return fn(student_logits, teacher_logits)

    return per_slot(with_teacher, blocks.student[used], head, blocks.teacher[used]), weights[used]
