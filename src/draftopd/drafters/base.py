"""The protocol every drafter follows.

A drafter reads features of the target's tapped layers and proposes the ``K = block_size - 1`` tokens after an anchor.
It does so in two settings with the same result: at many anchors of recorded sequences at once (:meth:`Drafter.replay`,
for training), and one block at a time while decoding (:meth:`Drafter.start`, :meth:`Drafter.observe`,
:meth:`Drafter.draft`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, ClassVar, NamedTuple

from torch import Tensor, nn

from draftopd.drafters.config import DrafterConfig
from draftopd.targets.cache import PositionStore
from draftopd.targets.head import LMHead
from draftopd.targets.target import Target

#: Picks tokens ``[..., n]`` from the drafter's states ``[..., n, hidden]`` of its next ``n`` slots. A block-parallel
#: drafter calls it once per block; an autoregressive one once per slot, and continues from the token.
Chooser = Callable[[Tensor], Tensor]


class Draft(NamedTuple):
    """States ``hidden [batch, A, K, hidden]`` before the LM head, proposals ``tokens [batch, A, K]``."""

    hidden: Tensor
    tokens: Tensor


class Drafter(nn.Module, ABC):
    """Base class; see the module's docstring for the two settings.

    Args:
        config: everything but the weights, of the type ``config_class``.
    """

    #: Short name, as in ``configs/drafter/``.
    kind: ClassVar[str]
    config_class: ClassVar[type[DrafterConfig]]
    #: Whether each proposal depends on the ones before it.
    autoregressive = False

    def __init__(self, config: DrafterConfig) -> None:
        super().__init__()
        self.config = config

    @property
    def block_size(self) -> int:
        """Anchor plus proposals; may be changed at any time."""
        return self.config.block_size

    @block_size.setter
    def block_size(self, size: int) -> None:
        self.config = replace(self.config, block_size=size)

    @property
    def num_proposals(self) -> int:
        return self.config.block_size - 1

    @property
    def target_layer_ids(self) -> tuple[int, ...]:
        """Target layers read; layer ``i`` means the output of layer ``i``."""
        return self.config.target_layer_ids

    def head(self, target: Target) -> LMHead:
        """The LM head for its states: the drafter's own if it has one, else the target's."""
        return target.head

    @abstractmethod
    def replay(
        self, target: Target, features: Tensor, ids: Tensor, anchors: Tensor, choose: Chooser,
        begins: Tensor | None = None,
    ) -> Draft:  # fmt: skip
        """Draft at many anchors of recorded sequences in one pass.

        Args:
            features: ``[batch, n, taps * hidden]`` of the recorded tokens at positions ``0..n-1``.
            ids: ``[batch, n]`` these tokens.
            anchors: ``[batch, A]`` positions; 1 or more for an autoregressive drafter, whose first step needs the
                feature before the anchor.
            choose: picks the proposals.
            begins: ``[batch, n]``, for rows of several sequences: the index in the row where each token's sequence
                begins. ``anchors`` are then indices in the row; a block sees only its own sequence, and positions
                count from its beginning.
        """

    @abstractmethod
    def start(self, capacity: int) -> Any:
        """A fresh decoding state for sequences up to ``capacity`` tokens."""

    def stores(self, state: Any) -> Sequence[PositionStore]:
        """Stores of all of a decoding state; empty if steps replace its tensors, which rules out CUDA graphs."""
        return ()

    @abstractmethod
    def select(self, state: Any, rows: Tensor) -> None:
        """Keep only these rows of the batch; the others have ended."""

    @abstractmethod
    def observe(self, target: Target, state: Any, features: Tensor, ids: Tensor, positions: Tensor) -> None:
        """Add tokens ``ids [batch, n]`` at consecutive ``positions [batch, n]`` and the target's features of them.

        ``features [batch, n, taps * hidden]``. Rejected proposals may be among them: entries at or after the next
        anchor are never read, and are overwritten later. A row's first position is at most the anchor before.
        """

    @abstractmethod
    def draft(
        self, target: Target, state: Any, anchors: Tensor, anchor_tokens: Tensor, visible: int, choose: Chooser
    ) -> Draft:
        """One block per sequence, ``A = 1``: ``anchors, anchor_tokens [batch]``, all anchors at most ``visible``."""

    def check_weights(self, where: str) -> None:
        """Refuse a checkpoint's weights that contradict each other; few drafters have weights to compare.

        Raises:
            DrafterError: if they do; ``where`` names the checkpoint.
        """
