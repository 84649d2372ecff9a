"""Memory of one process in bytes, by part: what is held during the whole run, and what each moment adds.

A moment is a sum of named parts. A phase's peak is its largest moment.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from draftopd.metrics.agreement import LOGIT_COPIES
from draftopd.planning.activations import FLOAT, Kept, kept
from draftopd.planning.sizes import DrafterSize, Step, TargetSize
from draftopd.rollout.walk import READ_TOKENS
from draftopd.targets.head import rows_at_once
from draftopd.targets.target import MAX_BLOCK_QUERIES

Parts = dict[str, float]


class Moment(NamedTuple):
    """A moment of a phase and what it holds, beside what is held during the whole run."""

    name: str
    parts: Parts

    @property
    def bytes(self) -> float:
        return sum(self.parts.values())


class Phase(NamedTuple):
    """A phase of a run and its moments."""

    name: str
    moments: list[Moment]

    @property
    def peak(self) -> Moment:
        return max(self.moments, key=lambda moment: moment.bytes)


@dataclass(frozen=True)
class Sharing:
    """How processes share memory.

    Args:
        shards: processes that the target's layers are sharded over; 1: each has them whole.
        buckets: gradients are held twice, to be averaged over processes (DDP).
    """

    shards: int = 1
    buckets: bool = False


def resident(t: TargetSize, d: DrafterSize, sharing: Sharing, weight_bytes: int) -> Parts:
    """What is held during the whole run. Gradients are not part of it: the backward allocates them."""
    trained = d.elements * weight_bytes
    parts: Parts = {
        "target weights": (t.layer_elements / sharing.shards + t.other_elements) * t.width_bytes,
        "drafter weights": trained + d.frozen_elements * weight_bytes,
        "optimizer states": 2 * trained,
    }
    if sharing.shards > 1:
        # The layer being computed, and the next one, which is fetched at the same time.
        parts["gathered layers"] = 2 * t.layer_elements / t.layers * t.width_bytes
    if sharing.buckets:
        parts["gradient buckets"] = trained
    return parts


def forward_work(t: TargetSize, rows: int, queries: int, keys: int, joined: bool = False) -> float:
    """Peak memory of one forward of the target beside its results: the mask, and one layer.

    ``queries`` and ``keys`` are per sequence of ``rows``; ``joined``: a layer's keys and values are concatenated.
    """
    v, tokens = t.width_bytes, rows * queries
    mask = tokens * keys * v
    width, kv = t.heads * t.head_dim, t.kv_heads * t.head_dim
    states = 3 * tokens * t.hidden * v
    repeated = 2 * rows * keys * width * v if t.heads > t.kv_heads else 0
    attention = repeated + tokens * (2 * width + 2 * kv) * v + 2 * rows * keys * kv * v * joined
    # Each expert has its own copy of a token; the outputs are weighted and put back in order.
    routed = max(4 * t.top_k * t.hidden, t.top_k * t.hidden + 4 * t.mlp)
    mlp = tokens * (routed if t.experts else 3 * t.mlp) * v
    return mask + states + max(attention, mlp)


def training_step(t: TargetSize, d: DrafterSize, step: Step) -> Phase:
    """The moments of a training step: replay, the loss, its backward pass and the optimizer."""
    v, w, c = t.width_bytes, step.weight_bytes, step.compute_bytes
    recorded, blocks = step.batch * step.tokens, step.batch * step.anchors
    slots = blocks * (d.block - 1)
    trained: Parts = {"gradients": d.elements * w}
    draft = kept(d, step, v)
    drafter = {"drafter activations": draft.context + draft.layers + draft.output}
    if c != w:
        drafter["cast weights"] = d.elements * c  # autocast keeps its casts
    rows = d.own_head or t.vocab
    at_once = rows_at_once(rows, step.gpu)
    chunk = min(slots, at_once) * rows
    # A block-parallel drafter chooses the tokens of all slots together, the others slot by slot.
    chosen = min(slots if d.kind == "dflash" else blocks, at_once) * rows * _logits(v)

    moments, held = [], dict(trained)
    features, states = recorded * d.taps * t.hidden * v, recorded * t.hidden * v
    if step.scope != "none" or step.measured:
        held |= {"target cache": recorded * t.kv_elements * v, "target states": states}
    work = forward_work(t, step.batch, step.tokens, step.tokens)
    moments.append(Moment("read", held | {"features": features, "one target layer": max(work - states, features)}))
    held["features"] = features
    at_work = draft.forward - draft.output + max(draft.working, chosen)
    moments.append(Moment("draft", held | drafter | {"drafter at work": at_work}))
    along = slots * t.hidden * v
    if step.scope == "proposals" or step.measured:
        queries = min(step.anchors, max(1, MAX_BLOCK_QUERIES // d.block)) * d.block
        keys = step.tokens + queries
        work = forward_work(t, step.batch, queries, keys, joined=True)
        work += step.batch * queries * d.taps * t.hidden * v
        best = min(slots, rows_at_once(t.vocab, step.gpu)) * t.vocab * _logits(v)
        every = blocks * d.block * t.hidden * v  # in chunks of blocks, concatenated at the end
        scored: Parts = {
            "scored states": every + draft.output,
            "one target layer or its logits": max(work, best, every),
        }
        moments.append(Moment("score", held | drafter | scored))
    if step.measured:
        some = rows_at_once(t.vocab, step.gpu)
        compared = LOGIT_COPIES[slots > some] * min(slots, some) * t.vocab * FLOAT
        scored = {"scored states": 2 * along + draft.output}
        moments.append(Moment("measure", held | drafter | scored | {"logits of a chunk": compared}))
    # The used states of target and drafter, and the gradient of the drafter's states, in parts and concatenated.
    aims = 0.0 if step.scope == "none" else along
    used = {"states used by the loss": 2 * aims + 3 * draft.output}
    copies = {"logits of a chunk": step.loss_copies * chunk * FLOAT}
    moments.append(Moment("loss", trained | drafter | used | copies))
    moments += _backward(d, step, draft, drafter, chunk)
    # AdamW computes the root of all second moments at once.
    moments.append(Moment("optimizer", trained | {"optimizer at work": d.elements * w}))
    return Phase("training step", moments)


def _backward(d: DrafterSize, step: Step, draft: Kept, drafter: Parts, chunk: float) -> list[Moment]:
    """Layer by layer, activations are freed and gradients allocated: the peak is at the first or the last layer."""
    w = step.weight_bytes
    head = d.own_head * d.hidden * w
    each = (d.elements * w - head) / d.layers
    begin = drafter | {"backward of a layer": draft.backward + 2 * draft.output}
    if d.kind != "dflash":
        # Every step uses the same layer, whose gradients are all held from the first step of the backward.
        begin["gradients"] = d.elements * w - head
    end = {
        "gradients": d.elements * w - each,
        "drafter activations": draft.context + draft.layers / d.layers,
        "backward of a layer": draft.backward,
    }
    moments = [Moment("backward begins", begin), Moment("backward ends", end)]
    if d.own_head:
        # A trained head needs its own gradient, from a chunk's logits that are computed again.
        parts = {"logits of a chunk": (step.loss_copies - 1) * chunk * FLOAT, "gradients": 2 * head}
        moments.append(Moment("backward of the head", drafter | parts))
    return moments


def _logits(v: int) -> int:
    """Bytes of a logit: in the head's precision, and in float32."""
    return FLOAT + (v if v < FLOAT else 0)


@dataclass(frozen=True)
class Decoding:
    """Decoding of a batch.

    Args:
        rows: prompts decoded together.
        prompt, response: maximum tokens of each.
        weight_bytes, compute_bytes: of the drafter (see :class:`~draftopd.planning.sizes.Step`).
        sampled: above temperature 0, where verification holds both distributions.
        capacity_step: the caches' length is rounded up to a multiple of this.
    """

    rows: int
    prompt: int
    response: int
    weight_bytes: int = 4
    compute_bytes: int = 4
    sampled: bool = False
    capacity_step: int = 1


def decoding(name: str, t: TargetSize, d: DrafterSize, run: Decoding) -> Phase:
    """The moments of decoding a batch: reading the prompts, and a step near the end, with one block per row."""
    v, w = t.width_bytes, run.weight_bytes
    capacity = run.prompt + run.response + d.block
    capacity = -(-capacity // run.capacity_step) * run.capacity_step
    cache = run.rows * capacity * t.kv_elements * v
    kv = d.kv_heads * d.head_dim
    drafter_cache = run.rows * capacity * 2 * d.layers * kv * w
    read = run.rows * run.prompt
    features, states = read * d.taps * t.hidden * v, read * t.hidden * v
    prompts: Parts = {"target cache": cache, "target states": states, "features": features}
    prompts["one target layer"] = max(forward_work(t, run.rows, run.prompt, run.prompt) - states, features)
    block = run.rows * d.block
    visible = run.prompt + run.response
    width = d.heads * d.head_dim
    # Target and drafter take turns. The drafter concatenates context and block, for every head unless fused.
    drafting = run.rows * (visible + d.block) * 2 * (kv + width) * w + block * 3 * d.mlp * w
    logits = block * t.vocab * _logits(v)
    if run.sampled:
        logits += 3 * block * t.vocab * FLOAT
    caches: Parts = {"target cache": cache, "drafter cache": drafter_cache}
    working = max(forward_work(t, run.rows, d.block, visible + d.block), drafting, logits)
    return Phase(name, [Moment("prompts", prompts), Moment("decoding", caches | {"one step": working})])


def walking(t: TargetSize, d: DrafterSize, run: Decoding, blocks_at_once: int) -> Phase:
    """The moments of finding anchors on recorded texts: reading them, and drafting at every position at once."""
    tokens, w = run.prompt + run.response, run.weight_bytes
    features: Parts = {"features": run.rows * tokens * d.taps * t.hidden * t.width_bytes}
    part = min(run.rows, max(1, READ_TOKENS // tokens))
    read = features | {"one target layer": forward_work(t, part, tokens, tokens) + features["features"]}
    kv = d.kv_heads * d.head_dim
    caches: Parts = {"drafter cache": run.rows * tokens * 2 * d.layers * kv * w}
    slots = min(blocks_at_once, run.rows * run.response) * (d.block if d.kind == "dflash" else 1)
    working = slots * (3 * d.mlp + 3 * d.hidden + 3 * d.heads * d.head_dim) * w
    return Phase("walk", [Moment("read", read), Moment("draft", features | caches | {"drafter at work": working})])


def by_moment(step: Phase) -> dict[str, float]:
    """Bytes of each moment of a first training step, as ``benchmarks/speed/peaks.py`` measures them.

    A first step has no gradients before its backward, whose moments count as one; the optimizer is left out.
    """
    found: dict[str, float] = {}
    for name, parts in step.moments:
        first = name.split()[0]
        size = sum(n for part, n in parts.items() if part != "gradients" or first == "backward")
        if first != "optimizer":
            found[first] = max(found.get(first, 0.0), size)
    return found
