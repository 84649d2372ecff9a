"""The first difference between two texts and the logit gap there; above temperature 0, equal distributions."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from tests.support.laws import correction_from_target
from torch import Tensor

from draftopd.decoding import step
from draftopd.decoding.sampling import draw
from draftopd.decoding.verify import Verdict
from draftopd.evaluation.benchmark import ReasoningBenchmark
from draftopd.evaluation.lossless import CLASSES, Mismatch, compare, features, same_distribution
from draftopd.evaluation.results import Evaluation
from draftopd.targets.target import Target

PROMPT = [5, 9, 3]


def logits(target: Target, tokens: list[int]) -> torch.Tensor:
    """The model's own forward over the whole prefix, without the engine's cache."""
    return target.model(torch.tensor([tokens])).logits[0, -1]


def test_equal_texts(target: Target) -> None:
    assert compare(target, PROMPT, [1, 2, 3], [1, 2, 3]) is None
    assert compare(target, PROMPT, [], []) is None


@pytest.mark.parametrize("shared", [[], [7], [7, 8, 2]])
def test_position_and_gap(target: Target, shared: list[int]) -> None:
    plain, other = [*shared, 11, 4], [*shared, 30, 4]
    found = compare(target, PROMPT, plain, other)
    assert found is not None
    assert (found.position, found.plain_token, found.speculative_token) == (len(shared), 11, 30)
    reference = logits(target, PROMPT + shared)
    assert found.logit_gap == pytest.approx(float(reference[11] - reference[30]), abs=1e-4)
    # Seen from the other text the gap is the opposite.
    back = compare(target, PROMPT, other, plain)
    assert back is not None and back.logit_gap == pytest.approx(-found.logit_gap, abs=1e-5)


def test_the_greedy_token_stands_above_any_other(target: Target) -> None:
    best = int(logits(target, PROMPT).argmax())
    found = compare(target, PROMPT, [best], [(best + 1) % target.vocab_size])
    assert found is not None and found.logit_gap is not None and found.logit_gap > 0


def test_one_text_ends_earlier(target: Target) -> None:
    assert compare(target, PROMPT, [1, 2, 3], [1, 2]) == Mismatch(2, 3, None, None)
    assert compare(target, PROMPT, [1], [1, 2]) == Mismatch(1, None, 2, None)
    assert compare(target, PROMPT, [], [4]) == Mismatch(0, None, 4, None)


@pytest.mark.parametrize("gap, tied", [(0.0, True), (0.01, True), (-0.01, True), (0.011, False), (-0.011, False)])
def test_ties(gap: float, tied: bool) -> None:
    assert Mismatch(0, 1, 2, gap).tied(0.01) == tied
    assert not Mismatch(0, None, 2, None).tied(100.0)


def test_features() -> None:
    log_probs, entropies = torch.tensor([-1.0, -2.0, -6.0, -3.0]), torch.tensor([0.5, 0.5, 1.0, 2.0])
    length, log_prob, entropy, first, distinct, *classes = features([3, 19, 3, 40], log_probs, entropies)
    assert (length, log_prob, entropy, first, distinct) == (4.0, -3.0, 1.0, -1.0, 3 / 4)
    assert classes == [{3: 3 / 4, 8: 1 / 4}.get(i, 0.0) for i in range(CLASSES)]


def pairs(rng: np.random.Generator, count: int = 40, shift: float = 0.0) -> list[tuple[list[float], list[float]]]:
    """Prompts unlike one another, features that go together, one heavy-tailed, one constant, one never seen."""
    found = []
    for _ in range(count):
        level, width = rng.normal(0, 5), rng.uniform(0.2, 3)

        def text(by: float, level: float = level, width: float = width) -> list[float]:
            a, b = rng.normal(level + by * width, width), rng.standard_t(2)
            return [a, 2 * a + rng.normal(), b, float(rng.random() < 0.05), 7.0, 0.0]

        found.append((text(0.0), text(shift)))
    return found


def test_p_values_of_one_distribution_are_uniform() -> None:
    values = np.array([same_distribution(pairs(np.random.default_rng(seed)), seed) for seed in range(200)])
    assert 0.01 <= (values < 0.05).mean() <= 0.1
    assert abs((values < 0.5).mean() - 0.5) < 0.12


def test_p_values_of_other_distributions_are_small() -> None:
    values = [same_distribution(pairs(np.random.default_rng(seed), shift=0.8)) for seed in range(20)]
    assert np.median(values) < 0.01
    assert max(same_distribution(pairs(np.random.default_rng(seed), 200, shift=0.8)) for seed in range(5)) < 1e-3


def test_one_sided_differences() -> None:
    """Always apart by as much in one way: no exchange is as far apart but its mirror image."""
    assert same_distribution([([0.0], [1.0])] * 30) == pytest.approx(1e-4)
    assert same_distribution([([1.0], [0.0])] * 30) == pytest.approx(1e-4)
    # Of three pairs two in eight exchanges are.
    assert same_distribution([([0.0], [1.0])] * 3) == pytest.approx(0.25, abs=0.02)


def test_which_is_which_does_not_matter() -> None:
    found = pairs(np.random.default_rng(3), shift=0.3)
    assert same_distribution(found) == same_distribution([(b, a) for a, b in found])
    # Nor do a feature's units.
    scaled = [tuple([1000 * a, *rest] for a, *rest in pair) for pair in found]
    assert same_distribution(found) == same_distribution(scaled)


def test_texts_that_are_all_equal() -> None:
    assert same_distribution([([1.0, 2.0], [1.0, 2.0])] * 5) == 1.0


def accepts_everything(proposals: Tensor, q: Tensor, p: Tensor, generator: torch.Generator | None = None) -> Verdict:
    return Verdict(torch.full(proposals.shape[:-1], proposals.shape[-1]), draw(p[:, -1], generator))


SAMPLED = {"temperature": 1.0, "max_new_tokens": 64, "batch_size": 64, "shown": 0}


@pytest.mark.slow
@pytest.mark.parametrize("wrong, count", [(correction_from_target, 256), (accepts_everything, 48)])
def test_a_decoder_of_another_law_is_caught(
    wrong: Callable[..., Verdict], count: int, evaluate_bundled: Callable[..., Evaluation],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(step, "verify_rejection", wrong)
    result = evaluate_bundled(examples=ReasoningBenchmark(count=count).examples(), **SAMPLED)
    assert result.distribution_p is not None and result.distribution_p < 1e-3
    assert result.speedup is None and result.speedup_interval is None
    assert result.withheld == "not lossless: the tokens are not distributed as plain sampling's (p = 0.0001)"


@pytest.mark.slow
@pytest.mark.parametrize("verification", ["rejection_sampling", "target_only"])
def test_a_decoder_of_the_targets_law_is_not(verification: str, evaluate_bundled: Callable[..., Evaluation]) -> None:
    result = evaluate_bundled(limit=64, verification=verification, **SAMPLED)
    assert result.distribution_p is not None and result.distribution_p > 1e-3
    assert result.withheld is None and result.speedup is not None
