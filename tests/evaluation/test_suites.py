"""The suites that papers report: their rows as prompts, and files that are none of theirs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import OmegaConf
from tests.support.paths import ROOT

from draftopd.cli.check import _locate, _parameters, check
from draftopd.errors import PromptError
from draftopd.evaluation.suites import Suite

NAMES = sorted(path.stem for path in (ROOT / "configs" / "benchmark").glob("*.yaml"))
REAL = ROOT.parent / "shared" / "benchmarks"
STEPS = "\nPlease reason step by step, and put your final answer within \\boxed{}."

#: A row of each suite in its dataset's schema, and the id and first turn that it gives.
ROWS: dict[str, tuple[dict[str, Any], str, str]] = {
    "gsm8k": ({"question": "How {many}?", "answer": "#### 3"}, "gsm8k-0", "How {many}?" + STEPS),
    "math500": (
        {"problem": "Find $x_{1}$.", "solution": "s", "answer": "2", "level": 1, "unique_id": "t/1.json"},
        "t/1.json", "Find $x_{1}$." + STEPS,
    ),
    "aime24": ({"id": 60, "problem": "Find n.", "answer": "204"}, "aime24-0", "Find n." + STEPS),
    "aime25": ({"problem": "Find m.", "answer": "70", "id": "0"}, "aime25-0", "Find m." + STEPS),
    "alpaca": (
        {"instruction": "Sort.", "input": "3, 1", "output": "1, 3", "text": "t"}, "alpaca-0", "Sort.\n3, 1",
    ),
    "humaneval": (
        {"task_id": "HumanEval/0", "prompt": "def f():\n", "entry_point": "f", "canonical_solution": "", "test": ""},
        "HumanEval/0",
        "Complete this Python function. Answer with the whole function in one code block.\n```python\ndef f():\n\n```",
    ),
    "mbpp": (
        {"prompt": "Write a function.", "code": "c", "task_id": 11, "test_list": [], "test_imports": []},
        "11", "Write a function.",
    ),
    "mt_bench": ({"category": "writing", "prompt": ["One.", "Two."], "prompt_id": 81}, "mt_bench-0", "One."),
    "swe_bench_lite": (
        {"instance_id": "a__b-1", "repo": "a/b", "base_commit": "c", "problem_statement": "It fails.", "patch": "p"},
        "a__b-1",
        "This issue was filed for a/b. Explain its cause and write a patch that mends it.\n\nIt fails.",
    ),
}  # fmt: skip


def composed(name: str, *overrides: str) -> Any:
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        return compose("eval", [f"benchmark=[{name}]", *overrides]).benchmark


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("name", NAMES)
def test_every_configuration_composes(name: str) -> None:
    chosen = composed(name, "benchmark.path=FILE") if name == "jsonl" else composed(name)
    assert set(chosen) == {"path", name}
    node = OmegaConf.to_container(chosen, resolve=True)[name]
    check(node, f"benchmark.{name}")
    names, _, open_ended = _parameters(_locate(node["_target_"], "benchmark"))
    assert set(node) - {"_target_"} <= names and not open_ended
    assert instantiate(node).name == ("FILE" if name == "jsonl" else name)


def test_every_suite_has_a_row_here() -> None:
    assert set(ROWS) == set(NAMES) - {"reasoning", "jsonl"}


@pytest.mark.parametrize("name", ROWS)
def test_rows_in_the_datasets_schema(name: str, tmp_path: Path) -> None:
    row, id_, content = ROWS[name]
    path = write(tmp_path / "rows.jsonl", [row])
    # For one suite benchmark.path will do.
    for override in (f"benchmark.path={path}", f"benchmark.{name}.path={path}"):
        (example,) = instantiate(composed(name, override)[name]).examples()
        assert (example.id, example.messages) == (id_, [{"role": "user", "content": content}])
        assert example.follow_ups == (("Two.",) if name == "mt_bench" else ())
        assert example.solved("3") is None


def test_other_editions(tmp_path: Path) -> None:
    full = write(tmp_path / "mbpp.jsonl", [{"text": "Write it.", "task_id": 5}])
    (example,) = instantiate(composed("mbpp", f"benchmark.path={full}").mbpp).examples()
    assert (example.id, example.messages[0]["content"]) == ("5", "Write it.")
    own = write(tmp_path / "mt.jsonl", [{"question_id": 81, "turns": ["One.", "Two.", "Three."]}])
    (example,) = instantiate(composed("mt_bench", f"benchmark.path={own}").mt_bench).examples()
    assert example.messages[0]["content"] == "One." and example.follow_ups == ("Two.", "Three.")


def test_a_missing_input_leaves_no_blank_line(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [{"instruction": "Sing.", "input": "", "output": "La."}])
    (example,) = instantiate(composed("alpaca", f"benchmark.path={path}").alpaca).examples()
    assert example.messages[0]["content"] == "Sing."


@pytest.fixture
def real() -> Callable[..., Suite]:
    """A configured suite on the real rows."""
    if not REAL.is_dir():
        pytest.skip(f"the real rows are not in {REAL}")

    def build(name: str, file: str, *overrides: str) -> Suite:
        return instantiate(composed(name, f"benchmark.path={REAL / file}", *overrides)[name])

    return build


@pytest.mark.parametrize(
    "name, file, count, ending",
    [
        ("gsm8k", "gsm8k_test.jsonl", 128, STEPS),
        ("humaneval", "humaneval.jsonl", 82, "\n```"),
        ("mt_bench", "mt_bench.jsonl", 40, ""),
    ],
)
def test_real_rows(name: str, file: str, count: int, ending: str, real: Callable[..., Suite]) -> None:
    suite = real(name, file)
    examples = suite.examples()
    rows = [json.loads(line) for line in (REAL / file).read_text().splitlines()]
    assert len(examples) == count and len({e.id for e in examples}) == count
    assert examples == suite.examples() == real(name, file).examples()
    assert all(examples[:limit] == suite.examples(limit) for limit in (1, 7, 30, 80))
    assert suite.examples(10_000) == examples
    texts = {(row.get("question") or row.get("prompt") or row["turns"][0]).strip() for row in rows}
    for example in examples:
        (message,) = example.messages
        assert message["role"] == "user" and message["content"].endswith(ending)
        assert any(text in message["content"] for text in texts)
        assert len(example.follow_ups) == (name == "mt_bench")
    if name == "mt_bench":
        pairs = {tuple(row["turns"]) for row in rows}
        assert {(e.messages[0]["content"], *e.follow_ups) for e in examples} == pairs
    else:
        # Chosen at random, not the first ones.
        assert [e.id for e in examples] != [e.id for e in sorted(examples, key=lambda e: e.id)]


def test_a_smaller_count_takes_other_rows_and_a_limit_does_not(real: Callable[..., Suite]) -> None:
    whole = real("gsm8k", "gsm8k_test.jsonl").examples()
    few = real("gsm8k", "gsm8k_test.jsonl", "benchmark.gsm8k.count=20")
    assert len(few.examples()) == len(few.examples(50)) == 20
    assert set(e.id for e in real("gsm8k", "gsm8k_test.jsonl").examples(20)) <= {e.id for e in whole}


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("gsm8k", None, "No prompt file .*rows.jsonl.*benchmark.gsm8k.path=FILE"),
        ("gsm8k", "", "The benchmark gsm8k holds no rows"),
        ("gsm8k", "\n \n", "holds no rows"),
        ("gsm8k", '{"question": "a"}\n{"question', "line 2 is not JSON"),
        ("gsm8k", "[1]", "line 1 holds a list, expected an object"),
        ("gsm8k", '{"problem": "a", "level": 1}', "gsm8k, row 0 has no field 'question', only problem, level"),
        ("gsm8k", "{}", "has no field 'question', only nothing"),
        ("humaneval", '{"prompt": "a"}', "no field 'task_id', only prompt"),
        ("mbpp", '{"code": "a", "task_id": 1}', "no field 'prompt'"),
        ("mt_bench", '{"category": "a"}', "no list of turns under turns or prompt"),
        ("mt_bench", '{"turns": []}', "no list of turns"),
        ("mt_bench", '{"turns": "One."}', "no list of turns"),
        ("mt_bench", '{"turns": ["One.", 2]}', "no list of turns"),
    ],
)
def test_files_that_cannot_be_used(name: str, content: str | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    if content is not None:
        path.write_text(content)
    with pytest.raises(PromptError, match=message):
        instantiate(composed(name, f"benchmark.path={path}")[name]).examples()


@pytest.mark.parametrize("separator", ["\u2028", "\x85"])
def test_a_text_may_hold_any_separator(separator: str, tmp_path: Path) -> None:
    """JSON writes these as they are; only a line feed ends a line."""
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"x": f"one{separator}two"}, ensure_ascii=False) + "\n", encoding="utf-8")
    (example,) = Suite("a", "a/b", template="{x}", path=str(path)).examples()
    assert example.messages[0]["content"] == f"one{separator}two"


def test_bytes_that_are_not_text_are_refused(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_bytes(b"\xff\xfe\x00")
    for path in (tmp_path / "rows.jsonl", tmp_path):
        with pytest.raises(PromptError, match="is no UTF-8 text|cannot be read"):
            Suite("a", "a/b", template="{x}", path=str(path)).examples()


def test_arguments_that_do_not_fit() -> None:
    for both in ({}, {"template": "{x}", "turns_field": ["turns"]}):
        with pytest.raises(PromptError, match="benchmark.a needs a template or a turns_field, and not both"):
            Suite("a", "a/b", **both)
    with pytest.raises(PromptError, match="benchmark.a.count must be 1 or more, found 0"):
        Suite("a", "a/b", template="{x}", count=0)


def test_a_hub_that_is_out_of_reach(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("datasets")
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    with pytest.raises(PromptError, match=r"could not be loaded.*benchmark.a.path=FILE"):
        Suite("a", "no/such", template="{x}").examples()


def test_rows_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    asked = []

    def load_dataset(*arguments: Any, **options: Any) -> Any:
        asked.append((arguments, options))
        return datasets.Dataset.from_list([{"question": "How many?"}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    (example,) = instantiate(composed("gsm8k").gsm8k).examples()
    assert example.messages[0]["content"] == "How many?" + STEPS
    assert asked == [(("openai/gsm8k", "main"), {"split": "test", "data_files": None})]
