"""Procedural word problems with worked solutions: the corpus of the bundled target.

A problem is a *skeleton* (a start value and two to five arithmetic steps) told as a story.
Every draw is addressed by ``(split, index, seed)``, so the supply is unlimited, random access
costs nothing and a restarted run sees the same problems.

The splits are disjoint by construction: the hash of the skeleton (kinds of step and numbers) decides
which split a problem belongs to, so no held-out skeleton is ever told in training, in any wording. The
same row of equations can still occur in both, told by other kinds of step.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

from draftopd.bundled import problem_text as text

Split = Literal["train", "validation", "test"]

#: Share of skeletons per split, in fiftieths of the hash space.
_BUCKETS: dict[str, range] = {"test": range(0, 2), "validation": range(2, 4), "train": range(4, 50)}

#: Largest value any intermediate result takes: two digits, so that a small target can reckon.
MAX_VALUE = 99

CHAINED = ("gain", "loss", "double", "triple", "halve")
CLOSING = ("price", "share", "more", "fewer", "together")


@dataclass(frozen=True)
class Step:
    """One arithmetic step: ``before`` (op) ``operand`` gives ``after``."""

    kind: str
    before: int
    operand: int
    after: int

    @property
    def equation(self) -> str:
        symbol = {
            "gain": "+", "more": "+", "together": "+", "loss": "-", "fewer": "-",
            "double": "*", "triple": "*", "price": "*", "halve": "/", "share": "/",
        }[self.kind]  # fmt: skip
        return f"{self.before} {symbol} {self.operand} = {self.after}"


@dataclass(frozen=True)
class Problem:
    """A question, the target's worked solution, and the number that answers it."""

    question: str
    reasoning: str
    equations: str
    answer: str
    value: int

    def response(self, thinking: bool = True) -> str:
        """The assistant turn: a ``<think>`` part, then the answer.

        Without thinking that part is empty and the bare equations stand before the answer.
        """
        if thinking:
            return f"<think>\n{self.reasoning}\n</think>\n\n{self.answer}"
        return f"<think>\n\n</think>\n\n{self.equations} {self.answer}"


def problem(split: Split, index: int, seed: int = 0) -> Problem:
    """The ``index``-th problem of a split.

    Raises:
        ValueError: if ``split`` is not one of ``train``, ``validation``, ``test``.
    """
    if split not in get_args(Split):
        raise ValueError(f"Unknown split {split!r} of the reasoning problems: use one of {', '.join(get_args(Split))}.")
    rng = random.Random(f"draftopd/reasoning/{split}/{seed}/{index}")
    while True:
        steps = _skeleton(rng)
        if _bucket(steps) in _BUCKETS[split]:
            return _tell(steps, rng)


def problems(split: Split, count: int, seed: int = 0, start: int = 0) -> Iterator[Problem]:
    """``count`` consecutive problems of a split."""
    return (problem(split, index, seed) for index in range(start, start + count))


def read_answer(response: str) -> int | None:
    """The last whole number after the thinking part, or None where there is none."""
    visible = response.rsplit("</think>", 1)[-1]
    words = "".join(c if c.isdecimal() else " " for c in visible).split()
    return int(words[-1]) if words else None


def _bucket(steps: list[Step]) -> int:
    skeleton = ";".join(f"{s.kind} {s.equation}" for s in steps)
    return int.from_bytes(hashlib.blake2b(skeleton.encode(), digest_size=8).digest(), "big") % 50


def _skeleton(rng: random.Random) -> list[Step]:
    count = rng.randint(2, 5)
    closing = rng.random() < 0.6
    value = rng.randint(4, 40)
    steps: list[Step] = []
    while len(steps) < count:
        last = len(steps) == count - 1
        step = _draw_step(rng.choice(CLOSING if last and closing else CHAINED), value, rng)
        if step is not None:
            steps.append(step)
            value = step.after
    return steps


def _draw_step(kind: str, value: int, rng: random.Random) -> Step | None:
    """A step of this kind from ``value``, or None where none stays within 1..MAX_VALUE."""
    if kind in ("double", "triple", "halve"):
        operand = 3 if kind == "triple" else 2
    elif kind == "price":
        operand = rng.randint(2, 5)
    elif kind == "share":
        operand = rng.choice([d for d in (2, 3, 4, 5, 6) if value % d == 0] or [0])
    else:
        operand = rng.randint(2, 20)
    if kind in ("gain", "more", "together"):
        after = value + operand
    elif kind in ("loss", "fewer"):
        after = value - operand
    elif kind in ("double", "triple", "price"):
        after = value * operand
    else:
        after = value // operand if operand and value % operand == 0 else 0
    return Step(kind, value, operand, after) if 1 <= after <= MAX_VALUE else None


def _tell(steps: list[Step], rng: random.Random) -> Problem:
    scene = text.Scene.draw(rng)
    sentences = [scene.fill(rng.choice(text.STARTS), n=steps[0].before)]
    sentences += [scene.fill(rng.choice(text.EVENTS[s.kind]), n=s.operand) for s in steps]
    sentences.append(scene.fill(rng.choice(text.QUESTIONS.get(steps[-1].kind, text.QUESTIONS["count"]))))
    value = steps[-1].after
    thoughts = [
        scene.fill(rng.choice(text.OPENINGS)),
        scene.fill(rng.choice(text.RESTATES), n=steps[0].before),
    ]
    for step in steps:
        thoughts.append(_think(step, scene, rng))
        if rng.random() < 0.15:
            thoughts.append(scene.fill(rng.choice(text.REMARKS), n=step.after))
    thoughts.append(scene.fill(rng.choice(text.CLOSINGS), n=value))
    answer = scene.fill(rng.choice(text.ANSWERS.get(steps[-1].kind, text.ANSWERS["count"])), n=value)
    equations = " ".join(f"{step.equation}." for step in steps)
    return Problem(" ".join(sentences), " ".join(thoughts), equations, answer, value)


def _think(step: Step, scene: text.Scene, rng: random.Random) -> str:
    clause = scene.fill(rng.choice(text.CLAUSES[step.kind]), n=step.operand)
    frame = rng.choice(text.FRAMES)
    sentence = frame.format(clause=clause, equation=step.equation, after=step.after)
    return sentence[0].upper() + sentence[1:]
