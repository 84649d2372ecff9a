"""Answers of servers that are garbled, add up to nothing, or come from no engine."""

from __future__ import annotations

import gzip
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
import pytest
from tests.support.refusing import refused

from draftopd.decoding.rules import Rules
from draftopd.errors import ServerError
from draftopd.evaluation.served import Asking, ServerEngine
from draftopd.io import connection
from draftopd.rollout.request import Request, Trajectory
from draftopd.rollout.server import ServerTrajectories
from draftopd.rollout.server_answers import Unproven, from_generate, from_text, from_token_ids

MODELS = {"data": [{"id": "small"}]}
DEEP = "[" * 100_000
HTML = "<!DOCTYPE html><html><body>Bad gateway</body></html>"
SCHEMA = "is it vLLM or SGLang"


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """``serve(answer, models, status, headers)``: what every request is answered with, without a network."""
    client = httpx2.Client

    def set_up(answer: Any, models: Any = MODELS, status: int = 200, headers: dict[str, str] | None = None) -> None:
        def reply(request: httpx2.Request) -> httpx2.Response:
            said = models if request.url.path.endswith("/models") else answer
            if isinstance(said, Exception):
                raise said
            content = said if isinstance(said, bytes | str) else json.dumps(said)
            return httpx2.Response(200 if said is models else status, content=content, headers=headers)

        monkeypatch.setattr(
            connection.httpx2, "Client", lambda **options: client(**options, transport=httpx2.MockTransport(reply))
        )

    return set_up


def choice(**changes: Any) -> dict[str, Any]:
    """A completion of three tokens, which is right but for the changes."""
    good = {"token_ids": [7, 8, 3], "prompt_token_ids": [5, 6], "finish_reason": "stop", "text": "a"}
    return {"choices": [good | changes], "usage": {"completion_tokens": 3, "prompt_tokens": 2}}


def generated(**changes: Any) -> dict[str, Any]:
    meta = {"finish_reason": {"type": "stop", "matched": 3}, "prompt_tokens": 2, "completion_tokens": 3}
    return {"output_ids": [7, 8, 3], "meta_info": meta | changes}


NOT_JSON = "failed 1 times, last with an answer that is not JSON .*Check the server's log and trajectories.url"
NONE = "None of 1 answers of http://x can be used .*{}: 1.*Use a server that returns token ids"
LISTS_NONE = "/v1/models lists no models: name one, trajectories.model=NAME"
IDS = "token ids are not a list of numbers"
GENERATE = "lacks output_ids or meta_info.finish_reason"
ANSWERS: dict[str, tuple[Any, str]] = {
    "nothing": ("", NOT_JSON),
    "HTML": (HTML, NOT_JSON),
    "cut off": ('{"choices": [{"tok', NOT_JSON),
    "two answers": ("{}{}", NOT_JSON),
    "no UTF-8": (b"\xff\xfe", NOT_JSON),
    "BOM": (b"\xef\xbb\xbf{}", "byte order mark"),
    "NUL bytes": (bytes(20), NOT_JSON),
    "nested deeply": (DEEP, "nests too deeply"),
    "a number without end": ("9" * 5000, NOT_JSON),
    "null": ("null", "has no choices"),
    "a number": ("5", "has no choices"),
    "a list": ([1], "has no choices"),
    "no choices": ({}, "has no choices"),
    "choices empty": ({"choices": []}, "has no choices"),
    "choices an object": ({"choices": {"0": 1}}, "has no choices"),
    "choices of texts": ({"choices": ["a"]}, "has no choices"),
    "no ids": ({"choices": [{"text": "a"}]}, "no token_ids; .*set trajectories.api=text"),
    "ids null": (choice(token_ids=None), "no token_ids"),
    "ids a text": (choice(token_ids="7 8"), IDS),
    "ids an object": (choice(token_ids={"0": 7}), IDS),
    "ids texts": (choice(token_ids=["7"]), IDS),
    "ids fractions": (choice(token_ids=[7.0, 8.5]), IDS),
    "ids NaN": (choice(token_ids=[math.nan]), IDS),
    "ids truth values": (choice(token_ids=[True]), IDS),
    "ids nested": (choice(token_ids=[[7]]), IDS),
    "ids none": (choice(token_ids=[]), NONE.format("empty|token count differs")),
    "ids past the vocabulary": (choice(token_ids=[7, 8, 64]), NONE.format("outside the target's vocabulary")),
    "ids past all": (choice(token_ids=[7, 8, 10**40]), NONE.format("outside the target's vocabulary")),
    "ids below 0": (choice(token_ids=[7, -8, 3]), NONE.format("outside the target's vocabulary")),
    "fewer ids than counted": (choice(token_ids=[7]), NONE.format("token count differs")),
    "more ids than counted": (choice(token_ids=[7] * 8), NONE.format("token count differs")),
    "another prompt": (choice(prompt_token_ids=[5]), NONE.format("prompt differs")),
    "a prompt of another type": (choice(prompt_token_ids="5 6"), NONE.format("prompt differs")),
    "ended by an abort": (choice(finish_reason="abort"), NONE.format("ended by abort")),
    "ended by nothing": (choice(finish_reason=None), NONE.format("ended by something else")),
    "ended by an object": (choice(finish_reason={"a": 1}), NONE.format("ended by something else")),
    "ended by an escape sequence": (choice(finish_reason="\x1b[2J" * 999), NONE.format("ended by something else")),
}  # fmt: skip


def collect(**options: Any) -> Callable[[Request, Path], object]:
    def act(request: Request, store: Path) -> object:
        return [*ServerTrajectories("http://x", str(store), attempts=1, **options).collect(request)]

    return act


def kept(store: Path, request: Request) -> None:
    """The store as a collection leaves it that got nothing."""
    from draftopd.rollout.store import TrajectoryStore
    from draftopd.rollout.trajectories import settings

    TrajectoryStore(store, settings(request))


@pytest.mark.parametrize(("answer", "message"), ANSWERS.values(), ids=ANSWERS)
def test_answers(answer: Any, message: str, serve: Callable[..., None], request_: Request, tmp_path: Path) -> None:
    serve(answer)
    kept(tmp_path, request_)
    refused(lambda: collect()(request_, tmp_path), ServerError, message, tmp_path)


def _logprobs(value: float) -> dict[str, Any]:
    return choice(logprobs={"token_logprobs": [value] * 3})


def test_what_nobody_asked_for_does_no_harm(request_: Request) -> None:
    for answer in (_logprobs(math.nan), _logprobs(-math.inf), choice(stop_reason=[3]), choice(stop_reason={"a": 1})):
        assert from_token_ids(answer, [5, 6], request_) == Trajectory([5, 6], [7, 8, 3])
    assert from_token_ids(choice() | {"usage": [1]}, [5, 6], request_) == Trajectory([5, 6], [7, 8, 3])


GENERATED: dict[str, tuple[Any, str]] = {
    "null": ("null", GENERATE),
    "a list": ([1], GENERATE),
    "no meta_info": ({"output_ids": [7]}, GENERATE),
    "meta_info a list": ({"output_ids": [7], "meta_info": [1]}, GENERATE),
    "finish_reason null": (generated(finish_reason=None), GENERATE),
    "finish_reason a text": (generated(finish_reason="stop"), GENERATE),
    "ids a text": (generated() | {"output_ids": "7 8"}, IDS),
    "ids fewer": (generated(completion_tokens=9), NONE.format("token count differs")),
    "prompt longer": (generated(prompt_tokens=3), NONE.format("prompt differs")),
    "prompt a text": (generated(prompt_tokens="2"), NONE.format("prompt differs")),
}  # fmt: skip


@pytest.mark.parametrize(("answer", "message"), GENERATED.values(), ids=GENERATED)
def test_sglangs_answers(answer: Any, message: str, serve: Any, request_: Request, tmp_path: Path) -> None:
    serve(answer)
    kept(tmp_path, request_)
    refused(lambda: collect(api="sglang_generate")(request_, tmp_path), ServerError, message, tmp_path)


TEXTS: dict[str, Any] = {
    "usage missing": {"choices": [{"text": "a", "finish_reason": "stop"}]},
    "usage a list": choice() | {"usage": [3]},
    "counts texts": choice() | {"usage": {"completion_tokens": "3", "prompt_tokens": 2}},
    "counts infinite": choice() | {"usage": {"completion_tokens": math.inf, "prompt_tokens": 2}},
    "text null": choice(text=None),
    "text half a surrogate pair": choice(text="\ud800"),
}


@pytest.mark.parametrize("answer", TEXTS.values(), ids=TEXTS)
def test_texts(answer: Any, serve: Any, request_: Request, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from draftopd.rollout import server

    monkeypatch.setattr(server, "encode", lambda *_: [5, 6])
    serve(answer)
    kept(tmp_path, request_)
    message = "lacks text or usage, without which its tokens cannot be proven"
    refused(lambda: collect(api="text")(request_, tmp_path), ServerError, message, tmp_path)


MODEL_LISTS: dict[str, tuple[Any, str]] = {
    "HTML": (HTML, "failed 1 times, last with an answer that is not JSON"),
    "a list": ([1], LISTS_NONE),
    "null": ("null", LISTS_NONE),
    "data null": ({"data": None}, LISTS_NONE),
    "data a number": ({"data": 5}, LISTS_NONE),
    "data of texts": ({"data": ["small"]}, LISTS_NONE),
    "names numbers": ({"data": [{"id": 5}]}, LISTS_NONE),
    "names objects": ({"data": [{"id": {}}]}, LISTS_NONE),
    "no name": ({"data": [{}]}, LISTS_NONE),
    "none": ({"data": []}, "serves no model: choose trajectories.model=NAME"),
    "many": ({"data": [{"id": f"m{i}"} for i in range(999)]}, "m7 and 991 more: choose trajectories.model=NAME"),
}  # fmt: skip


@pytest.mark.parametrize(("models", "message"), MODEL_LISTS.values(), ids=MODEL_LISTS)
def test_lists_of_models(models: Any, message: str, serve: Any, request_: Request, tmp_path: Path) -> None:
    serve(choice(), models=models)
    kept(tmp_path, request_)
    refused(lambda: collect()(request_, tmp_path), ServerError, message, tmp_path)


@pytest.mark.parametrize(
    ("status", "answer", "message"),
    [
        (302, "", "refuses the request .302."),
        (
            400,
            {"error": {"message": "max_tokens is too large"}},
            "refuses the request .400.: .*max_tokens is too large",
        ),
        (400, "\x1b[2J\x07" + "x" * 9999, r"refuses the request .400.: \[2J x{290,}\.\.\. .check traj"),
        (401, {}, "401.*set trajectories.api_key_env to the name of its key's variable"),
        (403, "hunter2", "403.*api_key_env"),
        (404, HTML, "404.*Bad gateway"),
        (429, "", "failed 1 times, last with status 429. Check the server's log"),
        (500, HTML, "last with status 500"),
        (200, httpx2.ReadTimeout("too slow"), "last with ReadTimeout: too slow. Check"),
        (200, httpx2.RemoteProtocolError("no HTTP"), "last with RemoteProtocolError: no HTTP"),
        (200, httpx2.DecodingError("no gzip"), "last with DecodingError"),
    ],
)
def test_refusals(status: int, answer: Any, message: str, serve: Any, request_: Request, tmp_path: Path) -> None:
    serve(answer, status=status)
    kept(tmp_path, request_)
    refused(lambda: collect(model="m")(request_, tmp_path), ServerError, message, tmp_path)


@pytest.mark.parametrize("packed", [False, True])
def test_oversized_answers(packed: bool, serve: Any, request_: Request, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(connection, "MAX_BYTES", 2**20)
    body = b" " * 2**24
    serve(gzip.compress(body) if packed else body, headers={"Content-Encoding": "gzip"} if packed else None)
    kept(tmp_path, request_)
    message = "sent more than 1048576 bytes for one answer: check that trajectories.url is an engine's address"
    refused(lambda: collect(model="m")(request_, tmp_path), ServerError, message, tmp_path)


def test_a_key_that_the_server_sends_back_is_not_shown(
    serve: Any, request_: Request, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SERVER_KEY", "hunter2")
    serve({"error": "wrong key hunter2"}, status=400)
    kept(tmp_path, request_)
    act = collect(model="m", api_key_env="SERVER_KEY")
    refused(lambda: act(request_, tmp_path), ServerError, r"wrong key \[key\]", tmp_path)


COUNTED = "counts .* tokens and .* verifications, but gives"
SERVED: dict[str, tuple[str, Any, str]] = {
    "HTML": ("token_ids", HTML, "not JSON.*engine.url"),
    "a list": ("token_ids", [1], SCHEMA),
    "no choices": ("token_ids", {}, SCHEMA),
    "choices empty": ("token_ids", {"choices": []}, SCHEMA),
    "choices of texts": ("token_ids", {"choices": ["a"]}, SCHEMA),
    "ids a text": ("token_ids", choice(token_ids="78"), SCHEMA),
    "ids texts": ("token_ids", choice(token_ids=["7"]), SCHEMA),
    "ids a number": ("token_ids", choice(token_ids=7), SCHEMA),
    "usage a list": ("token_ids", choice() | {"usage": [1]}, SCHEMA),
    "count a text": ("token_ids", choice() | {"usage": {"completion_tokens": "3"}}, SCHEMA),
    "count infinite": ("token_ids", choice() | {"usage": {"completion_tokens": math.inf}}, SCHEMA),
    "count NaN": ("token_ids", choice() | {"usage": {"completion_tokens": math.nan}}, SCHEMA),
    "count below 0": ("token_ids", choice(token_ids=[]) | {"usage": {"completion_tokens": -3}}, COUNTED),
    "count past the limit": ("token_ids", choice(token_ids=[]) | {"usage": {"completion_tokens": 10**9}}, COUNTED),
    "count of other ids": ("token_ids", choice(token_ids=[7]), COUNTED),
    "more ids than the limit": ("token_ids", {"choices": [{"token_ids": [7] * 99}]}, COUNTED),
    "no meta_info": ("sglang_generate", {"output_ids": [7]}, SCHEMA),
    "meta_info a text": ("sglang_generate", {"output_ids": [7], "meta_info": "a"}, SCHEMA),
    "output_ids null": ("sglang_generate", {"output_ids": None, "meta_info": {"completion_tokens": 1}}, SCHEMA),
    "verifications a text": ("sglang_generate", generated(spec_verify_ct="2"), SCHEMA),
    "verifications NaN": ("sglang_generate", generated(spec_verify_ct=math.nan), SCHEMA),
    "verifications below 0": ("sglang_generate", generated(spec_verify_ct=-1), COUNTED),
    "verifications past all": ("sglang_generate", generated(spec_verify_ct=10**9), COUNTED),
}  # fmt: skip


@pytest.mark.parametrize(("api", "answer", "message"), SERVED.values(), ids=SERVED)
def test_served(api: Any, answer: Any, message: str, serve: Any, tmp_path: Path) -> None:
    serve(answer)
    engine = ServerEngine("http://x", concurrency=(1,), attempts=1, api=api)
    asking = Asking(Rules(stop=frozenset({3}), max_new_tokens=8))
    refused(lambda: engine.evaluate("own", [[5, 6]], asking), ServerError, f"http://x.*{message}", tmp_path)


def test_counters_that_say_nothing(serve: Any) -> None:
    pages = (
        HTML,
        DEEP,
        "\x00" * 99,
        "vllm:spec_decode_num_drafts_total NaN\nvllm:spec_decode_num_accepted_tokens_total NaN\n",
        "vllm:spec_decode_num_drafts_total +Inf\nvllm:spec_decode_num_accepted_tokens_total -Inf\n",
        'vllm:spec_decode_num_drafts_total{position="0" 3\n',
        "# TYPE vllm:spec_decode_num_drafts counter\nvllm:spec_decode_num_drafts_total\n",
    )
    engine = ServerEngine("http://x", concurrency=(1,), attempts=1)
    for page in pages:
        serve(page)
        assert not engine.drafted.counters()


def test_counters_of_an_engine_that_was_started_anew() -> None:
    from draftopd.evaluation.served import ACCEPTED, DRAFTS, Answered, _Measured

    before, after = ({(DRAFTS, ""): n, (ACCEPTED, ""): n} for n in (9.0, 4.0))
    assert _Measured([Answered((1,), 1, 0.1)], 0.1, before, after).tau() is None


def test_answers_are_read_in_proportion(request_: Request) -> None:
    """A long answer takes no more than its length: seconds would mean a quadratic reader."""
    began = time.monotonic()
    for read in (from_token_ids, from_generate, from_text):
        long = choice(token_ids=[7] * 10**6) | {"output_ids": [7] * 10**6, "meta_info": generated()["meta_info"]}
        assert isinstance(read(long, [5, 6], request_), Unproven)
    assert time.monotonic() - began < 5
