"""Activations that the drafter's forward keeps for its backward, in bytes, by operation.

The rules are autograd's: a linear map keeps its input in the precision it computes in; a norm keeps its input in
float32 and the normalised values; attention keeps queries, keys, values, mask, output and one number per row. Under
autocast every linear map makes its own copy of its input.
"""

from __future__ import annotations

from dataclasses import dataclass

from draftopd.drafters.attention import MAX_QUERIES
from draftopd.planning.sizes import DrafterSize, Step

#: Bytes of float32, in which norms and log-sum-exps are computed.
FLOAT = 4


@dataclass(frozen=True)
class Kept:
    """Bytes of a drafter's forward.

    Args:
        context: kept for the recorded tokens; ``layers``: for the blocks, in all layers or steps.
        forward: held beside these during the whole forward, ``working``: during a part of it.
        backward: held beside these in the backward of one layer.
        output: the states that the loss reads.
    """

    context: float
    layers: float
    forward: float
    working: float
    backward: float
    output: float


def norm(width: int, incoming: int) -> int:
    """Kept per row: the input in float32, and the normalised values in the input's precision."""
    return width * (FLOAT + incoming)


def linear(width: int, incoming: int, step: Step, consumers: int = 1) -> int:
    """Kept per row that is the input of ``consumers`` linear maps."""
    return width * step.compute_bytes * (1 if incoming == step.compute_bytes else consumers)


def attention(d: DrafterSize, step: Step, queries: int, anchors: int, own: int, context: int) -> float:
    """Kept by attention over a batch: ``queries`` and ``own`` keys per anchor, ``context`` keys per sequence.

    Chunks leave out the context after their anchors, which are assumed to be spread evenly over the response.
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
    """Bytes of a drafter's forward over all anchors."""
    return _dflash(d, step, target_bytes) if d.kind == "dflash" else _one_by_one(d, step, target_bytes)


def _mlp(d: DrafterSize, step: Step, residual: int) -> int:
    """Kept per row: the norm before it, and gate, its activation, up and their product."""
    joined = linear(d.hidden, max(residual, step.weight_bytes), step, 2)
    return norm(d.hidden, residual) + joined + 4 * d.mlp * step.compute_bytes


def _features(d: DrafterSize, step: Step, target_bytes: int) -> int:
    """Kept per recorded token: the features, if they are cast to another precision."""
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
    # The loss reads a copy of the states that the mask of its anchors selects.
    output = proposals * d.hidden * w
    back = slots * (2 * d.mlp * c + 2 * d.hidden * w)
    if step.checkpointing:
        inputs = d.layers * slots * d.hidden * w
        working = max(0, slots * (3 * d.mlp * c + 2 * d.hidden * w) - last - output)
        return Kept(context + recorded * keys_values, inputs + last, output, working, layer + back, output)
    return Kept(context, d.layers * layer + last, recorded * keys_values + output, 0.0, back, output)


def _one_by_one(d: DrafterSize, step: Step, target_bytes: int) -> Kept:
    w, c = step.weight_bytes, step.compute_bytes
    recorded, rows, steps = step.batch * step.tokens, step.batch * step.anchors, d.block - 1
    width, kv, eagle = d.heads * d.head_dim, d.kv_heads * d.head_dim, d.kind == "eagle3"
    first = c if eagle else w  # precision of the features as a step's states
    # A step's input is the token and the state, both normalised, side by side. Only the state's norm keeps its input.
    enter = d.hidden * first + norm(d.hidden, first) + linear(2 * d.hidden, w, step, 3 if eagle else 1)
    if not eagle:
        enter += norm(d.hidden, c) + linear(d.hidden, w, step, 3)
    features = _features(d, step, target_bytes)
    # The target's states that an MTP head reads need no gradient, so that its norm keeps no input.
    context = recorded * (features + enter + (0 if eagle else norm(kv, c) - d.hidden * FLOAT))
    keys_values = kv * (c if eagle else w) + kv * c
    each = rows * (enter + (0 if eagle else norm(width, c) + norm(kv, c)) + _mlp(d, step, c) + norm(d.hidden, c))
    attended = [attention(d, step, 1, step.anchors, own, step.tokens - 1) for own in range(1, steps + 1)]
    slots = rows * steps
    output = slots * d.hidden * w
    back = rows * (2 * d.mlp * c + 2 * d.hidden * w)
    layers = steps * each + sum(attended)
    forward = recorded * keys_values + slots * keys_values + output
    if step.checkpointing:
        own = rows * keys_values * steps * (steps + 1) / 2  # every step stacks the block's own keys and values
        passed = rows * (_mlp(d, step, c) + norm(width, c))
        layers = steps * (each - passed) + own
        return Kept(context + recorded * keys_values, layers, forward, passed, passed + attended[-1] + back, output)
    return Kept(context, layers, forward, 0.0, back, output)
