"""What the drafter's forward keeps for its backward, in bytes, operation by operation.

The rules are autograd's: a linear map keeps what goes in, in the precision it computes in; a norm keeps its input in
float32 and the normalised values; attention keeps queries, keys, values, mask, output and one number a row. Under
autocast every linear map makes a copy of its own of what goes in.
"""

from __future__ import annotations

from dataclasses import dataclass

from draftopd.drafters.attention import MAX_QUERIES
from draftopd.planning.sizes import DrafterSize, Step

#: Bytes of float32, which norms and log-sum-exps are computed in.
FLOAT = 4


@dataclass(frozen=True)
class Kept:
    """Bytes of a drafter's forward.

    Args:
        context: kept of the recorded tokens; ``layers``: of the blocks, in all layers or steps.
        forward: alive beside these during the whole forward, ``working``: during a part of it alone.
        backward: alive beside these in the backward of one layer.
        output: the states that go to the loss.
    """

    context: float
    layers: float
    forward: float
    working: float
    backward: float
    output: float


def norm(width: int, incoming: int) -> int:
    """Kept of a row: the input in float32, and the normalised values in the input's precision."""
    return width * (FLOAT + incoming)


def linear(width: int, incoming: int, step: Step, consumers: int = 1) -> int:
    """Kept of a row that goes into ``consumers`` linear maps."""
    return width * step.compute_bytes * (1 if incoming == step.compute_bytes else consumers)


def attention(d: DrafterSize, step: Step, queries: int, anchors: int, own: int, context: int) -> float:
    """Kept of attention over a batch: ``queries`` an anchor, ``own`` keys an anchor, ``context`` keys.

    Chunks leave out what lies behind their anchors, which are taken to be spread evenly behind the prompt.
    """
    c, width = step.compute_bytes, d.heads * d.head_dim
    total = step.batch * anchors * queries
    at_once = max(1, MAX_QUERIES // queries)
    kept = 0.0
    for begin in range(0, anchors, at_once):
        part = min(at_once, anchors - begin)
        seen = step.prompt + (context - step.prompt) * (begin + part) / anchors
        keys, asked = seen + part * own, part * queries
        if step.attention == "math":
            # Keys and values for every head, and every score, in float32.
            kept += step.batch * d.heads * FLOAT * (2 * keys * d.head_dim + asked * keys)
        elif step.attention != "flex":
            heads = d.heads if step.attention == "expanded" else d.kv_heads
            kept += step.batch * (2 * keys * heads * d.head_dim * c + asked * keys * c)
    if step.attention == "math":
        return kept + total * width * (FLOAT + c)  # scaled queries; into the output map
    if step.attention == "flex":
        kept = step.batch * 2 * (context + anchors * own) * d.kv_heads * d.head_dim * c
    return kept + total * (3 * width * c + d.heads * FLOAT)  # queries; output; into the output map


def kept(d: DrafterSize, step: Step, target_bytes: int) -> Kept:
    """What a drafter's forward over all anchors keeps."""
    return _dflash(d, step, target_bytes) if d.kind == "dflash" else _one_by_one(d, step, target_bytes)


def _mlp(d: DrafterSize, step: Step, residual: int) -> int:
    """Kept of a row: the norm before, and gate, its activation, up and their product."""
    return norm(d.hidden, residual) + linear(d.hidden, max(residual, step.weight_bytes), step, 2) + (
        4 * d.mlp * step.compute_bytes
    )  # fmt: skip


def _features(d: DrafterSize, step: Step, target_bytes: int) -> int:
    """Kept of a recorded token: the features in another precision than they came in."""
    w, c = step.weight_bytes, step.compute_bytes
    return d.taps * d.hidden * c if w != c or target_bytes != w else 0


def _dflash(d: DrafterSize, step: Step, target_bytes: int) -> Kept:
    w, c = step.weight_bytes, step.compute_bytes
    recorded, slots = step.batch * step.tokens, step.batch * step.anchors * d.block
    width, kv = d.heads * d.head_dim, d.kv_heads * d.head_dim
    joined = _features(d, step, target_bytes) + norm(d.hidden, c) + linear(d.hidden, w, step, 2 * d.layers)
    keys_values = d.layers * kv * (w + c)  # rotated keys, values
    context = recorded * (joined + d.layers * norm(kv, c))
    layer: float = slots * (norm(d.hidden, w) + linear(d.hidden, w, step, 3) + norm(width, c) + norm(kv, c))
    layer += attention(d, step, d.block, step.anchors, d.block, step.tokens) + slots * _mlp(d, step, w)
    last = slots * norm(d.hidden, w)
    proposals = step.batch * step.anchors * (d.block - 1)
    # The loss reads a copy of the states that its anchors' mask picks.
    output = proposals * d.hidden * w
    back = slots * (2 * d.mlp * c + 2 * d.hidden * w)
    if step.checkpointing:
        inputs = d.layers * slots * d.hidden * w
        working = max(0, slots * (3 * d.mlp * c + 2 * d.hidden * w) - last - output)
        return Kept(
            context + recorded * keys_values, inputs + last, output, working, layer + back, output,
        )  # fmt: skip
    return Kept(context, d.layers * layer + last, recorded * keys_values + output, 0.0, back, output)


def _one_by_one(d: DrafterSize, step: Step, target_bytes: int) -> Kept:
    w, c = step.weight_bytes, step.compute_bytes
    recorded, rows, steps = step.batch * step.tokens, step.batch * step.anchors, d.block - 1
    width, kv, eagle = d.heads * d.head_dim, d.kv_heads * d.head_dim, d.kind == "eagle3"
    first = c if eagle else w  # of the features as a step's states
    # An entry: token and state, both normalised, side by side. Only the state's norm keeps its input.
    if eagle:
        enter = d.hidden * first + norm(d.hidden, first) + linear(2 * d.hidden, w, step, 3)
    else:
        enter = d.hidden * first + norm(d.hidden, first) + linear(2 * d.hidden, w, step)
        enter += norm(d.hidden, c) + linear(d.hidden, w, step, 3)
    states = c
    features = _features(d, step, target_bytes)
    # What an MTP head reads of the target needs no gradient, so that its norm keeps no input.
    context = recorded * (features + enter + (0 if eagle else norm(kv, c) - d.hidden * FLOAT))
    keys_values = kv * (c if eagle else w) + kv * c
    each = rows * (enter + (0 if eagle else norm(width, c) + norm(kv, c)) + _mlp(d, step, states))
    each += rows * (norm(d.hidden, states))
    attended = [attention(d, step, 1, step.anchors, own, step.tokens - 1) for own in range(1, steps + 1)]
    slots = rows * steps
    output = slots * d.hidden * w
    back = rows * (2 * d.mlp * c + 2 * d.hidden * w)
    layers = steps * each + sum(attended)
    forward = recorded * keys_values + slots * keys_values + output
    if step.checkpointing:
        own = rows * keys_values * steps * (steps + 1) / 2  # every step's stack of the block's own keys and values
        passed = rows * (_mlp(d, step, states) + norm(width, c))
        layers = steps * (each - passed) + own
        return Kept(context + recorded * keys_values, layers, forward, passed, passed + attended[-1] + back, output)
    return Kept(context, layers, forward, 0.0, back, output)
