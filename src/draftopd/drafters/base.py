"""The protocol every drafter follows.

A drafter reads features of the target's tapped layers and proposes the ``K = block_size - 1`` tokens
after an anchor. It does so in two settings with the same weights and the same result: over many
anchors of recorded sequences at once (:meth:`Drafter.replay`, for training), and one block at a time
while decoding (:meth:`Drafter.start`, :meth:`Drafter.observe`, :meth:`Drafter.draft`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from draftopd.errors import DrafterError
from draftopd.targets.target import Target

#: Picks tokens ``[...]`` from the drafter's states ``[..., hidden]``; autoregressive drafters call it
#: once a slot, block-parallel ones once a block.
Chooser = Callable[[Tensor], Tensor]


class Draft(NamedTuple):
    """States ``hidden [batch, A, K, hidden]`` before the LM head, proposals ``tokens [batch, A, K]``."""

    hidden: Tensor
    tokens: Tensor


class Drafter(nn.Module, ABC):
    """Base class; see the module's text for the two settings."""

    #: Anchor plus proposals.
    block_size: int
    #: Target layers read; layer ``i`` means the output of layer ``i``.
    target_layer_ids: tuple[int, ...]

    @property
    def num_proposals(self) -> int:
        return self.block_size - 1

    @abstractmethod
    def replay(
        self, target: Target, features: Tensor, anchors: Tensor, anchor_tokens: Tensor, choose: Chooser
    ) -> Draft:
        """Draft at many anchors of recorded sequences in one pass.

        Args:
            features: ``[batch, n, taps * hidden]`` of the recorded tokens at positions ``0..n-1``.
            anchors: ``[batch, A]`` positions.
            anchor_tokens: ``[batch, A]`` the recorded tokens there.
            choose: picks the proposals.
        """

    @abstractmethod
    def start(self, capacity: int) -> Any:
        """A fresh decoding state for sequences up to ``capacity`` tokens."""

    @abstractmethod
    def select(self, state: Any, rows: Tensor) -> None:
        """Keep these rows of the batch, where the others have ended."""

    @abstractmethod
    def observe(self, state: Any, features: Tensor, positions: Tensor) -> None:
        """Take in the target's features ``[batch, n, taps * hidden]`` of tokens at ``positions [batch, n]``.

        Features of rejected proposals may be among them: what stands at or after the next anchor is
        never read, and is overwritten later.
        """

    @abstractmethod
    def draft(
        self, target: Target, state: Any, anchors: Tensor, anchor_tokens: Tensor, visible: int, choose: Chooser
    ) -> Draft:
        """One block a sequence: ``anchors, anchor_tokens [batch]``, all anchors at most ``visible``.

        Returns a draft with ``A = 1``.
        """

    @abstractmethod
    def save(self, directory: Path) -> None:
        """Write the checkpoint in the drafter's public format."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """The checkpoint's ``config.json`` as plain containers: with the tensors all that makes the drafter."""

    def check_fits(self, target: Target) -> None:
        """Refuse a target this drafter was not made for.

        Raises:
            DrafterError: naming what was found and what was expected.
        """
        if self.block_size < 2:
            raise DrafterError(
                f"block_size {self.block_size} proposes nothing: a block is the anchor plus at least one "
                "proposal, use 2 or more."
            )
        wrong = [i for i in self.target_layer_ids if not 0 <= i < target.num_layers]
        if wrong:
            raise DrafterError(
                f"The drafter reads target layers {wrong}, but the target has layers 0 to {target.num_layers - 1}: "
                "use a drafter trained for this target."
            )
