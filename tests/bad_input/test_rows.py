"""Files of rows: prompts, recorded texts, benchmarks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests.support.refusing import refused

from draftopd.data import prompts
from draftopd.data.prompts import JsonlPrompts, ListedPrompts, PromptEncoder
from draftopd.errors import FileError, PromptError
from draftopd.evaluation.benchmark import JsonlBenchmark
from draftopd.evaluation.store import ResultStore
from draftopd.evaluation.suites import Suite
from draftopd.io.files import seal
from draftopd.rollout import recorded
from draftopd.rollout.recorded import JsonlTrajectories
from draftopd.rollout.request import Request

DEEP = b'{"prompt": ' * 5000 + b"1" + b"}" * 5000
FIELD = "under 'prompt'.*set data.train_prompts.field"
MESSAGES = "line 1: 'messages' must be a list of objects with text 'role' and 'content'"

#: What is wrong with a file of any rows, and the telling part of the message.
ANY_ROWS = {
    "not JSON": (b"{", "line 1 is not JSON"),
    "second line cut off": (b'{"prompt": "a"}\n{"prompt": ', "line 2 is not JSON"),
    "two objects a line": (b'{"prompt": "a"} {"prompt": "b"}', r"line 1 is not JSON \(Extra data"),
    "single quotes": (b"{'prompt': 'a'}", "line 1 is not JSON"),
    "HTML": (b"<!DOCTYPE html>\n<html></html>", "line 1 is not JSON"),
    "a pickle": (b"\x80\x04\x95\n", "line 1 is n"),
    "a zip": (b"PK\x03\x04\x14\x00\x08\x00", "line 1 is not JSON"),
    "UTF-16": ('{"prompt": "a"}'.encode("utf-16"), "line 1 is no"),
    "Latin-1": ('{"prompt": "ä"}'.encode("latin-1"), "line 1 is no"),
    "half a letter": ('{"prompt": "ä'.encode()[:-1] + b'"}', "line 1 is no"),
    "BOM": (b'\xef\xbb\xbf{"prompt": "a"}', "byte order mark: save it as UTF-8 without one"),
    "NUL bytes": (b'{"prompt": "\x00"}', r"line 1 is not JSON"),
    "only NUL bytes": (bytes(40), "line 1 is not JSON"),
    "nested deeply": (DEEP, "line 1 is not JSON .it nests too deeply"),
    "lists nested deeply": (b"[" * 100_000, "line 1 is not JSON .it nests too deeply"),
    "a number without end": (b'{"prompt": ' + b"7" * 5000 + b"}", "line 1 is not JSON"),
    "a list": (b'["a"]', "line 1 holds a list, expected an object"),
    "a text": (b'"a"', "line 1 holds a str"),
    "a number": (b"3", "line 1 holds a int"),
    "null": (b"null", "line 1 holds a NoneType"),
    "a JSON array of objects": (b'[{"prompt": "a"},\n{"prompt": "b"}]', "line 1 is not JSON"),
    "a huge row": (b'{"prompt": "' + b"a" * 2000 + b'"}', "line 1 is longer than 1000 bytes"),
    "no line ends": (b"\x07" * 5000, "line 1 is longer than 1000 bytes"),
}  # fmt: skip

PROMPTS = {
    "empty": (b"", "holds no prompts: give at least one"),
    "empty rows": (b"\n \n\n", "holds no prompts"),
    "no fields": (b"{}", f"found nothing.*{FIELD[-20:]}"),
    "another field": (b'{"text": "a"}', r"found text\): set data.train_prompts.field"),
    "many other fields": (json.dumps(dict.fromkeys(map(str, range(99)), "a")).encode(), "7 and 91 more"),
    "a field with a long name": (json.dumps({"x" * 500: "a"}).encode(), r"found x{40}\.\.\.\)"),
    "an escape sequence for a name": (json.dumps({"\x1b[31mred": 1}).encode(), r"found \[31mred"),
    "no text": (b'{"prompt": ""}', FIELD),
    "blank text": (b'{"prompt": " \\n\\t"}', FIELD),
    "number for a text": (b'{"prompt": 7}', FIELD),
    "list for a text": (b'{"prompt": ["a"]}', FIELD),
    "null for a text": (b'{"prompt": null}', FIELD),
    "half a surrogate pair": (b'{"prompt": "\\ud800"}', FIELD),
    "no messages": (b'{"messages": []}', MESSAGES),
    "messages null": (b'{"messages": null}', MESSAGES),
    "messages a text": (b'{"messages": "hi"}', MESSAGES),
    "messages an object": (b'{"messages": {"role": "user", "content": "a"}}', MESSAGES),
    "messages of texts": (b'{"messages": ["hi"]}', MESSAGES),
    "message without content": (b'{"messages": [{"role": "user"}]}', MESSAGES),
    "message without role": (b'{"messages": [{"content": "a"}]}', MESSAGES),
    "role a number": (b'{"messages": [{"role": 1, "content": "a"}]}', MESSAGES),
    "content in parts": (b'{"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}]}', MESSAGES),
    "content half a surrogate pair": (b'{"messages": [{"role": "user", "content": "\\udfff"}]}', MESSAGES),
}  # fmt: skip


@pytest.fixture(autouse=True)
def short_lines(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Lines of 1000 bytes are long where the row says so."""
    if "longer" in str(getattr(request.node, "callspec", None) and request.node.callspec.params.get("message")):
        for module in (prompts, recorded):
            monkeypatch.setattr(module, "MAX_LINE", 1000)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "rows.jsonl"


@pytest.mark.parametrize(("content", "message"), (ANY_ROWS | PROMPTS).values(), ids=ANY_ROWS | PROMPTS)
def test_prompts(content: bytes, message: str, file: Path) -> None:
    file.write_bytes(content)
    refused(lambda: JsonlPrompts(str(file)), PromptError, rf"rows\.jsonl.*{message}", file.parent)


@pytest.mark.parametrize("path", ["nowhere.jsonl", ".", "a\0b"])
def test_files_without_prompts_are_refused(path: str, tmp_path: Path) -> None:
    message = r"(No prompt file|cannot be read).*data.train_prompts.path=FILE"
    refused(lambda: JsonlPrompts(f"{tmp_path}/{path}"), PromptError, message, tmp_path)


IDS = "it must be a list of numbers, not empty.*trajectories.prompt_field"
TRAJECTORIES: dict[str, tuple[Any, str]] = {
    "no prompt": ({"token_ids": [1]}, "no token ids under 'prompt_token_ids' .found token_ids"),
    "no response": ({"prompt_token_ids": [1]}, "no token ids under 'token_ids'"),
    "prompt empty": ({"prompt_token_ids": [], "token_ids": [1]}, f"under 'prompt_token_ids' .{IDS}"),
    "response empty": ({"prompt_token_ids": [1], "token_ids": []}, f"under 'token_ids' .{IDS}"),
    "response null": ({"prompt_token_ids": [1], "token_ids": None}, IDS),
    "response a text": ({"prompt_token_ids": [1], "token_ids": "text"}, IDS),
    "response an object": ({"prompt_token_ids": [1], "token_ids": {"0": 1}}, IDS),
    "response nested": ({"prompt_token_ids": [1], "token_ids": [[1]]}, IDS),
    "response of fractions": ({"prompt_token_ids": [1], "token_ids": [1.0]}, IDS),
    "response of NaN": ({"prompt_token_ids": [1], "token_ids": [float("nan")]}, IDS),
    "response of truth values": ({"prompt_token_ids": [1], "token_ids": [True]}, IDS),
    "ids past the vocabulary": ({"prompt_token_ids": [1], "token_ids": [64]}, "from 64 to 64, but.*has 64.*another"),
    "ids past all": ({"prompt_token_ids": [10**30], "token_ids": [1]}, "but the target's vocabulary has 64"),
    "ids below 0": ({"prompt_token_ids": [-1], "token_ids": [1]}, "from -1 to -1"),
}  # fmt: skip
RECORDED = {name: (content, message) for name, (content, message) in ANY_ROWS.items() if b"\n" not in content[:-1]} | {
    name: (json.dumps(row).encode(), f"line 1.*{message}") for name, (row, message) in TRAJECTORIES.items()
}


@pytest.mark.parametrize(("content", "message"), RECORDED.values(), ids=RECORDED)
def test_recorded_texts(content: bytes, message: str, file: Path, request_: Request) -> None:
    file.write_bytes(content)
    act = lambda: [*JsonlTrajectories(str(file)).collect(request_)]  # noqa: E731
    refused(act, PromptError, rf"rows\.jsonl.*{message}", file.parent)


def test_files_without_recorded_texts_are_refused(file: Path) -> None:
    for path in (str(file), str(file.parent), "a\0b"):
        refused(
            lambda path=path: JsonlTrajectories(path), PromptError, "cannot be read.*name a JSON-lines", file.parent
        )
    file.write_text("\n \n")
    refused(lambda: JsonlTrajectories(str(file)), PromptError, "holds no trajectories: give at least one", file.parent)


def test_a_file_that_shrinks_while_it_is_read(file: Path, request_: Request) -> None:
    file.write_text(json.dumps({"prompt_token_ids": [1], "token_ids": [1]}) + "\n")
    source = JsonlTrajectories(str(file))
    file.write_text("")
    refused(lambda: [*source.collect(request_)], PromptError, "line 1 is not JSON", file.parent)


SUITE = {
    "empty": (b"\n", "The benchmark own holds no rows: give at least one"),
    "another suite's": ({"problem": "a"}, "own, row 0 has no field 'id', only problem: is it this suite's file"),
    "text null": ({"question": None, "id": 1}, "has a NoneType under 'question', expected text"),
    "text a number": ({"question": 5, "id": 1}, "has a int under 'question'"),
    "text a list": ({"question": ["a"], "id": 1}, "has a list under 'question'"),
    "text half a surrogate pair": ({"question": "\ud800", "id": 1}, "under 'question'"),
    "id a list": ({"question": "a", "id": [1]}, "has a list under 'id', expected text"),
    "id null": ({"question": "a", "id": None}, "has a NoneType under 'id'"),
    "id missing": ({"question": "a"}, "no field 'id', only question"),
}
TURNS = {
    "turns missing": ({"question": "a"}, "no list of turns under turns or prompt: is it this suite's file"),
    "turns a text": ({"turns": "a"}, "no list of turns"),
    "turns empty": ({"turns": []}, "no list of turns"),
    "turns of numbers": ({"turns": ["a", 2]}, "no list of turns"),
    "turns blank": ({"turns": ["a", " "]}, "no list of turns"),
}


@pytest.mark.parametrize(("row", "message"), (SUITE | ANY_ROWS).values(), ids=SUITE | ANY_ROWS)
def test_suites(row: Any, message: str, file: Path) -> None:
    file.write_bytes(row if isinstance(row, bytes) else json.dumps(row).encode())
    suite = Suite("own", "no/such", template="{question}", id_field="id", path=str(file))
    refused(suite.examples, PromptError, message, file.parent)


@pytest.mark.parametrize(("row", "message"), TURNS.values(), ids=TURNS)
def test_suites_of_several_turns(row: Any, message: str, file: Path) -> None:
    file.write_text(json.dumps(row))
    suite = Suite("own", "no/such", turns_field=["turns", "prompt"], path=str(file))
    refused(suite.examples, PromptError, message, file.parent)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "needs a template or a turns_field, and not both"),
        ({"template": "{x}", "turns_field": ["y"]}, "and not both"),
        ({"template": "{x}", "count": 0}, "count must be 1 or more, found 0"),
        ({"template": "{x"}, "template is not valid .*write fields in braces"),
        ({"template": "}"}, "template is not valid"),
    ],
)
def test_files_without_a_suite_are_refused(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    refused(lambda: Suite("own", "no/such", **options), PromptError, f"benchmark.own.*{message}", tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "holds no prompts: give"), (b'{"text": "a"}', "set benchmark.field"), ANY_ROWS["nested deeply"]],
)
def test_benchmarks_of_ones_own(content: bytes, message: str, file: Path) -> None:
    file.write_bytes(content)
    refused(lambda: JsonlBenchmark(str(file)).examples(), PromptError, rf"rows\.jsonl.*{message}", file.parent)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "fails .roles must alternate. on a conversation.*'Hi'"),
        ("{% for m in messages %}", "fails .*mend"),
        ("{{ messages[9].content }}", "fails .*mend"),
        ("{{ 1 / 0 }}", "fails .*mend"),
        ("{{ messages.__class__.__mro__ }}{{ cycler.__init__.__globals__.os.system('touch harmed') }}", "fails .*mend"),
        ("{% for i in range(10**9) %}{% endfor %}", "fails .*mend"),
    ],
)
def test_chat_templates(template: str, message: str, tokenizer: Any, tmp_path: Path) -> None:
    spoiled = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer, chat_template=template)
    source = ListedPrompts([[{"role": "user", "content": "Hi"}]])
    refused(lambda: PromptEncoder(spoiled).take(source, range(1)), PromptError, message, tmp_path)


@pytest.mark.parametrize(
    ("marker", "message"),
    [
        (b"{", "examples.json is damaged: it is not JSON .*Delete .*examples.jsonl to start again"),
        (b"\xff", "examples.json is damaged: it is not JSON"),
        (b"[" * 9999, "examples.json is damaged: it is not JSON .it nests too deeply"),
        (b"[]", "has no format number and checksum"),
        (b'{"format": 1, "checksum": 0}', "its checksum differs"),
        (b'{"format": [9], "checksum": 0}', "has format .9., this version reads 1"),
    ],
)
def test_results_of_an_earlier_run(marker: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "examples.json").write_bytes(marker)
    (tmp_path / "examples.jsonl").write_bytes(b"")
    refused(lambda: ResultStore(tmp_path, {}), FileError, message, tmp_path)


def test_lines_that_are_not_results_are_decoded_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Nothing is refused here, though the checksum fits: the example is decoded again."""
    rows: list[Any] = [
        [1],
        {"benchmark": "a"},
        {"benchmark": "a", "example": "b", "results": {"x": [{"mismatch": 1}]}},
        {"benchmark": "a", "example": "b", "results": {"x": [{"mismatch": None, "drafts": [1]}]}},
        {"benchmark": [], "example": "b", "results": {}},
    ]
    path = ResultStore(tmp_path, {}).path
    for row in rows:
        caplog.clear()
        path.write_text(json.dumps(row | {"checksum": seal(row)} if isinstance(row, dict) else row) + "\n")
        assert ResultStore(tmp_path, {}).done == {} and path.read_bytes() == b"", row
        assert "1 lines of" in caplog.text and "decoded again" in caplog.text
