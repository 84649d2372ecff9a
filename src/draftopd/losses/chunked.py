"""Per-slot losses over the full vocabulary without ever holding ``[positions, vocabulary]``.

Under a frozen head, value and gradient are computed together, chunk by chunk; only the value ``[n]`` and the gradient
of the drafter's states ``[n, hidden]`` are kept. Under a trainable head the backward pass recomputes the chunks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from draftopd.targets.head import LMHead

#: ``fn(draft_logits [n, vocab], *extras [n, ...]) -> [n]`` or ``[n, m]``, differentiable in its first argument.
SlotFunction = Callable[..., Tensor]


def per_slot(fn: SlotFunction, drafted: Tensor, head: LMHead, *extras: Tensor, chunk: int | None = None) -> Tensor:
    """``fn`` of every slot's logits, ``[n]`` in float32, or ``[n, m]`` where it gives ``m`` values per slot.

    Args:
        fn: the values of one slot from its logits; slots must not mix.
        drafted: ``[n, hidden]``; receives the gradient.
        head: the drafter's LM head; receives the gradient too unless it is frozen.
        extras: tensors ``[n, ...]`` handed to ``fn`` with the logits; they get no gradient.
        chunk: slots at once; default as many as :meth:`~draftopd.targets.head.LMHead.rows_at_once` allows.
    """
    if chunk is None:
        chunk = head.rows_at_once()
    if head.weight.requires_grad and torch.is_grad_enabled():

        def values(states: Tensor, *more: Tensor) -> Tensor:
            return fn(head.logits(states), *more).float()

        parts = zip(*(t.split(chunk) for t in (drafted, *extras)), strict=True)
        return torch.cat([checkpoint(values, *part, use_reentrant=False) for part in parts])
    result: Tensor = _PerSlot.apply(drafted, fn, head, chunk, *extras)
    return result


class _PerSlot(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, drafted: Tensor, fn: SlotFunction, head: LMHead, chunk: int, *extras: Tensor) -> Tensor:
        wanted = ctx.needs_input_grad[0]
        # Allocated once: tensors that outlive a chunk would lie between its buffers and fragment the memory.
        values = gradient = drafted.new_empty(0)
        for start in range(0, max(1, drafted.shape[0]), chunk):
            part = slice(start, start + chunk)
            states = drafted[part].detach().requires_grad_(wanted)
            with torch.set_grad_enabled(wanted):
                value = fn(head.logits(states), *(extra[part] for extra in extras))
                columns = value.sum(0, keepdim=value.ndim == 1).unbind()
            if not start:
                values = value.new_empty(len(drafted), *value.shape[1:], dtype=torch.float32)
                gradient = drafted.new_empty(len(drafted), len(columns), drafted.shape[-1]) if wanted else gradient
            values[part] = value.detach()
            for number, column in enumerate(columns if wanted else ()):
                (gradient[part, number],) = torch.autograd.grad(column, states, retain_graph=column is not columns[-1])
        if wanted:
            ctx.save_for_backward(gradient)
        ctx.extras = len(extras)
        return values

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors  # [n, m, hidden]
        outer = grads[0].unflatten(0, (-1, 1)) if grads[0].ndim == 1 else grads[0]
        return ((gradient * outer[..., None].to(gradient.dtype)).sum(1), *[None] * (3 + ctx.extras))
