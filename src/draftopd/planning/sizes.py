"""The numbers of a target, a drafter and a step that determine memory and time, read from models without weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

from draftopd.drafters.attention import DraftAttention
from draftopd.drafters.base import Drafter
from draftopd.errors import DrafterError
from draftopd.replay.blocks import Scope
from draftopd.targets.target import Target

#: How the drafter's attention is computed: ``flex`` for all blocks at once, ``chunks`` chunk by chunk (on a CPU),
#: ``expanded`` likewise with keys and values repeated for all heads (on a GPU), ``math`` with every score in memory.
Attention = Literal["flex", "chunks", "expanded", "math"]

#: Drafters that can be planned.
Kind = Literal["dflash", "eagle3", "mtp"]


@dataclass(frozen=True)
class TargetSize:
    """A target in numbers of elements.

    Args:
        mlp: width of the MLP for one token, all its experts together.
        layer_elements: weights of all layers, including ``expert_elements`` of routed experts.
        other_elements: embedding, LM head and norms; tied weights count once.
        top_k, experts: experts per token, and per layer; 0 if layers are dense.
        width_bytes: per weight, and per value of its states.
    """

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    mlp: int
    layer_elements: int
    other_elements: int
    expert_elements: int = 0
    top_k: int = 0
    experts: int = 0
    width_bytes: int = 2

    @property
    def elements(self) -> int:
        return self.layer_elements + self.other_elements

    @property
    def active_elements(self) -> float:
        """Weights of the layers that are used for one token."""
        routed = self.top_k / self.experts if self.experts else 1.0
        return self.layer_elements - self.expert_elements * (1 - routed)

    @property
    def kv_elements(self) -> int:
        """Elements of the cache per token of a text."""
        return 2 * self.layers * self.kv_heads * self.head_dim

    @classmethod
    def of(cls, target: Target, width_bytes: int) -> TargetSize:
        """The size of a target, which may be on the meta device."""
        config = target.config
        layers = {name: p.numel() for name, p in target.body.layers.named_parameters()}
        experts = next((int(n) for k in ("num_experts", "num_local_experts") if (n := getattr(config, k, None))), 0)
        routed = sum(n for name, n in layers.items() if ".experts." in name)
        top_k = int(getattr(config, "num_experts_per_tok", 0) or 0) if routed else 0
        width = int((getattr(config, "moe_intermediate_size", None) if routed else None) or config.intermediate_size)
        heads = config.num_attention_heads
        return cls(
            hidden=target.hidden_size, layers=target.num_layers, heads=heads,
            kv_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_dim=getattr(config, "head_dim", None) or target.hidden_size // heads, vocab=target.vocab_size,
            mlp=width * max(1, top_k), layer_elements=sum(layers.values()),
            other_elements=sum(p.numel() for p in target.model.parameters()) - sum(layers.values()),
            expert_elements=routed, top_k=top_k, experts=experts if routed else 0, width_bytes=width_bytes,
        )  # fmt: skip


@dataclass(frozen=True)
class DrafterSize:
    """A drafter in numbers of elements.

    Args:
        kind: ``dflash`` drafts a block at once; ``eagle3`` and ``mtp`` draft token by token with one layer.
        taps: number of tapped layers; ``last_tap``: the deepest, where the number of layers means the norm.
        elements: trained weights; ``frozen_elements``: the others.
        own_head: rows of its own LM head; 0 if it uses the target's.
    """

    kind: Kind
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    block: int
    taps: int
    last_tap: int
    elements: int
    frozen_elements: int = 0
    own_head: int = 0

    @classmethod
    def of(cls, drafter: Drafter) -> DrafterSize:
        """The size of a drafter, which may be on the meta device.

        Raises:
            DrafterError: if drafters of its kind cannot be planned.
        """
        if drafter.kind not in get_args(Kind):
            raise DrafterError(f"There is no plan for drafter={drafter.kind}: choose from {', '.join(get_args(Kind))}.")
        layers: Any = drafter.config.layers  # type: ignore[attr-defined]
        attention = [m for m in drafter.modules() if isinstance(m, DraftAttention)]
        trained = sum(p.numel() for p in drafter.parameters() if p.requires_grad)
        frozen = sum(p.numel() for p in drafter.parameters()) - trained
        return cls(
            kind=drafter.kind, hidden=layers.hidden_size, layers=len(attention), heads=layers.num_attention_heads,  # type: ignore[arg-type]
            kv_heads=layers.num_key_value_heads, head_dim=layers.head_dim, mlp=layers.intermediate_size,
            block=drafter.block_size, taps=len(drafter.target_layer_ids), last_tap=max(drafter.target_layer_ids),
            elements=trained, frozen_elements=frozen, own_head=drafter.config.own_head,
        )  # fmt: skip


@dataclass(frozen=True)
class Step:
    """A process's own training step.

    Args:
        batch: sequences; ``tokens`` per sequence with padding; ``anchors`` replayed per sequence.
        weight_bytes: per value of the drafter's weights, gradients and optimizer states.
        compute_bytes: per value of autocast's precision; without autocast, equal to ``weight_bytes``.
        scope: the target's states that the loss needs.
        loss_copies: logits-sized tensors in float32 that the loss holds at once for a chunk.
        gpu: whether it runs on a GPU, where chunks of logits are larger.
        prompt: tokens before the first anchor.
        measured: whether the target also scores the proposals to log agreement (every ``log_every_n_steps``).
    """

    batch: int
    tokens: int
    anchors: int
    weight_bytes: int = 4
    compute_bytes: int = 4
    scope: Scope = "proposals"
    loss_copies: int = 7
    gpu: bool = False
    checkpointing: bool = False
    attention: Attention = "chunks"
    prompt: int = 0
    measured: bool = True
