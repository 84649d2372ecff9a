"""Target and drafter spread over the processes of a run (FSDP2).

A rank keeps its share of every layer. A layer of the target is gathered for the time it computes; the drafter, which is
small, for the whole of a step or a rollout. Gathering is collective, but ranks read with the target as often as their
own texts need, which is not equally often. So each pass of the target begins with a word to the other ranks, and all
gather the same layers in the same order, whoever needs them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from draftopd.drafters.base import Drafter
from draftopd.targets.target import Target


class Shards:
    """A target and a drafter in shares; every rank must make it, and enter its contexts, in the same order.

    The target's embedding, final norm and LM head stay whole, since drafters and losses read them too.

    Args:
        target: its layers are moved to the device one by one and cut there, so that they never lie on it together.
        drafter: rank 0's weights become everyone's.
        device: this rank's.
    """

    def __init__(self, target: Target, drafter: Drafter, device: torch.device) -> None:
        # Lightning's own mesh tells machines apart; here all processes hold alike.
        mesh = init_device_mesh(device.type, (dist.get_world_size(),))
        target.keep_fingerprint()
        self._target = _Lockstep(target, mesh)
        target.to(device)
        drafter.to(device)
        for tensor in drafter.state_dict().values():
            dist.broadcast(tensor, 0)
        # Whole until the backward pass is over: the loss reads its LM head after the drafter's own pass.
        self._drafter = fully_shard(drafter, mesh=mesh, reshard_after_forward=False)
        register_fsdp_forward_method(drafter, "replay")

    @contextmanager
    def step(self) -> Iterator[None]:
        """Around the passes of a training step, after which the drafter stays whole until its backward pass.

        Inside, ranks may read with the target as often as they like, but do nothing else together; they leave together.
        """
        self._drafter.unshard()
        with self._target.together():
            yield

    @contextmanager
    def decoding(self) -> Iterator[None]:
        """As :meth:`step`, where no backward pass follows."""
        with self.step():
            yield
        self._drafter.reshard()


def whole_tensors(module: nn.Module) -> dict[str, Tensor]:
    """A module's tensors, those in shares gathered; every rank must call it."""
    return {n: t.full_tensor() if isinstance(t, DTensor) else t for n, t in module.state_dict().items()}


class _Share(nn.Module):
    """Holds one layer for FSDP without being run: FSDP's own hooks count on a backward pass, which never comes."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer


class _Lockstep:
    """A target's layers in shares, gathered equally often by all ranks.

    In every round each rank says how many layers it is about to use, 0 if it has left; then all gather as many layers
    as the deepest one needs, from the first on. The round in which all say 0 ends it for all.
    """

    def __init__(self, target: Target, mesh: DeviceMesh) -> None:
        # The word goes over the CPU, so that it never waits for the device.
        self._group = dist.new_group(backend="gloo")
        self._entered = False
        self._needed = 0
        self._shares: list[FSDPModule] = []
        for place, layer in enumerate(target.body.layers):
            self._shares.append(fully_shard(_Share(layer), mesh=mesh))
            layer.register_forward_pre_hook(self._before(place))
            # Ahead of the taps, one of which may end the pass.
            layer.register_forward_hook(self._after(place), prepend=True)
        target.turn = self._turn

    @contextmanager
    def together(self) -> Iterator[None]:
        """The target may be used within; left by all ranks at once. An error in one rank leaves the others waiting."""
        self._entered = True
        yield
        self._entered = False
        while deepest := self._agree(0):
            self._pass_by(0, deepest)

    @contextmanager
    def _turn(self, layers: int) -> Iterator[None]:
        """Around one pass through the first ``layers`` layers."""
        if not self._entered:
            raise RuntimeError("A target in shares was read outside of Shards.step() or Shards.decoding().")
        deepest = self._agree(layers)
        self._needed = layers
        yield
        self._pass_by(layers, deepest)

    def _agree(self, layers: int) -> int:
        """The most layers that any rank is about to use."""
        deepest = torch.tensor(layers)
        dist.all_reduce(deepest, dist.ReduceOp.MAX, group=self._group)
        return int(deepest)

    def _pass_by(self, begin: int, end: int) -> None:
        """Gather layers for the other ranks."""
        for share in self._shares[begin:end]:
            share.unshard()
            share.reshard()

    def _before(self, place: int):
        def hook(_module: nn.Module, _inputs: object) -> None:
            self._shares[place].unshard()
            if place + 1 < self._needed:
                # While this layer computes, the next one is under way.
                self._shares[place + 1].unshard(async_op=True)

        return hook

    def _after(self, place: int):
        def hook(_module: nn.Module, _inputs: object, _output: object) -> None:
            self._shares[place].reshard()

        return hook
