"""Benchmarks: which prompts, and what counts as right."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from draftopd.bundled.problems import problem
from draftopd.evaluation.benchmark import JsonlBenchmark, ReasoningBenchmark


def test_reasoning_examples_are_held_out_and_in_order() -> None:
    examples = ReasoningBenchmark(count=8).examples()
    assert [e.messages[0]["content"] for e in examples] == [problem("test", i).question for i in range(8)]
    assert [e.answer for e in examples] == [problem("test", i).value for i in range(8)]
    assert len({e.id for e in examples}) == 8


def test_limit_takes_the_first(tmp_path: Path) -> None:
    benchmark = ReasoningBenchmark(count=5)
    assert benchmark.examples(2) == benchmark.examples()[:2]
    assert len(benchmark.examples(9)) == 5
    path = tmp_path / "mine.jsonl"
    path.write_text("".join(json.dumps({"prompt": str(i)}) + "\n" for i in range(4)))
    assert JsonlBenchmark(str(path)).examples(3) == JsonlBenchmark(str(path)).examples()[:3]


@pytest.mark.parametrize("thinking", [True, False])
def test_right_and_wrong_responses(thinking: bool) -> None:
    for index, example in enumerate(ReasoningBenchmark(count=5).examples()):
        worked = problem("test", index)
        assert example.solved(worked.response(thinking)) is True
        assert example.solved(f"<think>\n{worked.reasoning}\n</think>\n\nSo it is {worked.value + 1}.") is False
        assert example.solved("<think>\nHmm.\n</think>\n\nNo idea.") is False


def test_jsonl_keeps_the_files_order_and_knows_no_answer(tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    rows = [{"question": "one"}, {"messages": [{"role": "user", "content": "two"}]}]
    path.write_text("\n".join(map(json.dumps, rows)))
    first, second = JsonlBenchmark(str(path), field="question").examples()
    assert (first.id, second.id) == ("mine-0", "mine-1")
    assert [e.messages[0]["content"] for e in (first, second)] == ["one", "two"]
    assert first.solved("1") is None
    assert JsonlBenchmark(str(path), "question", name="ours").examples()[0].id == "ours-0"
