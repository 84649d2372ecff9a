"""A drafter's ``config.json``: the base of every drafter's typed configuration, and the fields of layers."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any, ClassVar, TypeVar

from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig
from typing_extensions import Self

from draftopd.errors import DrafterError
from draftopd.io.json_text import shown, whole
from draftopd.targets.shape import TargetShape

Layers = TypeVar("Layers", bound=PreTrainedConfig)

#: A longer block is a mistake.
MAX_BLOCK = 1024

#: Upper limits of a drafter's layers, and of all its other sizes.
MAX_LAYERS, MAX_SIZE = 1024, 2**31 - 1

#: Fields that describe a drafter's own layers.
_LAYER_FIELDS = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "intermediate_size", "rms_norm_eps", "max_position_embeddings", "vocab_size", "hidden_act",
    "attention_bias", "mlp_bias", "attention_dropout", "initializer_range", "layer_types", "sliding_window",
    "use_sliding_window", "max_window_layers",
)  # fmt: skip

#: Those of them that are sizes.
_SIZES = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "intermediate_size",
    "max_position_embeddings", "vocab_size",
)  # fmt: skip


@dataclass(frozen=True)
class DrafterConfig:
    """Everything of a drafter but its weights. A subclass adds the fields of its own kind.

    The base reads and writes fields by their names; kinds with a public format read and write that.

    Args:
        target: shape of the target that the drafter was made for.
        block_size: anchor plus proposals.
        target_layer_ids: target layers read; layer ``i`` means the output of layer ``i``.
    """

    target: TargetShape
    block_size: int
    target_layer_ids: tuple[int, ...]

    #: Architectures that a ``config.json`` may name; the first one is written.
    architectures: ClassVar[tuple[str, ...]]
    #: Whether it may also read the states after the target's final norm, as layer ``num_layers``.
    reads_final_norm: ClassVar[bool] = False

    @classmethod
    def from_json(
        cls, raw: dict[str, Any], where: str, tensors: Collection[str] = (), num_target_layers: int | None = None
    ) -> Self:
        """Read a ``config.json``; other kinds, and variants that are not supported, are refused by name.

        Args:
            where: names the checkpoint in errors.
            tensors: names of the tensors beside it.
            num_target_layers: depth of its target, where the checkpoint does not say it.

        Raises:
            DrafterError: if a field is missing or garbled, or the checkpoint is of another kind.
        """
        check_architecture(cls, raw, where)
        with reading(cls.architectures[0], where):
            values = {field.name: raw[field.name] for field in fields(cls)} | {
                "target": TargetShape(*map(whole, raw["target"])),
                "block_size": whole(raw["block_size"]),
                "target_layer_ids": tuple(map(whole, raw["target_layer_ids"])),
            }
            return cls(**values)

    def to_json(self) -> dict[str, Any]:
        """The ``config.json`` as plain containers; the tensors' dtype is left out."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {"architectures": [self.architectures[0]], **values, "target": list(self.target)}

    @property
    def num_layers(self) -> int:
        """Number of the drafter's layers."""
        return 1

    @property
    def own_head(self) -> int:
        """Rows of the drafter's own LM head; 0 if it shares the target's."""
        return 0

    @property
    def ignored_tensors(self) -> tuple[str, ...]:
        """Tensors that a checkpoint may hold and the drafter does not need."""
        return ()

    def check_fits(self, target: TargetShape) -> None:
        """Refuse a target that the drafter was not made for.

        Raises:
            DrafterError: naming what was found and what was expected.
        """
        if self.block_size < 2:
            raise DrafterError(
                f"block_size {self.block_size} proposes nothing: a block is the anchor plus at least one "
                "proposal, use 2 or more."
            )
        if self.block_size > MAX_BLOCK:
            raise DrafterError(
                f"block_size {self.block_size} is above the maximum: use {MAX_BLOCK} or less, or another drafter."
            )
        names = ("hidden size", "vocabulary", "number of target layers")
        for name, own, found in zip(names, self.target, target, strict=True):
            if own != found:
                raise DrafterError(
                    f"The drafter was made for a target whose {name} is {own}, but this target's is {found}: "
                    "use the target it was trained with, or train a new drafter (experiment=sft)."
                )
        last = target.num_layers - (not self.reads_final_norm)
        wrong = [i for i in self.target_layer_ids if not 0 <= i <= last]
        if wrong:
            raise DrafterError(
                f"The drafter reads target layers {wrong}, but the target has layers 0 to {target.num_layers - 1}: "
                "use a drafter trained for this target."
            )


def architecture_of(raw: dict[str, Any]) -> str:
    """The architecture that a ``config.json`` names, or ``?`` without one."""
    named = raw.get("architectures")
    return shown(named[0], 60) if isinstance(named, list) and named and isinstance(named[0], str) else "?"


def check_architecture(config: type[DrafterConfig], raw: dict[str, Any], where: str) -> None:
    """Refuse the ``config.json`` of another kind of drafter.

    Raises:
        DrafterError: naming the kind that was found.
    """
    if architecture_of(raw) not in config.architectures:
        raise DrafterError(
            f"{where} holds a {architecture_of(raw)}, expected a {config.architectures[0]}: use another drafter= "
            "group, or bring it into this format (python -m draftopd import)."
        )


@contextmanager
def reading(name: str, where: str) -> Iterator[None]:
    """Around reading the fields of a kind of drafter called ``name``.

    Raises:
        DrafterError: if a field is missing or garbled.
    """
    try:
        yield
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise DrafterError(
            f"config.json of {where} lacks or garbles {shown(str(error))}: expected the {name} fields, copy it again."
        ) from error


def parse_layers(kind: type[Layers], raw: dict[str, Any], where: str) -> Layers:
    """The config of the drafter's own layers.

    Args:
        kind: config class of the family of its layers.

    Raises:
        DrafterError: if the drafter cannot have such layers.
    """
    try:
        for name in _SIZES:
            if raw.get(name) is not None and not 1 <= whole(raw[name]) <= MAX_SIZE:
                raise ValueError(f"{name} is {raw[name]}, expected 1 to {MAX_SIZE}")
        # The config class makes a list of this length.
        if raw.get("num_hidden_layers", 1) > MAX_LAYERS:
            raise ValueError(f"num_hidden_layers is {raw['num_hidden_layers']}, expected at most {MAX_LAYERS}")
        rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
        rope = {"rope_type": rope.get("type", "default"), **rope}
        rope["rope_theta"] = raw.get("rope_theta") or rope.get("rope_theta", 10_000.0)
        config = kind(
            **{name: raw[name] for name in _LAYER_FIELDS if raw.get(name) is not None},
            rope_parameters=rope,
            tie_word_embeddings=False,
        )
        if config.num_attention_heads % config.num_key_value_heads or config.head_dim % 2:
            raise ValueError(
                f"{config.num_attention_heads} heads of {config.head_dim} do not fit {config.num_key_value_heads} "
                "key/value heads"
            )
        if not 0 < float(config.rms_norm_eps) < 1 or not 0 < float(rope["rope_theta"]) < math.inf:
            raise ValueError(f"rms_norm_eps {config.rms_norm_eps} or rope_theta {rope['rope_theta']} is out of range")
        kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    except (TypeError, ValueError, AttributeError, KeyError, OverflowError, StrictDataclassError) as error:
        raise DrafterError(
            f"config.json of {where} does not describe {kind.model_type} layers: {shown(str(error))}. Copy it again, "
            "or name another drafter."
        ) from error
    if kinds != {"full_attention"}:
        raise DrafterError(
            f"{where} has sliding-window layers, which this drafter does not have: name another drafter."
        )
    return config


def layer_fields(config: PreTrainedConfig) -> dict[str, Any]:
    """The fields of a ``config.json`` from the layers' config."""
    rope = dict(config.rope_parameters)
    theta = rope.pop("rope_theta")
    return {
        "model_type": config.model_type,
        **{name: getattr(config, name) for name in _LAYER_FIELDS if hasattr(config, name)},
        "rope_theta": theta,
        "rope_scaling": None if rope.get("rope_type", "default") == "default" else rope,
        "tie_word_embeddings": False,
    }
