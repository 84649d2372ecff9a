"""How losses are computed: in chunks, only where a slot counts, in which precision; and what they refuse."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from tests.support.blocks import HIDDEN, VOCAB, N, make_blocks
from torch import Tensor, nn

from draftopd.losses import liger
from draftopd.losses.chunked import per_slot
from draftopd.losses.cross_entropy import CrossEntropy
from draftopd.losses.distilled import Distilled
from draftopd.losses.divergence import forward_kl, reverse_kl
from draftopd.replay.blocks import Blocks
from draftopd.targets import head
from draftopd.targets.head import LMHead

ASYMMETRIC = partial(Distilled, accepted=forward_kl, rejected=reverse_kl)


@pytest.mark.parametrize("block_size, gamma", [(16, 7.0), (10, 5.0), (8, 4.0)])
def test_cross_entropy_constants_of_dflash(block_size: int, gamma: float) -> None:
    from draftopd.losses.weighting import cross_entropy_gamma

    assert cross_entropy_gamma(block_size) == gamma


@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_chunks_make_no_difference_and_bound_the_logits(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = make_blocks()
    whole = ASYMMETRIC()(blocks).loss
    (expected,) = torch.autograd.grad(whole, blocks.draft_states)
    monkeypatch.setattr(head, "CHUNK_ELEMENTS", chunk * VOCAB)
    blocks.head.rows.clear()
    loss = ASYMMETRIC()(blocks).loss
    (gradient,) = torch.autograd.grad(loss, blocks.draft_states)
    torch.testing.assert_close(loss, whole)
    torch.testing.assert_close(gradient, expected)
    assert max(blocks.head.rows) <= chunk


def test_slots_of_no_weight_are_not_computed() -> None:
    blocks = make_blocks([0] * N)
    ASYMMETRIC(rejected_weight=0.0, include_correction=True)(blocks)
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
        assert not Distilled(accepted=forward_kl)(blocks).loss.requires_grad
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
    exact = Distilled(accepted=forward_kl)(blocks).loss
    module = nn.Linear(HIDDEN, VOCAB, bias=False, dtype=torch.bfloat16).requires_grad_(False)
    module.weight.copy_(blocks.head.weight)
    rounded = Blocks(**{**blocks.__dict__, "head": LMHead(module)})
    assert rounded.head.logits(blocks.draft_states).dtype == torch.float32
    torch.testing.assert_close(Distilled(accepted=forward_kl)(rounded).loss, exact, rtol=0.03, atol=0.03)


@pytest.mark.parametrize(
    "build",
    [
        lambda: ASYMMETRIC(gamma=0.0),
        lambda: ASYMMETRIC(gamma=1.1),
        lambda: ASYMMETRIC(accepted_gamma=0.0),
        lambda: ASYMMETRIC(accepted_weight=-1.0),
        lambda: ASYMMETRIC(accepted_weight=0.0, rejected_weight=0.0),
        lambda: ASYMMETRIC(normalization="both"),
        lambda: Distilled(accepted=forward_kl, gamma=2.0),
        lambda: Distilled(accepted=forward_kl, target_temperature=0.0),
        lambda: ASYMMETRIC(target_temperature=-1.0),
        lambda: CrossEntropy(gamma=-1.0),
    ],
)
def test_wrong_options_are_refused(build) -> None:
    with pytest.raises(ValueError, match="found"):
        build()


def test_a_distilling_loss_needs_the_target() -> None:
    blocks = make_blocks()
    with pytest.raises(ValueError, match="target's states"):
        Distilled(accepted=forward_kl)(Blocks(**{**blocks.__dict__, "target_states": None}))


def test_best_tokens() -> None:
    blocks = make_blocks()
    expected = blocks.head.logits(blocks.draft_states).argmax(-1)
    assert torch.equal(blocks.head.best_tokens(blocks.draft_states), expected)


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
