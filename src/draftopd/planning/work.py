"""Operations, bytes moved, and the minimum seconds that they take on a device.

A multiplication and an addition count as two operations. Seconds follow the roofline model: the maximum of the times
for operations, for bytes (both at the assumed fraction of the device's peak), and for launches by the host.
"""

from __future__ import annotations

from dataclasses import dataclass

from draftopd.planning.devices import Assumptions
from draftopd.planning.memory import Decoding, Sharing
from draftopd.planning.sizes import DrafterSize, Step, TargetSize
from draftopd.targets.target import MAX_BLOCK_QUERIES


@dataclass(frozen=True)
class Work:
    """Operations in half precision and in float32, and bytes read from memory and fetched from other devices.

    ``layers`` counts the layers that the host launches, one after another.
    """

    half: float = 0.0
    single: float = 0.0
    read: float = 0.0
    fetched: float = 0.0
    layers: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))

    def __mul__(self, times: float) -> Work:
        return Work(*(times * value for value in vars(self).values()))

    @property
    def operations(self) -> float:
        return self.half + self.single

    def seconds(self, given: Assumptions, compiled: bool = False) -> float:
        """Minimum seconds, by the roofline model."""
        device = given.device
        arithmetic = (self.half / device.tflops + self.single / device.float32) / 1e12 / given.utilisation
        moved = self.read / device.bandwidth / 1e9 / given.bandwidth_utilisation
        fetched = self.fetched / device.link / 1e9 / given.bandwidth_utilisation
        launched = 0.0 if compiled else self.layers * given.launch_ms / 1e3
        return max(arithmetic, moved, fetched, launched)


def counted(operations: float, width_bytes: int) -> Work:
    """Operations in the precision of this width."""
    return Work(half=operations) if width_bytes <= 2 else Work(single=operations)


def target_forward(
    t: TargetSize, tokens: float, keys: float, sharing: Sharing, depth: int | None = None, forwards: int = 1
) -> Work:
    """The target over ``tokens`` in ``forwards``, without the LM head; each token attends to ``keys``, masked or not.

    ``depth``: layers computed; None: all.
    """
    part = 1.0 if depth is None else depth / t.layers
    scores = 4 * tokens * keys * t.layers * t.heads * t.head_dim
    whole = counted(part * (2 * t.active_elements * tokens + scores), t.width_bytes)
    weights = t.layer_elements * part * t.width_bytes
    moved = touched(t, tokens / forwards) * part * t.width_bytes * forwards
    fetched = weights * forwards * (sharing.shards - 1) / sharing.shards
    return whole + Work(read=moved, fetched=fetched, layers=part * t.layers * forwards)


def touched(t: TargetSize, tokens: float) -> float:
    """Weights of the layers that a forward over ``tokens`` reads, if experts are chosen at random."""
    if not t.experts:
        return t.layer_elements
    return t.layer_elements - t.expert_elements * (1 - t.top_k / t.experts) ** tokens


def drafter_forward(d: DrafterSize, recorded: float, blocks: float, keys: float, width_bytes: int) -> Work:
    """The drafter over ``recorded`` tokens and ``blocks``, without the LM head; each slot attends to ``keys``."""
    width, kv = d.heads * d.head_dim, d.kv_heads * d.head_dim
    first = d.hidden * (2 if d.kind == "eagle3" else 1)  # width of the attention's input
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
        used: fraction of the slots that the loss uses.
        proposes: whether the loss needs the drafter's proposals.
        every: agreement is measured every this many steps, for which the target may have to score the proposals.
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
    passes = 4 if step.checkpointing else 3  # backward: one pass for states and one for weights
    loss = head * (2 if not d.own_head else 4)  # forward and gradient of states; recomputation and gradient of weights
    loss += 0 if features_only else whole
    return {
        "target reads": target_forward(t, recorded, step.tokens, sharing, depth),
        "target scores": score * scoring,
        "drafter": forward * passes,
        "proposals": counted(slots * head, v) * (1.0 if proposes or not features_only else logged),
        "loss": counted(slots * used * loss, v),
        "measurement": counted(slots * (head + whole), v) * logged,
    }


def decoding(t: TargetSize, d: DrafterSize | None, run: Decoding, sharing: Sharing, tau: float) -> tuple[Work, Work]:
    """Decoding a batch: reading the prompts, and all steps after it, of a block or (without a drafter) a token."""
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
    """Finding a batch's anchors on recorded texts, including the target's forward over them if ``reads``."""
    tokens = run.prompt + run.response
    read = target_forward(t, run.rows * tokens, tokens, sharing, min(t.layers, d.last_tap + 1)) if reads else Work()
    step = drafter_forward(d, 0, run.rows, tokens / 2, run.compute_bytes) + Work(read=d.elements * run.weight_bytes)
    step += counted(2 * run.rows * (d.block - 1) * (d.own_head or t.vocab) * d.hidden, t.width_bytes)
    return read + step * (run.response / tau)
