"""The protocol every drafter follows.

A drafter reads features of the target's tapped layers and proposes the ``K = block_size - 1`` tokens
after an anchor. It does so in two settings with the same weights and the same result: over many
anchors of recorded sequences at once (:meth:`Drafter.replay`, for training), and one block at a time
while decoding (:meth:`Drafter.start`, :meth:`Drafter.observe`, :meth:`Drafter.draft`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from typing_extensions import Self

from draftopd.drafters.attention import Kernel
from draftopd.drafters.checkpoint import cast, read_checkpoint, write_checkpoint
from draftopd.errors import DrafterError
from draftopd.io.hub import resolve
from draftopd.targets.cache import PositionStore
from draftopd.targets.head import LMHead
from draftopd.targets.target import Target

#: Picks tokens ``[..., n]`` from the drafter's states ``[..., n, hidden]`` of its next ``n`` slots. A block-parallel
#: drafter calls it once a block; an autoregressive one once a slot, and goes on from the token it gets.
Chooser = Callable[[Tensor], Tensor]

#: Longest block: a larger number is a mistake, and would only take memory.
MOST_BLOCK = 1024


class Draft(NamedTuple):
    """States ``hidden [batch, A, K, hidden]`` before the LM head, proposals ``tokens [batch, A, K]``."""

    hidden: Tensor
    tokens: Tensor


class TargetShape(NamedTuple):
    """What of a target a drafter is made for."""

    hidden_size: int
    vocab_size: int
    num_layers: int


class HasShape(Protocol):
    """A target, or what its files say of it."""

    @property
    def hidden_size(self) -> int: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def num_layers(self) -> int: ...


class Drafter(nn.Module, ABC):
    """Base class; see the module's text for the two settings."""

    #: Anchor plus proposals.
    block_size: int
    #: Target layers read; layer ``i`` means the output of layer ``i``.
    target_layer_ids: tuple[int, ...]
    #: Whether it may read the states after the target's final norm too, as layer ``num_layers``.
    reads_final_norm = False
    #: Whether each proposal depends on the ones before it.
    autoregressive = False
    #: Keep only what goes into a layer, and compute the layer again on the way back: less memory, more time.
    activation_checkpointing = False
    #: The kernel that attends in :meth:`replay`, where there is a choice.
    attention: Kernel = "auto"

    def through(self, layer: Callable[..., Tensor], *inputs: Any) -> Tensor:
        """``layer(*inputs)``, computed again in the backward pass with :attr:`activation_checkpointing`."""
        if not (self.activation_checkpointing and torch.is_grad_enabled()):
            return layer(*inputs)
        output: Tensor = checkpoint(layer, *inputs, use_reentrant=False)
        return output

    @property
    def num_proposals(self) -> int:
        return self.block_size - 1

    def head(self, target: Target) -> LMHead:
        """Maps its states to logits: the target's own LM head, unless the drafter has one."""
        return target.head

    @abstractmethod
    def replay(
        self,
        target: Target,
        features: Tensor,
        ids: Tensor,
        anchors: Tensor,
        choose: Chooser,
        begins: Tensor | None = None,
    ) -> Draft:
        """Draft at many anchors of recorded sequences in one pass.

        Args:
            features: ``[batch, n, taps * hidden]`` of the recorded tokens at positions ``0..n-1``.
            ids: ``[batch, n]`` these tokens.
            anchors: ``[batch, A]`` positions; 1 or more where the drafter is autoregressive, whose first step needs
                the feature before the anchor.
            choose: picks the proposals.
            begins: ``[batch, n]``, for rows that hold several sequences: where in the row each token's own begins.
                ``anchors`` are then places in the row; a block sees its own sequence only, and positions count from
                its beginning.
        """

    @abstractmethod
    def start(self, capacity: int) -> Any:
        """A fresh decoding state for sequences up to ``capacity`` tokens."""

    def stores(self, state: Any) -> Sequence[PositionStore]:
        """Where a decoding state is kept in place, all of it; empty where a step puts new tensors into the state,
        which rules out CUDA graphs."""
        return ()

    @abstractmethod
    def select(self, state: Any, rows: Tensor) -> None:
        """Keep these rows of the batch, where the others have ended."""

    @abstractmethod
    def observe(self, target: Target, state: Any, features: Tensor, ids: Tensor, positions: Tensor) -> None:
        """Take in tokens ``ids [batch, n]`` at consecutive ``positions [batch, n]`` and the target's features of them.

        ``features [batch, n, taps * hidden]``. Rejected proposals may be among them: what stands at or after the
        next anchor is never read, and is overwritten later. A row's first position is at most the anchor before.
        """

    @abstractmethod
    def draft(
        self, target: Target, state: Any, anchors: Tensor, anchor_tokens: Tensor, visible: int, choose: Chooser
    ) -> Draft:
        """One block a sequence: ``anchors, anchor_tokens [batch]``, all anchors at most ``visible``.

        Returns a draft with ``A = 1``.
        """

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Its public ``config.json`` as plain containers: with the tensors all that makes the drafter."""

    @classmethod
    @abstractmethod
    def assemble(
        cls, raw: dict[str, Any], tensors: dict[str, Tensor], where: str, num_target_layers: int | None = None
    ) -> Self:
        """The drafter of a ``config.json`` and its tensors, in float32.

        Args:
            where: names the checkpoint in errors.
            num_target_layers: depth of its target, where the checkpoint does not say it.

        Raises:
            DrafterError: if a field is missing or garbled, or a tensor is missing, extra or misshapen.
        """

    @classmethod
    def load(cls, directory: str | Path, num_target_layers: int | None = None) -> Self:
        """Read a checkpoint in the public format, in float32; see :meth:`assemble`.

        Raises:
            DrafterError: if it is missing, damaged, or another drafter's.
        """
        place = Path(resolve(str(directory)))
        return cls.assemble(*read_checkpoint(place), str(place), num_target_layers)

    @classmethod
    def load_for(cls, target: HasShape, directory: str | Path, block_size: int | None = None) -> Self:
        """Read a checkpoint for this target.

        Args:
            block_size: replaces the one it was trained with; None keeps it.

        Raises:
            DrafterError: as :meth:`load`, or if the drafter does not fit the target.
        """
        drafter = cls.load(directory, target.num_layers)
        if block_size is not None:
            drafter.block_size = block_size
        drafter.check_fits(target)
        return drafter

    def save(
        self, directory: Path, dtype: torch.dtype = torch.bfloat16, tensors: Mapping[str, Tensor] | None = None
    ) -> None:
        """Write config.json and model.safetensors in the public format; what was there stays whole until then.

        Args:
            tensors: its weights, where they are not here as a whole.
        """
        raw = self.describe() | {"torch_dtype": str(dtype).removeprefix("torch.")}
        write_checkpoint(Path(directory), raw, cast(self.state_dict() if tensors is None else tensors, dtype))

    @abstractmethod
    def made_for(self) -> TargetShape:
        """The target it was made for."""

    def check_fits(self, target: HasShape) -> None:
        """Refuse a target this drafter was not made for.

        Raises:
            DrafterError: naming what was found and what was expected.
        """
        if self.block_size < 2:
            raise DrafterError(
                f"block_size {self.block_size} proposes nothing: a block is the anchor plus at least one "
                "proposal, use 2 or more."
            )
        if self.block_size > MOST_BLOCK:
            raise DrafterError(
                f"block_size {self.block_size} is more than any drafter's: use {MOST_BLOCK} or less, or another one."
            )
        names = ("hidden size", "vocabulary", "number of target layers")
        its = TargetShape(target.hidden_size, target.vocab_size, target.num_layers)
        for what, mine, found in zip(names, self.made_for(), its, strict=True):
            if mine != found:
                raise DrafterError(
                    f"The drafter was made for a target whose {what} is {mine}, but this target's is {found}: "
                    "use the target it was trained with, or train a new drafter (experiment=sft)."
                )
        most = target.num_layers - (not self.reads_final_norm)
        wrong = [i for i in self.target_layer_ids if not 0 <= i <= most]
        if wrong:
            raise DrafterError(
                f"The drafter reads target layers {wrong}, but the target has layers 0 to {target.num_layers - 1}: "
                "use a drafter trained for this target."
            )
