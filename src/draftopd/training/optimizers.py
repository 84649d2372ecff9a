"""Optimizers of the drafter's parameters; any function from parameters to an optimizer can replace them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any

import torch
from pydantic import Field, NonNegativeFloat
from torch.nn import Parameter
from torch.optim import AdamW, Muon, Optimizer

#: Ranges of the options, for the check of configurations.
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, lt=1)]


def adamw(
    parameters: Iterable[Parameter],
    lr: Rate = 3e-4,
    betas: tuple[Fraction, Fraction] = (0.9, 0.95),
    weight_decay: NonNegativeFloat = 0.0,
) -> AdamW:
    """AdamW over all parameters."""
    return AdamW(parameters, lr=lr, betas=(betas[0], betas[1]), weight_decay=weight_decay)


def muon(
    parameters: Iterable[Parameter],
    lr: Rate = 3e-4,
    betas: tuple[Fraction, Fraction] = (0.9, 0.95),
    weight_decay: NonNegativeFloat = 0.0,
    momentum: Fraction = 0.95,
) -> Optimizer:
    """Muon for weight matrices, with updates as large as AdamW's, and AdamW for all other parameters.

    Matrices that are much taller than wide, such as LM heads over a vocabulary, count as others.

    Args:
        betas: of AdamW.
        momentum: of Muon.
    """
    learnt = [p for p in parameters if p.requires_grad]
    matrices = [p for p in learnt if p.ndim == 2 and p.shape[0] < 16 * p.shape[1]]
    inside = {id(p) for p in matrices}
    others = [p for p in learnt if id(p) not in inside]
    shared: dict[str, Any] = {"lr": lr, "weight_decay": weight_decay}
    parts: list[Optimizer] = [Muon(matrices, momentum=momentum, adjust_lr_fn="match_rms_adamw", **shared)]
    return Together([*parts, AdamW(others, betas=(betas[0], betas[1]), **shared)] if others else parts)


class Together(Optimizer):
    """Several optimizers, each with its own parameters, that step as one over the groups of all."""

    def __init__(self, parts: list[Optimizer]) -> None:
        self.parts = parts
        super().__init__([group for part in parts for group in part.param_groups], {})
        self._join()

    def _join(self) -> None:
        # One list of the parts' own groups, so that a schedule's rates reach them.
        self.param_groups = [group for part in self.parts for group in part.param_groups]

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.parts:
            part.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self._join()
