"""The frozen target: tapped hidden states and block scoring."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from draftopd.errors import TargetError
from draftopd.targets.cache import ContextCache, PositionCache
from draftopd.targets.head import LMHead
from draftopd.targets.masks import LayerMasks, own_block
from draftopd.targets.packed import within
from draftopd.targets.shape import TargetShape

#: Maximum number of queries scored at a time, which keeps the cost of scoring linear in the number of anchors.
MAX_BLOCK_QUERIES = 1024


class Reading(NamedTuple):
    """The result of one target forward.

    ``hidden [batch, n, hidden]`` are the states after the final norm, the input of the LM head.
    ``features [batch, n, taps * hidden]`` are the concatenated outputs of the tapped layers.
    """

    hidden: Tensor
    features: Tensor


class _EnoughError(Exception):
    """Ends a forward after the last tapped layer."""


class Target(nn.Module):
    """A frozen causal LM, always in eval mode.

    Args:
        model: a transformers causal LM whose layers have full or sliding-window attention.
        taps: the layers whose outputs the drafter reads, see :meth:`tap`.

    Raises:
        TargetError: if a tap lies outside the model, or a layer or the LM head is of an unsupported kind.
    """

    def __init__(self, model: PreTrainedModel, taps: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.model = model.eval().requires_grad_(False)
        self.config = model.config.get_text_config()
        self.body = model.get_decoder()
        self.head = LMHead(model.get_output_embeddings(), getattr(self.config, "final_logit_softcapping", None))
        self.masks = LayerMasks(self.config)
        self._check_head()
        # The argument is named `cache` since transformers 5.24, `past_key_values` before.
        names = inspect.signature(type(self.body).forward).parameters
        self._cache_argument = "cache" if "cache" in names else "past_key_values"
        self._tapped: dict[int, Tensor] = {}
        self._enough: int | None = None
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        self._fingerprint: str | None = None
        #: Called with the number of layers of each pass through the body; the pass runs in the context it returns.
        self.turn: Callable[[int], AbstractContextManager[Any]] = nullcontext
        self.taps: tuple[int, ...] = ()
        self.tap(taps)

    def tap(self, layers: tuple[int, ...]) -> Target:
        """Choose the layers whose outputs later readings carry.

        Layer ``i`` stands for the output of layer ``i`` from 0, the number of layers for the states after the final
        norm.
        """
        blocks = [*self.body.layers, self.body.norm]
        wrong = [i for i in layers if not 0 <= i < len(blocks)]
        if wrong:
            raise TargetError(
                f"The drafter reads target layers {wrong}, but the target has layers 0 to {self.num_layers - 1}: "
                "use a drafter trained for this target, or other drafter.target_layer_ids."
            )
        for hook in self._hooks:
            hook.remove()
        self.taps = tuple(layers)
        self._hooks = [blocks[i].register_forward_hook(self._keep(i)) for i in self.taps]
        return self

    def train(self, mode: bool = True) -> Target:
        """Stay in eval mode, whatever the mode of the surrounding module."""
        return super().train(False)

    @property
    def hidden_size(self) -> int:
        return self.config.hidden_size

    @property
    def vocab_size(self) -> int:
        return self.head.weight.shape[0]

    @property
    def num_layers(self) -> int:
        return len(self.body.layers)

    @property
    def shape(self) -> TargetShape:
        return TargetShape(self.hidden_size, self.vocab_size, self.num_layers)

    @property
    def max_positions(self) -> int:
        return int(self.config.max_position_embeddings)

    @property
    def device(self) -> torch.device:
        return self.head.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.head.weight.dtype

    def fingerprint(self) -> str:
        """A short hash of the config and a sample of the weights, independent of where the target was loaded from."""
        if self._fingerprint is not None:
            return self._fingerprint
        shape = {k: v for k, v in self.config.to_diff_dict().items() if k != "transformers_version"}
        digest = hashlib.blake2b(str(sorted(shape.items(), key=str)).encode(), digest_size=8)
        for name, tensor in self.model.named_parameters():
            sample = tensor.detach().flatten()[:: max(1, tensor.numel() // 256)]
            digest.update(name.encode() + sample.float().cpu().numpy().tobytes())
        return digest.hexdigest()

    def keep_fingerprint(self) -> None:
        """Compute and keep the fingerprint, before the weights are sharded over processes."""
        self._fingerprint = self.fingerprint()

    def embed(self, ids: Tensor) -> Tensor:
        """Input embeddings ``[..., hidden]`` of token ids ``[...]``."""
        return self.model.get_input_embeddings()(ids)

    def new_cache(self, capacity: int) -> PositionCache:
        """An empty cache for sequences of at most ``capacity`` tokens."""
        return PositionCache(capacity, self.num_layers)

    @torch.no_grad()
    def read(
        self,
        ids: Tensor,
        cache: PositionCache,
        positions: Tensor | None = None,
        visible: int | None = None,
        begins: Tensor | None = None,
    ) -> Reading:
        """Read tokens and write them to the cache.

        Args:
            ids: ``[batch, n]``; rows may be padded on the right.
            cache: written at ``positions``; entries at later positions are not seen.
            positions: ``[batch, n]`` absolute positions; default ``0..n-1``, for an empty cache.
            visible: the largest position plus one; default ``n``, for an empty cache.
            begins: ``[batch, n]``, for an empty cache and packed rows: the index in the row at which the sequence of
                each token begins. A token sees its own sequence only and its position counts from there, while the
                cache stores it at its index in the row.
        """
        if positions is None:
            positions = torch.arange(ids.shape[1], device=ids.device)
            visible = ids.shape[1]
        assert visible is not None
        if begins is not None:
            with self._within(begins, self.num_layers) as mask:
                return self._run(ids, positions - begins, mask, cache.at(positions, visible))
        keys = torch.arange(visible, device=ids.device)
        allowed = keys <= positions.view(-1, ids.shape[1])[..., None]
        mask = self.masks.of(allowed, positions.expand(ids.shape), keys[None], self.dtype)
        return self._run(ids, positions.expand(ids.shape), mask, cache.at(positions, visible))

    @torch.no_grad()
    def read_features(self, ids: Tensor, begins: Tensor | None = None) -> Tensor:
        """The tapped states ``[batch, n, taps * hidden]`` of whole sequences, padded on the right.

        No cache is written, and the layers above the last tap are not computed. ``begins``: see :meth:`read`.
        """
        self._tapped.clear()
        self._enough = max(self.taps)
        positions = torch.arange(ids.shape[1], device=ids.device).expand(ids.shape)
        computed = min(self._enough + 1, self.num_layers)
        try:
            with self.turn(computed), nullcontext() if begins is None else self._within(begins, computed) as mask:
                positions = positions if begins is None else positions - begins
                with suppress(_EnoughError):
                    self.body(input_ids=ids, position_ids=positions, attention_mask=mask, use_cache=False)
        finally:
            self._enough = None
        features = torch.cat([self._tapped[i] for i in self.taps], -1)
        self._tapped.clear()
        return features

    @torch.no_grad()
    def score_blocks(
        self, cache: PositionCache, length: int, anchors: Tensor, tokens: Tensor, begins: Tensor | None = None
    ) -> Tensor:
        """The target's states along many blocks over one cached context.

        Slot ``j`` of the block at anchor ``a`` has position ``a + j`` and sees the recorded tokens before ``a`` and
        its own block up to ``j``. The recorded tokens are read from the cache only.

        Args:
            cache: the recorded sequences, written by :meth:`read`.
            length: number of recorded positions in the cache.
            anchors: ``[batch, A]`` anchor positions; indices in the row where rows are packed.
            tokens: ``[batch, A, n]`` block tokens, the anchor's first.
            begins: ``[batch, length]`` as passed to :meth:`read`.

        Returns:
            ``[batch, A, n, hidden]`` after the final norm; slot ``j`` predicts position ``a + j + 1``.
        """
        batch, _, n = tokens.shape
        chunk = max(1, MAX_BLOCK_QUERIES // n)
        packed, start, end = begins is not None, 0, length
        begins = anchors.new_zeros(batch, length) if begins is None else begins
        scored = []
        for a, t in zip(anchors.split(chunk, 1), tokens.split(chunk, 1), strict=True):
            first = begins.gather(1, a)
            if packed:
                # The blocks of a chunk see only a part of a long row.
                start, end = torch.stack([first.min(), a.max()]).tolist()
            indices = torch.arange(start, end, device=a.device)
            seen = (indices >= first[..., None]) & (indices < a[..., None])
            own = own_block(a.shape[1], n, a.device).expand(batch, -1, -1)
            positions = ((a - first)[..., None] + torch.arange(n, device=a.device)).flatten(1)
            allowed = torch.cat([seen.repeat_interleave(n, dim=1), own], -1)
            keys = torch.cat([indices - begins[:, start:end], positions], -1)
            mask = self.masks.of(allowed, positions, keys, self.dtype)
            reading = self._run(t.flatten(1), positions, mask, ContextCache(cache, end, start))
            scored.append(reading.hidden.unflatten(1, (-1, n)))
        return torch.cat(scored, 1)

    def _run(
        self, ids: Tensor, positions: Tensor, mask: Tensor | dict[str, Tensor], cache: PositionCache | ContextCache
    ) -> Reading:
        self._tapped.clear()
        with self.turn(self.num_layers):
            output = self.body(
                input_ids=ids, position_ids=positions, attention_mask=mask, use_cache=True,
                **{self._cache_argument: cache},
            )  # fmt: skip
        features = [self._tapped[i] for i in self.taps]
        self._tapped.clear()
        hidden = output.last_hidden_state
        return Reading(hidden, torch.cat(features, -1) if features else hidden[..., :0])

    @contextmanager
    def _within(self, begins: Tensor, layers: int) -> Iterator[Tensor | dict[str, Tensor]]:
        """Attention within the sequences of packed rows; yields the mask to pass to the model.

        Raises:
            TargetError: if not all of the ``layers`` computed in this context went through it.
        """
        config = self.body.config
        causal = config._attn_implementation == "sdpa"
        with within(config, begins) as sequences:
            positions = torch.arange(sequences.longest, device=begins.device)[None]
            before = positions[:, None] <= positions[..., None]
            yield self.masks.of(before, positions, positions, self.dtype, causal)
        if sequences.layers != layers:
            raise TargetError(
                f"Packed rows need every layer to use transformers' attention interface, but {sequences.layers} of "
                f"{layers} attend through it: use data.pack_to=null."
            )

    def _keep(self, layer: int):
        def hook(_module: nn.Module, _inputs: object, output: Tensor | tuple[Tensor, ...]) -> None:
            self._tapped[layer] = output if isinstance(output, Tensor) else output[0]
            if layer == self._enough:
                raise _EnoughError

        return hook

    def _check_head(self) -> None:
        scale = next((n for n in ("logits_scaling", "logit_scale") if getattr(self.config, n, 1.0) != 1.0), None)
        if scale:
            raise TargetError(f"The target scales its logits ({scale}), which the shared LM head does not cover.")
        if getattr(self.model.get_output_embeddings(), "bias", None) is not None:
            raise TargetError("The target's LM head has a bias, which the shared LM head does not cover.")
