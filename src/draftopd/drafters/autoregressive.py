"""Drafters that propose token by token: one layer that reads the target's features and then its own states.

An entry pairs a token with the state before it: entry ``p`` holds token ``x_p`` and the target's feature of
``x_{p-1}``, has position ``p - 1`` in the rotary embedding, and predicts ``x_{p+1}``. A block at anchor ``a`` begins
with entry ``a``; its next entries pair the drafter's own proposals with its own states. Its context is the keys and
values of the entries before the anchor. With one layer these depend only on the recorded tokens and features: no entry
has to attend for them, and a block's own keys and values are never kept.

Proposals depend on the drafter's own earlier proposals in replay as in decoding. Therefore drafting without decoding is
exact (see :mod:`draftopd.rollout.walk`).
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from draftopd.drafters.attention import DraftAttention, KeysValues, Rotary, View
from draftopd.drafters.base import Chooser, Draft, Drafter
from draftopd.drafters.recompute import run_layer
from draftopd.targets.cache import PositionStore
from draftopd.targets.target import Target


class Entry(NamedTuple):
    """``states [..., width]`` that the layer attends with, and ``residual [..., hidden]`` that it adds to."""

    states: Tensor
    residual: Tensor


@dataclass
class DraftState:
    """Keys and values of all entries so far, and the features ``[batch, n, hidden]`` of the tokens observed last.

    ``first [batch]``: the position of the first of these tokens.
    """

    entries: PositionStore
    features: Tensor | None = None
    first: Tensor | None = None

    def features_at(self, positions: Tensor) -> Tensor:
        """``[batch, m] -> [batch, m, hidden]``: the features at positions among those observed last."""
        assert self.features is not None and self.first is not None
        return _at(self.features, positions - self.first[:, None])


class DraftLayer(Protocol):
    """The parts of a layer that drafting uses."""

    self_attn: DraftAttention
    post_attention_layernorm: nn.Module
    mlp: nn.Module


class AutoregressiveDrafter(Drafter):
    """One layer that drafts token by token; subclasses define its input and output."""

    autoregressive = True
    #: See :func:`~draftopd.drafters.recompute.run_layer`.
    activation_checkpointing = False
    rotary_emb: nn.Module

    @property
    @abstractmethod
    def layer(self) -> DraftLayer:
        """The drafter's only layer."""

    @abstractmethod
    def fuse(self, features: Tensor) -> Tensor:
        """The states ``[..., hidden]`` of a first step from the target's features ``[..., taps * hidden]``."""

    @abstractmethod
    def entry(self, target: Target, tokens: Tensor, states: Tensor) -> Entry:
        """The entry of tokens ``[...]`` and the states before them ``[..., hidden]``."""

    @abstractmethod
    def leave(self, output: Tensor) -> tuple[Tensor, Tensor]:
        """The layer's output ``[..., hidden]`` as the LM head's input and as the state of the next step."""

    def replay(
        self, target: Target, features: Tensor, ids: Tensor, anchors: Tensor, choose: Chooser,
        begins: Tensor | None = None,
    ) -> Draft:  # fmt: skip
        states = self.fuse(features)
        positions, first = torch.arange(ids.shape[1] - 1, device=ids.device).expand(ids.shape[0], -1), None
        if begins is not None:
            positions, first = positions - begins[:, 1:], begins.gather(1, anchors)
        context = self._keys_values(self.entry(target, ids[:, 1:], states[:, :-1]).states, positions)
        before = _at(states, (anchors - 1).clamp_min(0))
        # The context begins with entry 1, so that a sequence's first entry has the index where the sequence begins.
        view = View.in_chunks(anchors - 1, first, 1)
        return self._blocks(target, context, before, view, ids.gather(1, anchors), choose)

    def start(self, capacity: int) -> DraftState:
        return DraftState(PositionStore(capacity))

    def select(self, state: DraftState, rows: Tensor) -> None:
        assert state.features is not None and state.first is not None
        state.entries.select(rows)
        state.features, state.first = state.features[rows], state.first[rows]

    def observe(self, target: Target, state: DraftState, features: Tensor, ids: Tensor, positions: Tensor) -> None:
        states = self.fuse(features)
        if state.features is None:
            # The first token of a text has no state before it, and therefore no entry.
            before, ids, indices = states[:, :-1], ids[:, 1:], positions[:, 1:]
        else:
            last = state.features_at(positions[:, :1] - 1)
            before, indices = torch.cat([last, states[:, :-1]], 1), positions
        state.features, state.first = states, positions[:, 0]
        keys, values = self._keys_values(self.entry(target, ids, before).states, indices - 1)
        state.entries.write(keys, values, indices)

    def draft(
        self, target: Target, state: DraftState, anchors: Tensor, anchor_tokens: Tensor, visible: int, choose: Chooser
    ) -> Draft:
        before, view = state.features_at(anchors[:, None] - 1), View(anchors[:, None] - 1)
        # There is no entry 0.
        keys, values = (t[:, :, 1:] for t in state.entries.read(visible))
        return self._blocks(target, (keys, values), before, view, anchor_tokens[:, None], choose)

    def _keys_values(self, states: Tensor, positions: Tensor) -> KeysValues:
        return self.layer.self_attn.keys_values(states, self.rotary_emb(states, positions))

    def _blocks(
        self, target: Target, context: KeysValues, states: Tensor, view: View, tokens: Tensor, choose: Chooser
    ) -> Draft:
        """Blocks that begin with ``tokens [batch, A]`` after ``states [batch, A, hidden]``.

        ``context``: keys and values of the entries from 1 on; its view ends before the anchors' own entries. Like the
        first token of a text, that of a packed sequence has no entry that counts.
        """
        layer = self.layer

        def pass_layer(entry: Entry, own: KeysValues, rotary: Rotary) -> Tensor:
            output = entry.residual + layer.self_attn(entry.states, context, own, view, rotary)
            return output + layer.mlp(layer.post_attention_layernorm(output))

        keys, values, hidden, proposals = [], [], [], []
        for step in range(self.num_proposals):
            entry = self.entry(target, tokens, states)
            rotary = self.rotary_emb(entry.states, view.positions + step)
            key, value = layer.self_attn.keys_values(entry.states, rotary)
            keys.append(key)
            values.append(value)
            own = torch.stack(keys, 3), torch.stack(values, 3)
            output = run_layer(pass_layer, entry, own, rotary, recompute=self.activation_checkpointing)
            slot, states = self.leave(output)
            tokens = choose(slot[:, :, None])[..., 0]
            hidden.append(slot)
            proposals.append(tokens)
        return Draft(torch.stack(hidden, 2), torch.stack(proposals, 2))


def _at(states: Tensor, indices: Tensor) -> Tensor:
    """``[batch, n, hidden], [batch, m] -> [batch, m, hidden]``."""
    return states.gather(1, indices[..., None].expand(-1, -1, states.shape[-1]))
