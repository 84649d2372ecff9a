"""Divergences between the target ``p`` and the drafter ``q`` of one slot, from logits."""

from __future__ import annotations

from torch import Tensor


def forward_kl(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """``KL(p || q)``: ``[n, vocab], [n, vocab] -> [n]``. The drafter must cover what the target does."""
    log_p, log_q = teacher_logits.log_softmax(-1), student_logits.log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def reverse_kl(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """``KL(q || p)``: ``[n, vocab], [n, vocab] -> [n]``. The drafter must avoid what the target does not."""
    log_p, log_q = teacher_logits.log_softmax(-1), student_logits.log_softmax(-1)
    return (log_q.exp() * (log_q - log_p)).sum(-1)
