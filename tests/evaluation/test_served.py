"""Figures of a running server, against engines' schemas on the loopback."""

from __future__ import annotations

import io
import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from tests.support.engine import Engine, text_of
from tests.support.serving import serving

from draftopd.decoding.rules import Rules
from draftopd.decoding.sampling import Sampling
from draftopd.errors import ConfigError, ServerError
from draftopd.evaluation.served import (
    HEADINGS,
    Answered,
    Asking,
    Served,
    ServerEngine,
    _Measured,
    print_served,
    rows,
    write_served,
)
from draftopd.io import connection

PROMPTS = [[10 + i, 5, 7] for i in range(8)]
ASKING = Asking(Rules(stop=frozenset({2}), max_new_tokens=16))


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "MAX_PAUSE", 0.05)


class Differing(Engine):
    """Gives one prompt another text."""

    def text(self, prompt: list[int]) -> list[int]:
        return [1, *text_of(prompt)[1:]] if prompt == PROMPTS[3] else text_of(prompt)


def evaluate(engine: Engine, plain: Engine | None = None, asking: Asking = ASKING, **options: Any) -> list[Served]:
    options = {"concurrency": (2,), "timeout": 5.0} | options
    with ExitStack() as stack:
        engine.server = stack.enter_context(serving(engine))
        if plain is not None:
            plain.server = stack.enter_context(serving(plain))
        url = None if plain is None or plain.server is None else plain.server.url
        return ServerEngine(engine.server.url, url, **options).evaluate("maths", PROMPTS, asking)


def test_acceptance_by_vllms_counters() -> None:
    """The counters run on: what came before a round, the warm-up too, is not counted."""
    engine = Engine(blocks=[3, 1, 0])
    engine.drafts, engine.accepted = 1000, [900, 800, 700]
    served = evaluate(engine, concurrency=(1, 3))
    assert [(s.benchmark, s.concurrency, s.prompts) for s in served] == [("maths", 1, 8), ("maths", 3, 8)]
    for found in served:
        assert found.tau == pytest.approx(1 + 4 / 3)
        assert found.acceptance_by_position == pytest.approx([2 / 3, 1 / 2, 1.0])
        assert found.speedup is None and found.lossless is None and found.compared is None
        assert 0.02 < found.latency < 1


def test_the_configured_number_of_requests_is_under_way() -> None:
    engine = Engine(blocks=[1], seconds=0.1)
    served = evaluate(engine, concurrency=(1, 4, 2))
    warm_up, *rounds = engine.at_once
    assert warm_up == 4 and rounds == [1, 0, 4, 0, 2]
    assert served[1].tokens_per_second > 2 * served[0].tokens_per_second
    total = sum(len(text_of(prompt)) for prompt in PROMPTS)
    assert 0.5 < served[0].tokens_per_second / (total / 0.8) <= 1


def test_what_is_asked_for() -> None:
    engine = Engine()
    evaluate(
        engine, asking=Asking(Rules(Sampling(0.7, top_k=5, top_p=0.9), stop=frozenset({2}), max_new_tokens=16), seed=3)
    )
    assert engine.server is not None
    bodies = engine.server.requests
    assert len(bodies) == 8 + 8 and sorted(b["prompt"] for b in bodies[8:]) == PROMPTS
    first = bodies[8]
    assert (first["temperature"], first["top_k"], first["top_p"], first["max_tokens"]) == (0.7, 5, 0.9, 16)
    assert first["stop_token_ids"] == [2] and len({b["seed"] for b in bodies[8:]}) == 8


@pytest.mark.parametrize("api", ["token_ids", "sglang_generate"])
def test_equal_to_a_plain_server(api: str) -> None:
    (found,) = evaluate(Engine([2, 1], seconds=0.02), Engine(seconds=0.08), api=api)
    assert (found.equal, found.compared, found.lossless) == (8, 8, True)
    assert found.plain_tokens_per_second is not None
    assert found.speedup == pytest.approx(found.tokens_per_second / found.plain_tokens_per_second)
    assert found.speedup is not None and found.speedup > 1.5


@pytest.mark.parametrize("api", ["token_ids", "sglang_generate"])
def test_no_speedup_where_texts_differ(api: str) -> None:
    (found,) = evaluate(Differing([2, 1]), Engine(), api=api)
    assert (found.equal, found.compared, found.lossless) == (7, 8, False)
    assert found.plain_tokens_per_second is not None and found.speedup is None
    assert found.as_dict()["speedup"] is None and found.as_dict()["lossless"] is False
    assert rows([found])[0][5:] == ["none", f"{found.latency:.2f} s", "7 of 8"]


def test_above_temperature_0_texts_are_not_compared() -> None:
    (found,) = evaluate(
        Differing([2]), Engine(), asking=Asking(Rules(Sampling(1.0), stop=frozenset({2}), max_new_tokens=16))
    )
    assert found.compared is None and found.lossless is None and found.speedup is not None


def test_servers_take_turns() -> None:
    order: list[str] = []

    class Named(Engine):
        def __init__(self, name: str) -> None:
            super().__init__(seconds=0.0)
            self.name = name

        def text(self, prompt: list[int]) -> list[int]:
            order.append(self.name)
            return text_of(prompt)

    evaluate(Named("drafted"), Named("plain"), concurrency=(1, 1, 1))
    assert order[:16:8] == ["drafted", "plain"]  # warm-up
    assert order[16::8] == ["drafted", "plain", "plain", "drafted", "drafted", "plain"]


def test_progress() -> None:
    told: list[tuple[int, int]] = []
    with serving(Engine([1])) as drafted, serving(Engine()) as plain:
        engine = ServerEngine(drafted.url, plain.url, concurrency=(1, 2))
        engine.evaluate("x", PROMPTS, ASKING, lambda prompts, tokens: told.append((prompts, tokens)))
    assert told == [(8, 2 * sum(len(text_of(prompt)) for prompt in PROMPTS))] * 2


def test_sglang_counts_in_its_answers() -> None:
    (found,) = evaluate(Engine([2, 1, 3], metrics=False), api="sglang_generate")
    counts = [len(text_of(prompt)) - 1 for prompt in PROMPTS]
    assert found.tau == pytest.approx(sum(counts) / (3 * 8))
    assert found.acceptance_by_position is None


@pytest.mark.parametrize(
    "status, page",
    [
        (404, {"detail": "Not Found"}),
        (405, ""),
        (200, ""),
        (200, {"detail": "Not Found"}),
        (200, "<html><body>nothing here</body></html>"),
    ],
)
def test_a_server_without_metrics(status: int, page: Any) -> None:
    engine = Engine([1])

    class Silent(Engine):
        def __call__(self, method: str, path: str, body: Any, headers: Any) -> tuple[int, Any]:
            return (status, page) if path == "/metrics" else engine(method, path, body, headers)

    (found,) = evaluate(Silent())
    assert found.tau is None and found.acceptance_by_position is None and found.tokens_per_second > 0
    assert rows([found])[0][2] == "-"


def test_a_server_that_does_not_speculate() -> None:
    (found,) = evaluate(Engine())
    assert found.tau is None and found.acceptance_by_position is None


def test_nothing_drafted_in_a_round() -> None:
    """Counters that stood still say nothing."""
    counters = {("vllm:spec_decode_num_drafts", ""): 5.0, ("vllm:spec_decode_num_accepted_tokens", ""): 4.0}
    measured = _Measured([Answered((1,), 1, 0.1)], 0.1, counters, counters)
    assert measured.tau() is None and measured.acceptance_by_position() is None


def test_answers_without_token_ids_are_counted_by_usage() -> None:
    class Texts(Engine):
        def complete(self, body: Any) -> Any:
            answer = super().complete(body)
            del answer["choices"][0]["token_ids"]
            return answer

    (found,) = evaluate(Texts([1]), Engine(), concurrency=(8,))
    assert found.compared is None and found.lossless is None and found.tokens_per_second > 0


@pytest.mark.parametrize("api", ["token_ids", "sglang_generate"])
@pytest.mark.parametrize("answer", [{}, {"choices": []}, [1], {"choices": [{"token_ids": 3}], "output_ids": [1]}])
def test_answers_of_another_schema(api: str, answer: Any) -> None:
    class Other(Engine):
        def complete(self, body: Any) -> Any:
            return answer

        generate = complete

    with pytest.raises(ServerError, match="is it vLLM or SGLang"):
        evaluate(Other(), api=api)


def test_faults_are_survived() -> None:
    with serving(Engine([1]), faults=["500", "429", "cut", "garbage"]) as server:
        (found,) = ServerEngine(server.url, concurrency=(2,), attempts=6).evaluate("x", PROMPTS, ASKING)
    assert found.prompts == 8


def test_refusals() -> None:
    for wrong in ([], [0], [4, -1]):
        with pytest.raises(ConfigError, match="engine.concurrency must list numbers of 1 or more"):
            ServerEngine("http://x", concurrency=wrong)
    with pytest.raises(ConfigError, match="engine.api_key_env"):
        ServerEngine("http://x", api_key_env="NO_SUCH_KEY")
    with pytest.raises(ServerError, match="not an address: write engine.url="):
        ServerEngine("localhost:8000", attempts=1).evaluate("x", PROMPTS, ASKING)

    def two(method: str, path: str, body: Any, headers: Any) -> tuple[int, Any]:
        both = {"data": [{"id": "a"}, {"id": "m"}]}
        return (200, both) if path == "/v1/models" else Engine()(method, path, body, headers)

    with serving(two) as server:
        with pytest.raises(ServerError, match="serves a, m: choose engine.model=NAME"):
            ServerEngine(server.url, concurrency=(1,)).evaluate("x", PROMPTS, ASKING)
        assert ServerEngine(server.url, model="m", concurrency=(1,)).evaluate("x", PROMPTS, ASKING)[0].prompts == 8


def test_table_and_file(tmp_path: Path) -> None:
    found = [
        Served("maths", 1, 8, 100.4, 0.512, 2.345, [0.8, 0.5], 50.2, 8, 8),
        Served("maths", 16, 8, 900.0, 1.5, None, None),
        Served("code", 1, 8, 100.0, 0.5, 1.5, None, 50.0, 7, 8),
    ]
    assert rows(found) == [
        ["maths", "1", "2.35", "100", "50", "2.00x", "0.51 s", "8 of 8"],
        ["maths", "16", "-", "900", "-", "-", "1.50 s", "-"],
        ["code", "1", "1.50", "100", "50", "none", "0.50 s", "7 of 8"],
    ]
    console = Console(file=io.StringIO(), width=80)
    print_served(found, console)
    text = console.file.getvalue()
    assert "2.00x" in text and "…" not in text
    write_served(found, tmp_path, {"seed": 3})
    content = json.loads((tmp_path / "served.json").read_text())
    assert content["seed"] == 3 and [s["concurrency"] for s in content["served"]] == [1, 16, 1]
    assert content["served"][0]["speedup"] == 2.0 and content["served"][0]["acceptance_by_position"] == [0.8, 0.5]
    assert content["served"][2]["speedup"] is None and content["served"][1]["tau"] is None
    lines = (tmp_path / "table.md").read_text().splitlines()
    assert len(lines) == 5 and {line.count("|") for line in lines} == {len(HEADINGS) + 1}
