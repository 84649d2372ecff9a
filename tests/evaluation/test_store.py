"""Examples on disk: read back equal, after an interruption too, and never another evaluation's."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.support.faults import every_fault

from draftopd.decoding.draft_text import DraftedBlock
from draftopd.errors import ConfigError, FileError
from draftopd.evaluation.lossless import Mismatch
from draftopd.evaluation.results import PromptResult
from draftopd.evaluation.runner import ExampleResults
from draftopd.evaluation.store import ResultStore, finite

IDENTITY = {"target": "abc", "settings": {"seed": 0, "limit": None}, "checkpoints": {"sft": "DIR"}}


@pytest.fixture
def examples(make_result: Callable[..., PromptResult]) -> list[ExampleResults]:
    """Three examples by two drafters, with all that a result may hold."""
    drafts = [DraftedBlock("", "Mia", ""), DraftedBlock(" has\n", " 3 <b>", " ☃")]
    rich = make_result(
        0, mismatch=Mismatch(4, 17, 23, 0.1 + 0.2), question="How „many”?", drafts=drafts, plain_features=[1 / 3, 2.0],
        features=[1e-17, 5.0], entropy_tested=[1, 2, 3, 4, 5, 6, 7], entropy_accepted=[0, 1, 2, 3, 4, 5, 6],
    )  # fmt: skip
    ended = make_result(1, mismatch=Mismatch(3, None, 9, None), solved=None, plain_seconds=0.1)
    later = make_result(1, turn=1, accepted=[], emitted=[])
    return [
        {"sft": [rich], "opd": [make_result(0)]},
        {"sft": [ended, later], "opd": [make_result(1), make_result(1, turn=1)]},
        {"sft": [make_result(2)], "opd": [rich]},
    ]


def fill(store: ResultStore, examples: list[ExampleResults]) -> None:
    store.add("maths", "a", examples[0])
    store.add("code", "a", examples[1])
    store.add("maths", "b", examples[2])


def test_what_was_done_is_read_back(tmp_path: Path, examples: list[ExampleResults]) -> None:
    first = ResultStore(tmp_path / "run", IDENTITY)
    assert first.done == {}
    fill(first, examples)
    again = ResultStore(tmp_path / "run", IDENTITY)
    assert again.done == first.done and list(again.done) == [("maths", "a"), ("code", "a"), ("maths", "b")]
    assert again.of("maths") == [examples[0], examples[2]] and again.of("other") == []
    (rich,) = again.done["maths", "a"]["sft"]
    assert isinstance(rich.mismatch, Mismatch) and all(isinstance(block, DraftedBlock) for block in rich.drafts)
    assert rich.drafts[1].rejected == " ☃"
    # Reading changes nothing.
    assert ResultStore(tmp_path / "run", IDENTITY).done == first.done


@pytest.mark.parametrize("separator", ["\u2028", "\x85", "\x0b", "\x1c"])
def test_texts_may_hold_any_separator(separator: str, tmp_path: Path, make_result: Callable[..., PromptResult]) -> None:
    store = ResultStore(tmp_path, IDENTITY)
    for number in range(2):
        store.add("x", str(number), {"d": [make_result(number, question=f"one{separator}two")]})
    assert ResultStore(tmp_path, IDENTITY).done == store.done


@pytest.mark.parametrize("left", [1, 30, -1])
def test_a_line_cut_off_is_dropped(left: int, tmp_path: Path, examples: list[ExampleResults]) -> None:
    store = ResultStore(tmp_path, IDENTITY)
    fill(store, examples)
    lines = store.path.read_text(encoding="utf-8").splitlines(keepends=True)
    store.path.write_text("".join(lines[:2]) + lines[2].rstrip("\n")[:left], encoding="utf-8")
    again = ResultStore(tmp_path, IDENTITY)
    assert list(again.done) == [("maths", "a"), ("code", "a")]
    again.add("maths", "b", examples[2])
    assert again.path.read_text(encoding="utf-8").splitlines(keepends=True) == lines
    assert ResultStore(tmp_path, IDENTITY).done == store.done


def test_a_letter_cut_in_two(tmp_path: Path, examples: list[ExampleResults]) -> None:
    """A crash may end the file within one of UTF-8's longer letters."""
    store = ResultStore(tmp_path, IDENTITY)
    fill(store, examples)
    content = store.path.read_bytes()
    store.path.write_bytes(content[: content.rindex("☃".encode()) + 1])
    assert list(ResultStore(tmp_path, IDENTITY).done) == [("maths", "a"), ("code", "a")]


def test_a_whole_line_without_its_end(tmp_path: Path, examples: list[ExampleResults]) -> None:
    store = ResultStore(tmp_path, IDENTITY)
    fill(store, examples)
    content = store.path.read_text(encoding="utf-8")
    store.path.write_text(content.rstrip("\n"), encoding="utf-8")
    again = ResultStore(tmp_path, IDENTITY)
    assert again.done == store.done and again.path.read_text(encoding="utf-8") == content


@pytest.mark.parametrize(
    "change",
    [{"target": "abd"}, {"checkpoints": {"opd": "DIR"}}, {"settings": {"seed": 1, "limit": None}}, {"more": 1}],
)
def test_another_evaluation_is_refused(change: dict, tmp_path: Path, examples: list[ExampleResults]) -> None:
    store = ResultStore(tmp_path, IDENTITY)
    fill(store, examples)
    before = store.path.read_bytes()
    with pytest.raises(ConfigError, match="other drafters, benchmarks or settings: use another hydra.run.dir"):
        ResultStore(tmp_path, IDENTITY | change)
    assert store.path.read_bytes() == before and ResultStore(tmp_path, IDENTITY).done == store.done


def test_identities_that_json_writes_alike(tmp_path: Path, examples: list[ExampleResults]) -> None:
    """Tuples and paths come back as lists and strings."""
    identity = {"names": ("a", "b"), "where": Path("x")}
    ResultStore(tmp_path, identity).add("x", "a", examples[0])
    assert ResultStore(tmp_path, identity).done == {("x", "a"): examples[0]}


def test_an_evaluation_without_results_may_change(tmp_path: Path) -> None:
    ResultStore(tmp_path, IDENTITY)
    assert ResultStore(tmp_path, IDENTITY | {"target": "abd"}).done == {}
    assert json.loads((tmp_path / "examples.json").read_text())["target"] == "abd"


def test_numbers_that_json_does_not_know(tmp_path: Path, make_result: Callable[..., PromptResult]) -> None:
    result = make_result(mismatch=Mismatch(0, 1, 2, math.nan))
    ResultStore(tmp_path, IDENTITY).add("x", "a", {"d": [result]})
    (again,) = ResultStore(tmp_path, IDENTITY).done["x", "a"]["d"]
    assert again.mismatch == Mismatch(0, 1, 2, None)
    assert finite({"a": [math.inf, 1.0, (math.nan, "nan")]}) == {"a": [None, 1.0, [None, "nan"]]}


def test_a_flipped_bit_costs_its_line_only(
    tmp_path: Path, examples: list[ExampleResults], caplog: pytest.LogCaptureFixture
) -> None:
    store = ResultStore(tmp_path, IDENTITY)
    fill(store, examples)
    first, rest = store.path.read_text(encoding="utf-8").split("\n", 1)
    assert '"prompt_tokens": ' in first
    changed = first.replace('"prompt_tokens": ', '"prompt_tokens": 1', 1)
    store.path.write_text(f"{changed}\n{rest}", encoding="utf-8")
    again = ResultStore(tmp_path, IDENTITY)
    assert list(again.done) == [("code", "a"), ("maths", "b")] and "1 lines of" in caplog.text
    again.add("maths", "a", examples[0])
    assert ResultStore(tmp_path, IDENTITY).done == store.done


@pytest.mark.parametrize("content", [None, "{", "{}"])
def test_examples_of_nobody_knows_what(content: str | None, tmp_path: Path, examples: list[ExampleResults]) -> None:
    store = ResultStore(tmp_path, IDENTITY)
    fill(store, examples)
    if content is None:
        (tmp_path / "examples.json").unlink()
    else:
        (tmp_path / "examples.json").write_text(content)
    before = store.path.read_bytes()
    with pytest.raises(FileError, match="examples.json.*Delete .*examples.jsonl to start again"):
        ResultStore(tmp_path, IDENTITY)
    assert store.path.read_bytes() == before


def test_a_full_disk_keeps_the_examples_before(tmp_path: Path, make_result: Callable[..., PromptResult]) -> None:
    kept: list[int] = []

    def write(number: int) -> None:
        ResultStore(tmp_path, IDENTITY).add("maths", str(number), {"d": [make_result(number)]})

    def check(number: int, failed: bool) -> None:
        done = ResultStore(tmp_path, IDENTITY).done
        assert all(("maths", str(n)) in done for n in kept) and (failed or ("maths", str(number)) in done)
        if ("maths", str(number)) in done:
            kept.append(number)

    assert every_fault(write, check) >= 4 and kept
