"""Every loss against a slow float64 reference, value and gradient."""

from __future__ import annotations

import math

import pytest
import torch
from tests.support.blocks import HIDDEN, VOCAB, K, N, assert_same, laws, make_blocks
from torch import Tensor, nn

from draftopd.losses import liger
from draftopd.losses.asymmetric_kl import AsymmetricKL
from draftopd.losses.chunked import per_slot
from draftopd.losses.cross_entropy import CrossEntropy
from draftopd.losses.divergence import forward_kl, reverse_kl
from draftopd.losses.kl import ForwardKL, ReverseKL
from draftopd.replay.blocks import Blocks
from draftopd.targets import head
from draftopd.targets.head import LMHead, best_tokens


def slow_kl(p: Tensor, q: Tensor) -> Tensor:
    return sum((p[v] * (p[v].log() - q[v].log()) for v in range(VOCAB)), start=torch.zeros((), dtype=p.dtype))


def slow_asymmetric(blocks: Blocks, loss: AsymmetricKL) -> Tensor:
    p, q = laws(blocks, loss.view.temperature)
    streams: list[list[tuple[Tensor, float]]] = [[], []]
    for i in range(N):
        n = int(blocks.accepted[i])
        for k in range(1, K + 1):
            if not blocks.valid[i, k - 1]:
                continue
            if k <= n + int(loss.include_correction) and loss.stream_weights[0] > 0:
                weight = loss.stream_weights[0] * loss.gammas["accepted"] ** (k - 1)
                streams[0].append((slow_kl(p[i, k - 1], q[i, k - 1]), weight))
            last = n + 1 if loss.accept_until_fail else K
            if n < k <= last and loss.stream_weights[1] > 0:
                streams[1].append(
                    (slow_kl(q[i, k - 1], p[i, k - 1]), loss.stream_weights[1] * loss.gammas["rejected"] ** (k - 1))
                )
    if loss.normalization == "token":
        every = streams[0] + streams[1]
        return sum(v * w for v, w in every) / sum(w for _, w in every)
    means = [
        (sum(v * w for v, w in stream) / sum(w for _, w in stream), weight)
        for stream, weight in zip(streams, loss.stream_weights, strict=True)
        if stream
    ]
    return sum(m * w for m, w in means) / sum(w for _, w in means)


def slow_every_slot(blocks: Blocks, reverse: bool, gamma: float, until_fail: bool, temperature: float = 1.0) -> Tensor:
    p, q = laws(blocks, temperature)
    total, weights = torch.zeros((), dtype=p.dtype), 0.0
    for i in range(N):
        for k in range(1, K + 1):
            if blocks.valid[i, k - 1] and not (until_fail and k > int(blocks.accepted[i]) + 1):
                pair = (q[i, k - 1], p[i, k - 1]) if reverse else (p[i, k - 1], q[i, k - 1])
                total = total + gamma ** (k - 1) * slow_kl(*pair)
                weights += gamma ** (k - 1)
    return total / weights


def slow_cross_entropy(blocks: Blocks, gamma: float, until_fail: bool) -> Tensor:
    _, q = laws(blocks)
    total, weights = torch.zeros((), dtype=q.dtype), 0.0
    for i in range(N):
        for k in range(1, K + 1):
            if blocks.recorded[i, k - 1] and not (until_fail and k > int(blocks.accepted[i]) + 1):
                weight = math.exp(-(k - 1) / gamma)
                total = total - weight * q[i, k - 1, blocks.labels[i, k - 1]].log()
                weights += weight
    return total / weights


@pytest.mark.parametrize("normalization", ["stream", "token"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gamma": 0.5, "accepted_gamma": 0.7, "accepted_weight": 2.0, "rejected_weight": 0.3},
        {"include_correction": True},
        {"accept_until_fail": True},
        {"target_temperature": 0.5},
        {"include_correction": True, "accept_until_fail": True, "rejected_weight": 0.0},
        {"accepted_weight": 0.0},
    ],
)
@pytest.mark.parametrize("accepted", [None, [5] * N, [0] * N])
def test_asymmetric_kl(accepted: list[int] | None, options: dict, normalization: str) -> None:
    loss = AsymmetricKL(**options, normalization=normalization)
    blocks = make_blocks(accepted)
    if accepted == [5] * N and options.get("accepted_weight") == 0:
        assert loss(blocks).loss == 0  # no slot is left
        return
    if accepted == [0] * N and options.get("rejected_weight") == 0 and not loss.include_correction:
        return
    assert_same(loss, blocks, slow_asymmetric(blocks, loss))


def test_asymmetric_kl_differs_from_its_own_variants() -> None:
    base = AsymmetricKL()(make_blocks()).loss
    variants = ({"gamma": 0.5}, {"include_correction": True}, {"accept_until_fail": True}, {"rejected_weight": 0.5})
    for options in variants:
        assert abs(AsymmetricKL(**options)(make_blocks()).loss - base) > 1e-3


@pytest.mark.parametrize("gamma", [1.0, 0.7])
@pytest.mark.parametrize("until_fail", [False, True])
@pytest.mark.parametrize("reverse", [False, True])
def test_one_divergence_on_every_slot(reverse: bool, until_fail: bool, gamma: float) -> None:
    blocks = make_blocks()
    loss = (ReverseKL if reverse else ForwardKL)(gamma, until_fail)
    assert_same(loss, blocks, slow_every_slot(blocks, reverse, gamma, until_fail))


def test_a_sharpened_teacher() -> None:
    blocks = make_blocks()
    assert_same(ReverseKL(target_temperature=0.6), blocks, slow_every_slot(blocks, True, 1.0, False, 0.6))


@pytest.mark.parametrize("gamma", [None, 2.0])
@pytest.mark.parametrize("until_fail", [False, True])
def test_cross_entropy(until_fail: bool, gamma: float | None) -> None:
    blocks = make_blocks()
    expected = gamma or 1 + 0.375 * (K + 1)
    assert_same(CrossEntropy(gamma, until_fail), blocks, slow_cross_entropy(blocks, expected, until_fail))


@pytest.mark.parametrize("block_size, gamma", [(16, 7.0), (10, 5.0), (8, 4.0)])
def test_cross_entropy_constants_of_dflash(block_size: int, gamma: float) -> None:
    from draftopd.losses.weighting import cross_entropy_gamma

    assert cross_entropy_gamma(block_size) == gamma


def test_softcapped_head() -> None:
    blocks = make_blocks(softcap=1.5)
    assert_same(ForwardKL(), blocks, slow_every_slot(blocks, False, 1.0, False))


@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_chunks_make_no_difference_and_bound_the_logits(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = make_blocks()
    whole = AsymmetricKL()(blocks).loss
    (expected,) = torch.autograd.grad(whole, blocks.draft_states)
    monkeypatch.setattr(head, "CHUNK_ELEMENTS", chunk * VOCAB)
    blocks.head.rows.clear()
    loss = AsymmetricKL()(blocks).loss
    (gradient,) = torch.autograd.grad(loss, blocks.draft_states)
    torch.testing.assert_close(loss, whole)
    torch.testing.assert_close(gradient, expected)
    assert max(blocks.head.rows) <= chunk


def test_slots_of_no_weight_are_not_computed() -> None:
    blocks = make_blocks([0] * N)
    AsymmetricKL(rejected_weight=0.0, include_correction=True)(blocks)
    assert sum(blocks.head.rows) == 2 * N  # the correction slot of each block, drafter and target


def test_gradcheck() -> None:
    blocks = make_blocks()
    states = blocks.draft_states.detach().flatten(0, 1)[:4].requires_grad_()
    targets = blocks.target_states.flatten(0, 1)[:4]

    def values(drafted: Tensor) -> Tensor:
        return per_slot(
            lambda s, t: reverse_kl(s, blocks.head.logits(t).log_softmax(-1)), drafted, blocks.head, targets, chunk=3
        )

    jacobian = torch.autograd.functional.jacobian(values, states)
    step = 1e-6
    for i, j in ((0, 0), (1, 3), (3, 7)):
        moved = states.detach().clone()
        moved[i, j] += step
        # Values are float32; differences are taken of the float64 function itself.
        before = reverse_kl(blocks.head.logits(states.detach()), blocks.head.logits(targets).log_softmax(-1))
        after = reverse_kl(blocks.head.logits(moved), blocks.head.logits(targets).log_softmax(-1))
        torch.testing.assert_close(jacobian[:, i, j].double(), (after - before) / step, rtol=1e-3, atol=1e-5)


def test_no_gradient_when_none_is_wanted() -> None:
    blocks = make_blocks()
    with torch.no_grad():
        assert not ForwardKL()(blocks).loss.requires_grad
    assert blocks.head.weight.grad is None


@pytest.mark.parametrize("scale", [1e4, 1e-4])
@pytest.mark.parametrize("divergence", [forward_kl, reverse_kl])
def test_extreme_logits_stay_finite(divergence, scale: float) -> None:
    drafted = (torch.randn(8, 16) * scale).requires_grad_()
    targets = (torch.randn(8, 16) * scale).log_softmax(-1)
    value = divergence(drafted, targets)
    value.sum().backward()
    assert value.isfinite().all() and (value > -1e-3).all()
    assert drafted.grad is not None and drafted.grad.isfinite().all()


def test_bf16_head_stays_near_float32() -> None:
    blocks = make_blocks(double=False)
    exact = ForwardKL()(blocks).loss
    module = nn.Linear(HIDDEN, VOCAB, bias=False, dtype=torch.bfloat16).requires_grad_(False)
    module.weight.copy_(blocks.head.weight)
    rounded = Blocks(**{**blocks.__dict__, "head": LMHead(module)})
    assert rounded.head.logits(blocks.draft_states).dtype == torch.float32
    torch.testing.assert_close(ForwardKL()(rounded).loss, exact, rtol=0.03, atol=0.03)


@pytest.mark.parametrize(
    "build",
    [
        lambda: AsymmetricKL(gamma=0.0),
        lambda: AsymmetricKL(gamma=1.1),
        lambda: AsymmetricKL(accepted_gamma=0.0),
        lambda: AsymmetricKL(accepted_weight=-1.0),
        lambda: AsymmetricKL(accepted_weight=0.0, rejected_weight=0.0),
        lambda: AsymmetricKL(normalization="both"),
        lambda: ForwardKL(gamma=2.0),
        lambda: ForwardKL(target_temperature=0.0),
        lambda: AsymmetricKL(target_temperature=-1.0),
        lambda: CrossEntropy(gamma=-1.0),
    ],
)
def test_wrong_options_are_refused(build) -> None:
    with pytest.raises(ValueError, match="found"):
        build()


def test_a_distilling_loss_needs_the_teacher() -> None:
    blocks = make_blocks()
    with pytest.raises(ValueError, match="target's states"):
        ForwardKL()(Blocks(**{**blocks.__dict__, "target_states": None}))


def test_best_tokens() -> None:
    blocks = make_blocks()
    expected = blocks.head.logits(blocks.draft_states).argmax(-1)
    assert torch.equal(best_tokens(blocks.draft_states, blocks.head), expected)


def test_liger_is_left_alone_on_a_cpu() -> None:
    assert not liger.fits(torch.zeros(2, 2), make_blocks().head)


def test_liger_cross_entropy_interpreted(tmp_path) -> None:
    """The fused kernel under triton's interpreter, against torch."""
    if not liger.installed():
        pytest.skip("liger-kernel with triton is not installed (extra gpu)")
    import os
    import subprocess
    import sys

    script = tmp_path / "interpreted.py"
    script.write_text(
        "import torch, torch.nn.functional as F\n"
        "from draftopd.losses import liger\n"
        "from draftopd.targets.head import LMHead\n"
        "torch.manual_seed(0)\n"
        "module = torch.nn.Linear(16, 32, bias=False).requires_grad_(False)\n"
        "x = torch.randn(6, 16, requires_grad=True); y = torch.randint(0, 32, (6,)); w = torch.rand(6)\n"
        "value = liger.cross_entropy(x, LMHead(module), y)\n"
        "expected = F.cross_entropy(module(x), y, reduction='none')\n"
        "torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-5)\n"
        "g, = torch.autograd.grad((value * w).sum(), x); e, = torch.autograd.grad((expected * w).sum(), x)\n"
        "torch.testing.assert_close(g, e, rtol=1e-3, atol=1e-5)\n"
    )
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, str(script)], env=env, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
