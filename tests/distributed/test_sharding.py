"""Target and drafter in shares of two processes do what they do whole."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from tests.support.batches import replay
from tests.support.models import DRAFTERS
from torch import Tensor
from torch.distributed.tensor import DTensor

from draftopd.decoding.generate import Decoded, Decoder
from draftopd.decoding.rules import Rules
from draftopd.decoding.sampling import Sampling
from draftopd.distributed.sharding import Shards, whole_tensors
from draftopd.drafters.base import Drafter
from draftopd.drafters.checkpoint import save_drafter
from draftopd.drafters.load import load_for
from draftopd.losses.distilled import Distilled
from draftopd.losses.divergence import forward_kl, reverse_kl
from draftopd.replay.batch import ReplayBatch, pad_anchors
from draftopd.targets.load import load_target
from draftopd.targets.target import Target

RANKS = 2


def batch_of(rank: int) -> ReplayBatch:
    """Another for each rank; rank 1's blocks are scored in more passes."""
    generator = torch.Generator().manual_seed(rank)
    ids = torch.randint(0, 60, (3, 20 + 10 * rank), generator=generator)
    anchors, mask = pad_anchors([torch.arange(1, 5 + 10 * rank + row) for row in range(3)])
    return ReplayBatch(
        ids, torch.ones(3).long(), torch.full((3,), ids.shape[1]), anchors, mask, torch.zeros(3, dtype=torch.long)
    )


def loss_of(target: Target, drafter: Drafter, rank: int) -> Tensor:
    blocks = replay(target, drafter, batch_of(rank), Sampling(), frozenset())
    return Distilled(accepted=forward_kl, rejected=reverse_kl, target_temperature=0.5)(blocks).loss


def decode(target: Target, drafter: Drafter, rank: int) -> Iterator[list[Decoded]]:
    """Rank 1 decodes more and longer texts."""
    prompts = [[1, 2, 3], [4, 5], [6], [7, 8, 9]][: 1 + 3 * rank]
    return Decoder(target, drafter, Rules(max_new_tokens=6 + 10 * rank)).decode(prompts)


def check(rank: int, target: Target, drafter: Drafter) -> None:
    loss_of(target, drafter, rank).backward()
    gradients = {name: p.grad for name, p in drafter.named_parameters()}
    for gradient in gradients.values():
        assert gradient is not None
        dist.all_reduce(gradient)
        gradient.div_(RANKS)
    drafter.zero_grad()
    texts = list(decode(target, drafter, rank))
    features, weights = target.read_features(batch_of(rank).ids), whole_tensors(drafter)
    fingerprint, size = target.fingerprint(), sum(p.numel() for p in target.body.layers.parameters())

    shards = Shards(target, drafter, torch.device("cpu"))
    held = [p.to_local().numel() if isinstance(p, DTensor) else p.numel() for p in target.body.layers.parameters()]
    assert abs(sum(held) - size / RANKS) < 0.1 * size
    assert target.fingerprint() == fingerprint
    for _ in range(2):
        with shards.decoding():
            if rank == 0:
                # Not as deep as the other rank's passes, nor as often.
                assert torch.equal(target.read_features(batch_of(rank).ids), features)
            assert list(decode(target, drafter, rank)) == texts
        with shards.step():
            loss = loss_of(target, drafter, rank)
        loss.backward()
        for name, parameter in drafter.named_parameters():
            assert isinstance(parameter, DTensor) and isinstance(parameter.grad, DTensor)
            torch.testing.assert_close(parameter.grad.full_tensor(), gradients[name], rtol=1e-5, atol=1e-6)
        drafter.zero_grad()
    found = whole_tensors(drafter)
    assert found.keys() == weights.keys() and all(torch.equal(found[n], weights[n]) for n in weights)
    assert all(isinstance(p, DTensor) for p in target.body.layers.parameters())
    with pytest.raises(RuntimeError, match="outside of"):
        target.read_features(batch_of(rank).ids)


def work(rank: int, root: Path, pairs: list[tuple[Path, Path]]) -> None:
    torch.set_num_threads(1)
    # Ranks that wait for one another in vain fail soon.
    dist.init_process_group("gloo", f"file://{root / 'meeting'}", timedelta(seconds=60), rank=rank, world_size=RANKS)
    for place, drafts in pairs:
        target = load_target(str(place), dtype="float32")
        drafter = load_for(target, drafts)
        check(rank, target.tap(drafter.target_layer_ids), drafter)
    dist.destroy_process_group()


def test_sharded_models_compute_what_whole_ones_do(
    tmp_path: Path, target_dirs, make_any: Callable[..., Drafter]
) -> None:
    pairs = []
    for kind, drafts in zip(("qwen3", "qwen3_moe", "gemma3", "gpt_oss"), DRAFTERS, strict=True):
        target = load_target(str(target_dirs[kind]), dtype="float32")
        save_drafter(make_any(drafts, target), tmp_path / kind, torch.float32)
        pairs.append((target_dirs[kind], tmp_path / kind))
    mp.spawn(work, (tmp_path, pairs), nprocs=RANKS)
