"""Decoded texts and the replay batches made of them."""

from __future__ import annotations

import torch

from draftopd.decoding.generate import Decoded, Decoder
from draftopd.decoding.rules import Rules
from draftopd.decoding.sampling import Sampling
from draftopd.decoding.verify import Verification
from draftopd.drafters.base import Drafter
from draftopd.replay.batch import ReplayBatch
from draftopd.replay.blocks import Blocks, Scope
from draftopd.replay.replay import draft, read
from draftopd.rollout.anchors import AnchorPolicy
from draftopd.rollout.buffer import Recorded
from draftopd.targets.target import Target


def decode(target: Target, drafter: Drafter, count: int = 6) -> list[Decoded]:
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(0, 60, (4 + i,), generator=generator).tolist() for i in range(count)]
    return Decoder(target, drafter, Rules(max_new_tokens=30)).decode_batch(prompts)


def as_batch(decoded: list[Decoded], blocks: int | None = None) -> ReplayBatch:
    width = max(len(d.tokens) for d in decoded)
    count = max(len(d.anchors[:blocks]) for d in decoded)
    ids = torch.full((len(decoded), width), 7)  # padding is an ordinary token: it must not show
    anchors, mask = torch.zeros(len(decoded), count, dtype=torch.long), torch.zeros(len(decoded), count).bool()
    for row, d in enumerate(decoded):
        ids[row, : len(d.tokens)] = torch.tensor(d.tokens)
        anchors[row, : len(d.anchors[:blocks])] = torch.tensor(d.anchors[:blocks])
        mask[row, : len(d.anchors[:blocks])] = True
    starts, lengths = (torch.tensor(x) for x in zip(*((len(d.prompt), len(d.tokens)) for d in decoded), strict=True))
    return ReplayBatch(ids, starts, lengths, anchors, mask, torch.zeros(len(decoded), dtype=torch.long))


def replay(
    target: Target,
    drafter: Drafter,
    batch: ReplayBatch,
    sampling: Sampling = Sampling(),
    stop: frozenset[int] = frozenset(),
    scope: Scope = "proposals",
    *,
    verification: Verification = "rejection_sampling",
    generator: torch.Generator | None = None,
    propose: bool = True,
    measured: bool = False,
) -> Blocks:
    """All stages of a replay as a training step takes them; ``measured`` gives the blocks with every slot scored."""
    reading = read(target, batch, states=scope != "none" or measured)
    drafts = draft(
        target, drafter, reading, batch, Rules(sampling, verification, stop),
        forced=scope in ("recorded", "none"), propose=propose, generator=generator,
    )  # fmt: skip
    return drafts.scored() if measured else drafts.blocks(scope)


def chosen_batch(records: list[Recorded], policy: AnchorPolicy) -> ReplayBatch:
    """Recorded texts at the anchors that a policy chooses."""
    generator = torch.Generator().manual_seed(0)
    chosen = [policy.choose(r.anchors, r.accepted, r.prompt_length, len(r.tokens), generator) for r in records]
    return ReplayBatch.collate(records, chosen, pad=7)
