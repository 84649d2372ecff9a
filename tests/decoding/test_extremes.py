"""Sampling, verification and the reverse coupling where distributions are extreme: no NaN, no token without mass."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from draftopd.decoding.coupling import couple
from draftopd.decoding.sampling import MIN_TEMPERATURE, Sampling, draw, inverse_draw
from draftopd.decoding.verify import residual_at, verify_rejection

VOCAB, K, BLOCKS = 7, 3, 4
few = settings(max_examples=150, deadline=None, derandomize=True, database=None)

#: As finite logits, the ends of what bfloat16 layers give, and tokens that the drafter's vocabulary lacks.
rows = st.lists(
    st.one_of(st.sampled_from((0.0, 1e4, -1e4, -torch.inf)), st.floats(-1e4, 1e4, width=32)),
    min_size=VOCAB, max_size=VOCAB,
).filter(lambda row: max(row) > -torch.inf)  # fmt: skip
samplings = st.builds(
    Sampling,
    st.sampled_from((0.0, MIN_TEMPERATURE, 1e-3, 0.7, 1.0, 1e4, 1e30)),
    st.sampled_from((0, 1, 2, VOCAB, VOCAB + 5)),
    st.sampled_from((1e-50, 1e-3, 0.5, 0.999999, 1.0)),
)
#: The drafter's logits are another row, the target's own, or those moved in their last bits.
drafters = st.one_of(rows, st.just("same"), st.just("nearly"))


def laws(count: int, drawn: list[list[float]], sampling: Sampling) -> Tensor:
    """``[BLOCKS, count, VOCAB]``: the rows over and over."""
    logits = torch.tensor([drawn[i % len(drawn)] for i in range(BLOCKS * count)]).view(BLOCKS, count, VOCAB)
    return sampling.probabilities(logits)


def drafted(p: Tensor, drafter: list[float] | str, sampling: Sampling) -> Tensor:
    if drafter == "same":
        return p
    if drafter == "nearly":
        return torch.nextafter(p, torch.ones(())).where(p > 0, p)
    assert isinstance(drafter, list)
    return laws(p.shape[1], [drafter], sampling)


@few
@given(row=rows, sampling=samplings)
def test_probabilities_are_a_distribution(row: list[float], sampling: Sampling) -> None:
    logits = torch.tensor(row)
    p = sampling.probabilities(logits)
    assert p.isfinite().all() and (p >= 0).all() and abs(float(p.sum()) - 1) < 1e-5
    assert (p[logits == -torch.inf] == 0).all()
    if sampling.temperature <= 1:  # beyond it float32 may tell the best tokens apart no longer
        assert p[logits.argmax()] > 0
    tokens = sampling.choose(logits.expand(20, VOCAB), torch.Generator().manual_seed(0))
    assert (p[tokens] > 0).all()


@few
@given(
    target=st.lists(rows, min_size=1, max_size=3), drafter=drafters, sampling=samplings, seed=st.integers(0, 2**32 - 1)
)
def test_verification_emits_tokens_that_the_target_allows(
    target: list[list[float]], drafter: list[float] | str, sampling: Sampling, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    p = laws(K + 1, target, sampling)
    q = drafted(p[:, :K], drafter, sampling)
    proposals = draw(q, generator)
    verdict = verify_rejection(proposals, q, p, generator)
    assert ((verdict.accepted >= 0) & (verdict.accepted <= K)).all()
    emitted = torch.cat([proposals, proposals[:, :1]], 1).scatter(1, verdict.accepted[:, None], verdict.token[:, None])
    mass = p.gather(-1, emitted[..., None])[..., 0]
    assert (mass[torch.arange(K + 1) <= verdict.accepted[:, None]] > 0).all()
    if drafter == "same":
        assert (verdict.accepted == K).all()


@few
@given(
    target=st.lists(rows, min_size=1, max_size=3), drafter=drafters, sampling=samplings, seed=st.integers(0, 2**32 - 1)
)
def test_coupled_proposals_are_tokens_that_the_drafter_allows(
    target: list[list[float]], drafter: list[float] | str, sampling: Sampling, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    p = laws(K, target, sampling)
    q = drafted(p, drafter, sampling)
    labels = draw(p, generator)
    luck = torch.rand(BLOCKS, K, 2, generator=generator, dtype=torch.float64)
    luck[0] = 1 - 2**-53  # the largest number there is
    luck[1] = 0.0
    everywhere = torch.ones(BLOCKS, K, dtype=torch.bool)
    proposals, agreed = couple(labels, everywhere, q, p, luck, everywhere[:, 0])
    assert ((proposals >= 0) & (proposals < VOCAB)).all()
    assert (q.gather(-1, proposals[..., None]) > 0).all()
    assert torch.equal(agreed, (proposals == labels).all(-1) & agreed)


def test_a_residual_of_rounding_alone_gives_way_to_the_target() -> None:
    """What is left between two laws that agree but for a subnormal number: a draw could round it to nothing."""
    p = torch.tensor([[0.25, 0.75, 1e-44, 0.0]])
    q = torch.tensor([[0.25, 0.75, 0.0, 0.0]])
    none_accepted = torch.zeros(1, dtype=torch.long)
    residual = residual_at(none_accepted, q[:, None], p[:, None].expand(1, 2, 4))
    assert torch.equal(residual, p)
    kept = residual_at(none_accepted, q[:, None], torch.tensor([[[0.25, 0.75 - 1e-6, 1e-6, 0.0]] * 2]))
    assert torch.equal(kept.nonzero()[:, 1], torch.tensor([2]))


@few
@given(st.lists(st.floats(0, 1, width=32), min_size=1, max_size=VOCAB).filter(any), st.floats(0, 1, exclude_max=True))
def test_inverse_draw_never_takes_a_token_without_mass(weights: list[float], luck: float) -> None:
    token = int(inverse_draw(torch.tensor(weights), torch.tensor(luck, dtype=torch.float64)))
    assert weights[token] > 0
