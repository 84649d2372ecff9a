"""The reasoning problems: addressed by index, right, and split without overlap."""

from __future__ import annotations

import random
import re
from collections.abc import Hashable

import pytest

from draftopd.bundled import problems as reasoning
from draftopd.bundled.problems import MAX_VALUE, Problem, Split, problem, problems, read_answer

SPLITS: tuple[Split, ...] = ("train", "validation", "test")
EQUATION = re.compile(r"(\d+) ([-+*/]) (\d+) = (\d+)")


def equations(text: str) -> list[tuple[int, str, int, int]]:
    return [(int(a), sign, int(b), int(c)) for a, sign, b, c in EQUATION.findall(text)]


@pytest.fixture(scope="module", params=SPLITS)
def sample(request: pytest.FixtureRequest) -> list[Problem]:
    return list(problems(request.param, 300))


def test_the_same_address_gives_the_same_problem() -> None:
    for split in SPLITS:
        assert list(problems(split, 20, seed=3)) == list(problems(split, 20, seed=3))
        assert list(problems(split, 20, seed=3)) != list(problems(split, 20, seed=4))
    assert len({tuple(problems(split, 5)) for split in SPLITS}) == 3


def test_access_is_random() -> None:
    row = list(problems("test", 30, seed=1))
    assert list(problems("test", 10, seed=1, start=17)) == row[17:27]
    assert [problem("test", i, seed=1) for i in reversed(range(30))] == row[::-1]


def test_the_callers_random_state_is_left_alone() -> None:
    random.seed(0)
    expected = random.random()
    random.seed(0)
    problem("train", 0)
    assert random.random() == expected


def test_problems_are_fixed_for_good() -> None:
    """The bundled target was trained on these: another wording or split needs another target."""
    example = problem("test", 0)
    assert example.question == (
        "There are 38 kites on the table of Yuki. Yuki gives half of the kites to Leo. After a good week she has "
        "three times as many. Leo has 6 more kites than Yuki. How many kites does Leo have?"
    )
    assert example.equations == "38 / 2 = 19. 19 * 3 = 57. 57 + 6 = 63."
    assert example.value == 63


def test_every_equation_is_right(sample: list[Problem]) -> None:
    for example in sample:
        steps = equations(example.reasoning)
        assert 2 <= len(steps) <= 5
        for a, sign, b, c in steps:
            assert {"+": a + b, "-": a - b, "*": a * b, "/": a // b if a % b == 0 else None}[sign] == c
            assert 1 <= c <= MAX_VALUE
        assert [step[0] for step in steps[1:]] == [step[3] for step in steps[:-1]]
        assert equations(example.equations) == steps
        assert steps[-1][3] == example.value
    assert {len(equations(example.equations)) for example in sample} == {2, 3, 4, 5}


def test_the_question_states_the_numbers(sample: list[Problem]) -> None:
    """Start value and operands stand in the question in order, but for doubling, tripling and halving."""
    for example in sample:
        steps = equations(example.equations)
        needed = [steps[0][0]] + [b for _, sign, b, _ in steps if sign in "+-"]
        stated = iter(int(n) for n in re.findall(r"\d+", example.question))
        assert all(n in stated for n in needed), example


def test_the_answer_is_read_back(sample: list[Problem]) -> None:
    for example in sample:
        assert re.findall(r"\d+", example.answer) == [str(example.value)]
        for thinking in (True, False):
            assert read_answer(example.response(thinking)) == example.value
            assert read_answer(example.response(thinking) + "<|im_end|>") == example.value


def test_responses() -> None:
    example = problem("train", 5)
    assert example.response() == f"<think>\n{example.reasoning}\n</think>\n\n{example.answer}"
    assert example.response(thinking=False) == f"<think>\n\n</think>\n\n{example.equations} {example.answer}"


def test_nothing_is_left_unfilled(sample: list[Problem]) -> None:
    for example in sample:
        text = example.question + example.response() + example.equations
        assert not re.search(r"[{}]|None", text)
        assert all(sentence[0].isupper() for sentence in (example.question, example.reasoning, example.answer))


def skeletons(split: Split, count: int, monkeypatch: pytest.MonkeyPatch) -> set[Hashable]:
    """The arithmetic of a split's problems: kinds of steps and equations, without the story."""
    with monkeypatch.context() as patch:
        patch.setattr(reasoning, "_tell", lambda steps, _rng: tuple((s.kind, s.equation) for s in steps))
        return set(problems(split, count))


def test_splits_share_no_skeleton(monkeypatch: pytest.MonkeyPatch) -> None:
    train, validation, test = (skeletons(split, 2500, monkeypatch) for split in SPLITS)
    assert not train & test and not train & validation and not validation & test
    # Drawn without regard to the split, as many problems do share some.
    monkeypatch.setattr(reasoning, "_bucket", lambda _steps: 0)
    first = skeletons("test", 2500, monkeypatch)
    monkeypatch.setattr(reasoning, "_bucket", lambda _steps: 10)
    assert first & skeletons("train", 2500, monkeypatch)


def test_an_unknown_split_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'dev'.*train, validation, test"):
        problem("dev", 0)
    with pytest.raises(ValueError, match="dev"):
        list(problems("dev", 1))


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("There are 12 apples.", 12),
        ("<think>\n3 + 4 = 7\n</think>\n\nThere are 8.", 8),
        ("<think>\n3 + 4 = 7\n</think>\n\n3 + 4 = 7. There are 07 cups.", 7),
        ("<think>\n3 + 4 = 7\n</think>\n\nThere are many.", None),
        ("<think>\n3 + 4 = 7", 7),
        ("<think>a</think> 5 <think>b</think> or so", None),
        ("", None),
        ("12²", 12),
    ],
)
def test_read_answer(response: str, answer: int | None) -> None:
    assert read_answer(response) == answer
