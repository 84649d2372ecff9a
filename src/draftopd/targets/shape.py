"""The numbers of a target that a drafter is made for."""

from __future__ import annotations

from typing import NamedTuple


class TargetShape(NamedTuple):
    """Width of the states, size of the vocabulary, number of layers."""

    hidden_size: int
    vocab_size: int
    num_layers: int
