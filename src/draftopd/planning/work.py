"""Operations and bytes moved, and the seconds that they take at least on a device.

A multiplication and an addition count as two operations. Seconds are a roofline's: operations at the assumed share of
the peak, bytes at that of the bandwidth, whichever is more, and no less than the host needs to launch them.
"""

from __future__ import annotations

from dataclasses import dataclass

from draftopd.planning.devices import Assumptions
from draftopd.planning.memory import Decoding, Sharing
from draftopd.planning.sizes import DrafterSize, Step, TargetSize
from draftopd.targets.target import MAX_BLOCK_QUERIES


@dataclass(frozen=True)
class Work:
    """Operations in half precision and in float32, bytes read from memory and fetched from other devices.

    ``layers``: launched by the host one after another.
    """

    half: float = 0.0
    single: float = 0.0
    read: float = 0.0
    fetched: float = 0.0
    layers: float = 0.0

    def __add__(self, other: Work) -> Work:
        pairs = zip(vars(self).values(), vars(other).values(), strict=True)
        return Work(*(a + b for a, b in pairs))

    def __mul__(self, times: float) -> Work:
        return Work(*(times * value for value in vars(self).values()))

    @property
    def operations(self) -> float:
        return self.half + self.single

    def seconds(self, given: Assumptions, compiled: bool = False) -> float:
        """The roofline's."""
        device = given.device
        arithmetic = (self.half / device.tflops + self.single / device.float32) / 1e12 / given.utilisation
        moved = self.read / device.bandwidth / 1e9 / given.bandwidth_utilisation
        fetched = self.fetched / device.link / 1e9 / given.bandwidth_utilisation
        launched = 0.0 if compiled else self.layers * given.launch_ms / 1e3
        return max(arithmetic, moved, fetched, launched)


def counted(operations: float, width_bytes: int) -> Work:
    """Operations at a precision."""
    return Work(half=operations) if width_bytes <= 2 else Work(single=operations)


def target_forward(
    t: TargetSize, tokens: float, keys: float, sharing: Sharing, depth: int | None = None, forwards: int = 1
) -> Work:
    """The target over ``tokens``, each of which sees ``keys`` (masked ones cost the same), in so many forwards.

    ``depth``: layers computed; None: all. The LM head is left out.
    """
    share = 1.0 if depth is None else depth / t.layers
    scores = 4 * tokens * keys * t.layers * t.heads * t.head_dim
    whole = counted(share * (2 * t.active_elements * tokens + scores), t.width_bytes)
    weights = t.layer_elements * share * t.width_bytes
    moved = touched(t, tokens / forwards) * share * t.width_bytes * forwards
    fetched = weights * forwards * (sharing.shards - 1) / sharing.shards
    return whole + Work(read=moved, fetched=fetched, layers=share * t.layers * forwards)


def touched(t: TargetSize, tokens: float) -> float:
    """Weights of the layers that a forward over so many tokens reads, experts chosen as if at random."""
    if not t.experts:
        return t.layer_elements
    share = 1 - (1 - t.top_k / t.experts) ** tokens
    return t.layer_elements - t.expert_elements * (1 - share)


def drafter_forward(d: DrafterSize, recorded: float, blocks: float, keys: float, width_bytes: int) -> Work:
    """The drafter over ``recorded`` tokens and ``blocks``, each of whose slots sees ``keys``; the LM head left out."""
    width, kv = d.heads * d.head_dim, d.kv_heads * d.head_dim
    first = d.hidden * (2 if d.kind == "eagle3" else 1)  # into the attention
    entry = 4 * d.hidden * d.hidden if d.kind == "mtp" else 0
    row = 2 * first * (width + 2 * kv) + 2 * width * d.hidden + 6 * d.hidden * d.mlp + entry + 4 * keys * width
    fused = 0 if d.kind == "mtp" else 2 * d.taps * d.hidden * d.hidden
    token = fused + entry + d.layers * 4 * first * kv
    rows = blocks * (d.block if d.kind == "dflash" else d.block - 1)
    steps = d.layers if d.kind == "dflash" else d.block - 1
    return counted(recorded * token + d.layers * rows * row, width_bytes) + Work(layers=steps)


def training_step(
    t: TargetSize, d: DrafterSize, step: Step, sharing: Sharing, used: float, proposes: bool, every: int
) -> dict[str, Work]:
    """A training step by part.

    Args:
        used: share of the slots that the loss looks at.
        proposes: the loss needs the drafter's proposals.
        every: steps between those that measure agreement, for which the target scores what it need not otherwise.
    """
    recorded, blocks = step.batch * step.tokens, step.batch * step.anchors
    slots = blocks * (d.block - 1)
    c, v = step.compute_bytes, t.width_bytes
    head, whole = 2 * (d.own_head or t.vocab) * d.hidden, 2 * t.vocab * t.hidden
    logged = 1 / every if step.measured else 0.0
    features_only = step.scope == "none"
    depth = min(t.layers, d.last_tap + 1) if features_only else None
    chunks = -(-step.anchors // max(1, MAX_BLOCK_QUERIES // d.block))
    scoring = 1.0 if step.scope == "proposals" else logged
    score = target_forward(t, blocks * d.block, step.tokens + MAX_BLOCK_QUERIES, sharing, forwards=chunks)
    score += counted(slots * whole, v)
    forward = drafter_forward(d, recorded, blocks, step.tokens, c)
    passes = 4 if step.checkpointing else 3  # backward: as much again for states, and for weights
    loss = head * (2 if not d.own_head else 4)  # forward and states' gradient; recomputed, and weights'
    loss += 0 if step.scope == "none" else whole
    return {
        "target reads": target_forward(t, recorded, step.tokens, sharing, depth),
        "target scores": score * scoring,
        "drafter": forward * passes,
        "proposals": counted(slots * head, v) * (1.0 if proposes or not features_only else logged),
        "loss": counted(slots * used * loss, v),
        "measurement": counted(slots * (head + whole), v) * logged,
    }


def decoding(t: TargetSize, d: DrafterSize | None, run: Decoding, sharing: Sharing, tau: float) -> tuple[Work, Work]:
    """Decoding a batch: reading the prompts, and all steps of blocks after them; without a drafter, of tokens."""
    v, w = t.width_bytes, run.weight_bytes
    block = d.block if d else 1
    prompts = target_forward(t, run.rows * run.prompt, run.prompt, sharing)
    visible = run.prompt + run.response / 2
    rows = run.rows * block
    step = target_forward(t, rows, visible, sharing)
    step += counted(2 * rows * t.vocab * t.hidden, v)
    step += Work(read=t.vocab * t.hidden * v + run.rows * visible * t.kv_elements * v)
    if d is not None:
        step += drafter_forward(d, rows, run.rows, visible, run.compute_bytes)
        step += counted(2 * run.rows * (block - 1) * (d.own_head or t.vocab) * d.hidden, v)
        passes = 1 if d.kind == "dflash" else block - 1
        cache = run.rows * visible * 2 * d.layers * d.kv_heads * d.head_dim * w
        step += Work(read=passes * (d.elements * w + cache))
    return prompts, step * (run.response / (tau if d else 1.0))


def walking(t: TargetSize, d: DrafterSize, run: Decoding, tau: float, reads: bool, sharing: Sharing) -> Work:
    """Finding a batch's anchors on texts that are there, with the target's reading where ``reads``."""
    tokens = run.prompt + run.response
    read = target_forward(t, run.rows * tokens, tokens, sharing, min(t.layers, d.last_tap + 1)) if reads else Work()
    step = drafter_forward(d, 0, run.rows, tokens / 2, run.compute_bytes) + Work(read=d.elements * run.weight_bytes)
    step += counted(2 * run.rows * (d.block - 1) * (d.own_head or t.vocab) * d.hidden, t.width_bytes)
    return read + step * (run.response / tau)
