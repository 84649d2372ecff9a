"""Typed configurations of drafters: what they write they read, and what they cannot read they refuse."""

from __future__ import annotations

import json
from dataclasses import FrozenInstanceError, dataclass, replace

import pytest
from tests.support.models import DRAFTERS, MakeDrafter

from draftopd.drafters.base import Drafter
from draftopd.drafters.config import DrafterConfig
from draftopd.drafters.dflash import DFlashDrafter
from draftopd.drafters.eagle3 import Eagle3Drafter
from draftopd.drafters.load import KINDS
from draftopd.drafters.mtp import MTPDrafter
from draftopd.errors import DrafterError
from draftopd.planning.sizes import DrafterSize
from draftopd.targets.shape import TargetShape
from draftopd.targets.target import Target


@dataclass(frozen=True)
class Own(DrafterConfig):
    """A kind without a public format."""

    width: int

    architectures = ("Own",)


OWN = Own(TargetShape(32, 64, 4), 5, (1, 3), width=7)


@pytest.mark.parametrize("drafts", DRAFTERS)
def test_what_is_written_is_read(drafts: str, target: Target, make_any: MakeDrafter) -> None:
    drafter = make_any(drafts, target, block_size=6)
    written = json.loads(json.dumps(drafter.config.to_json()))
    read = type(drafter.config).from_json(written, "x", drafter.state_dict().keys())
    for name in ("target", "block_size", "target_layer_ids", "own_head", "num_layers"):
        assert getattr(read, name) == getattr(drafter.config, name), name
    assert read.to_json() == drafter.config.to_json() and read.target == target.shape


def test_a_kind_without_a_format_keeps_its_fields() -> None:
    assert Own.from_json(json.loads(json.dumps(OWN.to_json())), "x") == OWN


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["Other"]}, "x holds a Other, expected a Own"),
        ({"block_size": "five"}, "config.json of x lacks or garbles five where a whole number belongs.*the Own fields"),
        ({"target": [1, 2]}, "lacks or garbles"),
        ({"target_layer_ids": 3}, "lacks or garbles"),
    ],
)
def test_a_garbled_field_is_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(DrafterError, match=message):
        Own.from_json(OWN.to_json() | changes, "x")


def test_a_missing_field_is_refused() -> None:
    raw = {name: value for name, value in OWN.to_json().items() if name != "width"}
    with pytest.raises(DrafterError, match="lacks or garbles 'width'"):
        Own.from_json(raw, "x")


def test_a_block_size_set_on_the_drafter_is_its_configs(target: Target, make_drafter: MakeDrafter) -> None:
    drafter = make_drafter(target, block_size=4)
    with pytest.raises(FrozenInstanceError):
        drafter.config.block_size = 6
    before = drafter.config
    drafter.block_size = 6
    assert (drafter.config.block_size, drafter.num_proposals, before.block_size) == (6, 5, 4)
    assert replace(drafter.config, block_size=4) == before


@pytest.mark.parametrize("kind", KINDS)
def test_how_it_computes_is_set_when_it_is_built(kind: type[Drafter], target: Target) -> None:
    options = {"mask_token_id": 63} if kind is DFlashDrafter else {}
    assert not kind.build(target, None, **options).activation_checkpointing
    assert kind.build(target, None, activation_checkpointing=True, **options).activation_checkpointing


@pytest.mark.parametrize("name", ["dflash", "eagle3", "mtp"])
def test_how_it_computes_is_set_for_a_checkpoint_too(name: str, bundled_pair: tuple[Target, ...]) -> None:
    kind = {"dflash": DFlashDrafter, "eagle3": Eagle3Drafter, "mtp": MTPDrafter}[name]
    options = {"attention": "sdpa"} if name == "dflash" else {}
    drafter = kind.build(
        bundled_pair[0], None, checkpoint=f"bundled:tiny_{name}", activation_checkpointing=True, **options
    )
    assert drafter.activation_checkpointing and getattr(drafter, "attention", "sdpa") == "sdpa"


def test_a_plan_asks_the_drafter(target: Target, make_any: MakeDrafter) -> None:
    sizes = [DrafterSize.of(make_any(drafts, target)) for drafts in DRAFTERS]
    assert [(size.kind, size.own_head) for size in sizes] == [
        ("dflash", 0), ("eagle3", 64), ("eagle3", 43), ("mtp", 0),
    ]  # fmt: skip
    unknown = make_any("mtp", target)
    unknown.kind = "slot_heads"
    with pytest.raises(DrafterError, match="There is no plan for drafter=slot_heads: choose from dflash, eagle3, mtp"):
        DrafterSize.of(unknown)
