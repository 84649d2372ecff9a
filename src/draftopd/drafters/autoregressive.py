"""Drafters that propose token by token: one layer, fed with the target's features and then with its own states.

An entry pairs a token with the state before it: entry ``p`` holds token ``x_p`` and the target's feature of
``x_{p-1}``, stands at position ``p - 1`` for the rotary embedding, and predicts ``x_{p+1}``. A block at anchor
``a`` begins with entry ``a``; its next entries pair the drafter's own proposals with its own states. Keys and values
of the entries before the anchor are its context. Since there is one layer, they depend on the recorded tokens and
features alone: no entry has to attend for them, and what a block writes is never kept.

Proposals depend on the drafter's own earlier proposals, in replay as in decoding, so training sees what decoding
does; drafting without decoding is exact for the same reason (see :mod:`draftopd.rollout.walk`).
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

    ``first [batch]``: the position of the first of them.
    """

    entries: PositionStore
    features: Tensor | None = None
    first: Tensor | None = None

    def features_at(self, positions: Tensor) -> Tensor:
        """``[batch, m] -> [batch, m, hidden]``: of positions among those observed last."""
        assert self.features is not None and self.first is not None
        return _at(self.features, positions - self.first[:, None])


class DraftLayer(Protocol):
    """The parts of a layer that the walk through it needs."""

    self_attn: DraftAttention
    post_attention_layernorm: nn.Module
    mlp: nn.Module


class AutoregressiveDrafter(Drafter):
    """One layer that drafts token by token; subclasses say what goes into it and what comes out."""

    autoregressive = True
    #: See :func:`~draftopd.drafters.recompute.run_layer`.
    activation_checkpointing = False
    rotary_emb: nn.Module

    @property
    @abstractmethod
    def layer(self) -> DraftLayer:
        """Its one layer."""

    @abstractmethod
    def fuse(self, features: Tensor) -> Tensor:
        """The target's features ``[..., taps * hidden]`` as the states ``[..., hidden]`` of a first step."""

    @abstractmethod
    def entry(self, target: Target, tokens: Tensor, states: Tensor) -> Entry:
        """Tokens ``[...]`` and the states before them ``[..., hidden]``."""

    @abstractmethod
    def leave(self, output: Tensor) -> tuple[Tensor, Tensor]:
        """The layer's output ``[..., hidden]``, ready for the LM head, and as the state of the next step."""

    def replay(
        self,
        target: Target,
        features: Tensor,
        ids: Tensor,
        anchors: Tensor,
        choose: Chooser,
        begins: Tensor | None = None,
    ) -> Draft:
        states = self.fuse(features)
        positions, first = torch.arange(ids.shape[1] - 1, device=ids.device).expand(ids.shape[0], -1), None
        if begins is not None:
            positions, first = positions - begins[:, 1:], begins.gather(1, anchors)
        context = self._keys_values(self.entry(target, ids[:, 1:], states[:, :-1]).states, positions)
        before = _at(states, (anchors - 1).clamp_min(0))
        # Entry 1 is the context's first, so the entry after a sequence's first stands where the sequence begins.
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
            # The first token of a text has nothing before it, and no entry.
            before, ids, places = states[:, :-1], ids[:, 1:], positions[:, 1:]
        else:
            last = state.features_at(positions[:, :1] - 1)
            before, places = torch.cat([last, states[:, :-1]], 1), positions
        state.features, state.first = states, positions[:, 0]
        keys, values = self._keys_values(self.entry(target, ids, before).states, places - 1)
        state.entries.write(keys, values, places)

    def draft(
        self, target: Target, state: DraftState, anchors: Tensor, anchor_tokens: Tensor, visible: int, choose: Chooser
    ) -> Draft:
        before, view = state.features_at(anchors[:, None] - 1), View(anchors[:, None] - 1)
        # Entry 0 does not exist: the context begins with entry 1.
        keys, values = (t[:, :, 1:] for t in state.entries.read(visible))
        return self._blocks(target, (keys, values), before, view, anchor_tokens[:, None], choose)

    def _keys_values(self, states: Tensor, positions: Tensor) -> KeysValues:
        return self.layer.self_attn.keys_values(states, self.rotary_emb(states, positions))

    def _blocks(
        self, target: Target, context: KeysValues, states: Tensor, view: View, tokens: Tensor, choose: Chooser
    ) -> Draft:
        """Blocks that begin with ``tokens [batch, A]`` after ``states [batch, A, hidden]``.

        ``context``: keys and values of the entries from 1 on; the view of it ends just before the anchors' own
        entries. Like the first token of a text, that of a packed sequence has no entry that counts.
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


def _at(states: Tensor, places: Tensor) -> Tensor:
    """``[batch, n, hidden], [batch, m] -> [batch, m, hidden]``."""
    return states.gather(1, places[..., None].expand(-1, -1, states.shape[-1]))
