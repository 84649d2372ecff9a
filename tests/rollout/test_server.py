"""Texts from a server: exact token ids, through every fault, or a clear refusal."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.support.models import MakeRequest
from tests.support.serving import FAULTS, Answer, Server, passing_on, serving

from draftopd.data.prompts import PromptEncoder, ReasoningPrompts
from draftopd.decoding.generate import Decoder
from draftopd.decoding.rules import Rules
from draftopd.decoding.sampling import Sampling
from draftopd.errors import ConfigError, PromptError, ServerError
from draftopd.io import connection as module
from draftopd.io.hub import resolve
from draftopd.rollout.origin import excess_surprise
from draftopd.rollout.request import Request, Trajectory
from draftopd.rollout.server import ServerTrajectories
from draftopd.targets.load import load_target, load_tokenizer, stop_tokens
from draftopd.targets.target import Target


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_PAUSE", 0.05)


def texts_of(request: Request) -> list[Trajectory]:
    """What the target itself says."""
    decoder = Decoder(request.target, None, Rules(stop=request.rules.stop, max_new_tokens=request.rules.max_new_tokens))
    return [Trajectory(d.prompt, d.response) for d in decoder.decode_batch(request.prompts())]


def engine(request: Request, change: Callable[[dict[str, Any]], Any] = lambda choice: choice) -> Answer:
    """Answers as vLLM and SGLang do, with the target's own texts; ``change`` spoils a choice."""
    known = {tuple(t.prompt): t.response for t in texts_of(request)}

    def answer(method: str, path: str, body: Any, headers: Any) -> tuple[int, Any]:
        if path == "/v1/models":
            return 200, {"data": [{"id": "small"}]}
        assert path == "/v1/completions" and body["return_token_ids"] is True
        time.sleep(0.02)  # as if it took thought: requests overlap
        ids = known[tuple(body["prompt"])]
        ended = ids[-1] in body["stop_token_ids"]
        choice = {
            "text": "?", "finish_reason": "stop" if ended else "length", "token_ids": list(ids),
            "prompt_token_ids": body["prompt"],
        }  # fmt: skip
        return 200, {"choices": [change(choice)]}

    return answer


def collect(source: ServerTrajectories, request: Request) -> list[Trajectory]:
    return [text for batch in source.collect(request) for text in batch]


def source_of(server: Server, store: Path, **options: Any) -> ServerTrajectories:
    options = {"concurrency": 4, "timeout": 2.0} | options
    return ServerTrajectories(server.url, str(store), **options)


def test_token_ids_are_taken_as_they_are(tmp_path: Path, make_request: MakeRequest) -> None:
    request = make_request()
    with serving(engine(request)) as server:
        source = ServerTrajectories(server.url + "/v1/", str(tmp_path), concurrency=3)
        assert collect(source, request) == texts_of(request)
        assert 1 < server.most_at_once <= 3
        asked = server.requests[0]
        assert asked["model"] == "small" and asked["temperature"] == 0 and asked["max_tokens"] == 20
        # What is left out a server would take from the model's generation config.
        neutral = {"top_k": -1, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0}
        assert asked | neutral == asked
        assert asked["stop_token_ids"] == [3, 11] and "seed" not in asked
        before = len(server.requests)
        assert collect(source, request) == texts_of(request)
        assert len(server.requests) == before


def test_sampling_is_passed_on_with_a_seed_for_every_prompt(tmp_path: Path, make_request: MakeRequest) -> None:
    request = make_request(sampling=Sampling(2.0, top_k=60, top_p=0.999))
    with serving(engine(request)) as server:
        collect(source_of(server, tmp_path), request)
        assert {(b["temperature"], b["top_k"], b["top_p"]) for b in server.requests} == {(2.0, 60, 0.999)}
        assert len({b["seed"] for b in server.requests}) == 12


@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_is_survived(fault: str, tmp_path: Path, make_request: MakeRequest) -> None:
    request = make_request()
    with serving(engine(request), faults=[fault] * 3) as server:
        assert collect(source_of(server, tmp_path), request) == texts_of(request)
        assert not server.faults and len(server.requests) == 12 + 3


def test_all_faults_in_a_row(tmp_path: Path, make_request: MakeRequest) -> None:
    request = make_request()
    with serving(engine(request), faults=[f for f in FAULTS if f not in ("slow", "drip")] * 4) as server:
        assert collect(source_of(server, tmp_path, attempts=25), request) == texts_of(request)


def test_the_pause_a_server_asks_for_is_kept(
    tmp_path: Path, make_request: MakeRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_PAUSE", 30.0)
    request = make_request()
    with serving(engine(request), faults=["429"]) as server:
        began = time.monotonic()
        collect(source_of(server, tmp_path), request)
        assert time.monotonic() - began >= 1


def test_a_dead_server_ends_it_and_keeps_what_came(tmp_path: Path, make_request: MakeRequest) -> None:
    request = make_request()
    with serving(engine(request)) as server:
        calls = server.answer

        def dies(method: str, path: str, body: Any, headers: Any) -> tuple[int, Any]:
            return (503, {}) if len(server.requests) > 6 else calls(method, path, body, headers)

        server.answer = dies
        source = source_of(server, tmp_path, concurrency=1, attempts=3)
        with pytest.raises(ServerError, match=r"failed 3 times, last with status 503.*the same command goes on"):
            collect(source, request)
        server.answer = calls
        server.requests.clear()
        assert collect(source, request) == texts_of(request)
        assert len(server.requests) == 6


def test_a_server_that_does_not_answer(tmp_path: Path, make_request: MakeRequest) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(ServerError, match=r"/v1/models failed 2 times, last with ConnectError"):
        collect(ServerTrajectories(url, str(tmp_path), attempts=2), make_request())
    with pytest.raises(ServerError, match="not an address: write trajectories.url="):
        collect(ServerTrajectories("localhost:8000", str(tmp_path), attempts=1), make_request())
    with pytest.raises(ServerError, match="not an address"):
        collect(ServerTrajectories("http://localhost:80O0", str(tmp_path), attempts=1), make_request())


@pytest.mark.parametrize(
    "status, answer, message",
    [
        (400, {"error": {"message": "max_tokens is too large"}}, "refuses the request .400.*max_tokens is too large"),
        (404, {"error": "The model does not exist"}, "404.*does not exist"),
        (401, {}, "401.*trajectories.api_key_env"),
        (200, {"choices": [{"text": "only text", "finish_reason": "stop"}]}, "no token_ids.*trajectories.api=text"),
        (200, {"choices": [{"token_ids": ["a"], "finish_reason": "stop"}]}, "not a list of numbers"),
        (200, {"choices": []}, "has no choices"),
        (200, [1], "has no choices"),
    ],
)
def test_refusals_and_other_schemas(
    status: int, answer: Any, message: str, tmp_path: Path, make_request: MakeRequest
) -> None:
    def reply(method: str, path: str, body: Any, headers: Any) -> tuple[int, Any]:
        return (200, {"data": [{"id": "small"}]}) if path == "/v1/models" else (status, answer)

    with serving(reply) as server, pytest.raises(ServerError, match=message):
        collect(source_of(server, tmp_path), make_request())
    assert not list(tmp_path.glob("*/texts-*"))


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"prompt_token_ids": [1]}, "prompt differs: 12"),
        ({"token_ids": [64]}, "outside the target's vocabulary: 12"),
        ({"token_ids": []}, "empty: 12"),
        ({"finish_reason": "abort"}, "ended by abort: 12"),
    ],
)
def test_answers_that_cannot_be_used_are_counted(
    change: dict[str, Any], reason: str, tmp_path: Path, make_request: MakeRequest
) -> None:
    request = make_request()
    with (
        serving(engine(request, lambda choice: choice | change)) as server,
        pytest.raises(ServerError, match=f"None of 12 answers.*{reason}"),
    ):
        collect(source_of(server, tmp_path), request)


def test_one_bad_answer_is_left_out(tmp_path: Path, make_request: MakeRequest) -> None:
    request = make_request()
    spoiled = request.prompts()[4]

    def spoil(choice: dict[str, Any]) -> dict[str, Any]:
        return choice | {"token_ids": [99]} if choice["prompt_token_ids"] == spoiled else choice

    with serving(engine(request, spoil)) as server:
        source = source_of(server, tmp_path)
        assert collect(source, request) == [t for t in texts_of(request) if t.prompt != spoiled]
        assert source.counts["dropped, ids outside the target's vocabulary"] == 1
        # Asked for again, it still is the only one missing; that ends nothing.
        assert len(collect(source, request)) == 11
        assert source.counts["reused"] == 11


def test_another_models_texts_are_refused(tmp_path: Path, make_request: MakeRequest) -> None:
    request = make_request()

    def shift(choice: dict[str, Any]) -> dict[str, Any]:
        return choice | {"token_ids": [(i + 20) % 60 for i in choice["token_ids"]]}

    with (
        serving(engine(request, shift)) as server,
        pytest.raises(PromptError, match="not what the target would produce"),
    ):
        collect(source_of(server, tmp_path), request)
    assert not list(tmp_path.glob("*/texts-*"))


def test_another_models_draws_are_refused(tmp_path: Path, make_request: MakeRequest) -> None:
    """Above temperature 0 no token is impossible, but on average they surprise the target."""
    plain = make_request()
    hot = make_request(sampling=Sampling(1.0))
    shifted = engine(plain, lambda choice: choice | {"token_ids": [(i + 20) % 60 for i in choice["token_ids"]]})
    with serving(shifted) as server, pytest.raises(PromptError, match="nats per token more surprising"):
        collect(source_of(server, tmp_path), hot)
    decoder = Decoder(hot.target, None, Rules(hot.rules.sampling, stop=hot.rules.stop, max_new_tokens=20))
    decoded = decoder.decode_batch(hot.prompts(), torch.Generator().manual_seed(0))
    own = [Trajectory(d.prompt, d.response) for d in decoded]
    assert abs(excess_surprise(hot.target, own, hot.rules.sampling)) < 0.3


def test_an_error_does_not_wait_for_the_other_answers(tmp_path: Path, make_request: MakeRequest) -> None:
    request = make_request()
    answers = engine(request)

    def slow_but_one(method: str, path: str, body: Any, headers: Any) -> tuple[int, Any]:
        if method == "POST" and body["prompt"] == request.prompts()[2]:
            return 400, {"error": "no"}
        if method == "POST":
            time.sleep(3)
        return answers(method, path, body, headers)

    with serving(slow_but_one) as server:
        began = time.monotonic()
        with pytest.raises(ServerError, match="400"):
            collect(source_of(server, tmp_path, timeout=60.0), request)
        assert time.monotonic() - began < 2


def test_several_models(tmp_path: Path, make_request: MakeRequest) -> None:
    request = make_request()
    answers = engine(request)

    def two(method: str, path: str, body: Any, headers: Any) -> tuple[int, Any]:
        return (200, {"data": [{"id": "a"}, {"id": "b"}]}) if method == "GET" else answers(method, path, body, headers)

    with serving(two) as server:
        with pytest.raises(ServerError, match="serves a, b: choose trajectories.model=NAME"):
            collect(source_of(server, tmp_path), request)
        assert collect(source_of(server, tmp_path, model="b"), request) == texts_of(request)
        assert {body["model"] for body in server.requests} == {"b"}


def test_keys_come_from_the_environment_and_are_never_shown(
    tmp_path: Path, make_request: MakeRequest, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(ConfigError, match="NO_SUCH_KEY.*is not set"):
        ServerTrajectories("http://x", str(tmp_path), api_key_env="NO_SUCH_KEY")
    for bad in ("sécret", "se\ncret", " \n"):
        monkeypatch.setenv("SERVER_KEY", bad)
        with pytest.raises(ConfigError, match="SERVER_KEY holds no key") as refusal:
            ServerTrajectories("http://x", str(tmp_path), api_key_env="SERVER_KEY")
        assert bad.strip() == "" or bad not in str(refusal.value)
    monkeypatch.setenv("SERVER_KEY", "secret-value\n")
    request = make_request()
    answers, seen = engine(request), []

    def guarded(method: str, path: str, body: Any, headers: Any) -> tuple[int, Any]:
        seen.append(headers["Authorization"])
        return (403, {}) if len(seen) > 5 else answers(method, path, body, headers)

    with serving(guarded) as server:
        source = source_of(server, tmp_path, api_key_env="SERVER_KEY")
        with caplog.at_level("DEBUG"), pytest.raises(ServerError) as error:
            collect(source, request)
    assert set(seen) == {"Bearer secret-value"}
    shown = caplog.text + str(error.value) + repr(source)
    assert "secret-value" not in shown.replace("'authorization': '[secure]'", "")


@pytest.mark.parametrize("options", [{"concurrency": 0}, {"attempts": 0}, {"timeout": 0.0}])
def test_numbers_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="must be 1 or more and timeout above 0"):
        ServerTrajectories("http://x", "store", **options)


def test_text_servers_take_no_top_k(tmp_path: Path, make_request: MakeRequest) -> None:
    source = ServerTrajectories("http://127.0.0.1:9", str(tmp_path), api="text")
    with pytest.raises(ServerError, match="does not take top_k: set top_k=0"):
        collect(source, make_request(sampling=Sampling(1.0, top_k=4)))


# Real schemas, and a real server.


@pytest.fixture(scope="module")
def bundled() -> tuple[Target, Any]:
    return load_target("bundled:tiny_target", dtype="float32"), load_tokenizer("bundled:tiny_target")


def bundled_request(bundled: tuple[Target, Any], prompts: list[list[int]]) -> Request:
    target, tokenizer = bundled
    rules = Rules(stop=stop_tokens(target, tokenizer), max_new_tokens=200)
    return Request(target, None, tokenizer, lambda: prompts, range(len(prompts)), rules, 512, 0)


@pytest.mark.parametrize(
    "name, api",
    [
        ("vllm", "token_ids"),
        ("sglang", "token_ids"),
        ("sglang_generate", "sglang_generate"),
        ("transformers", "text"),
    ],
)
def test_contracts_of_the_engines(name: str, api: Any, tmp_path: Path, bundled: tuple[Target, Any]) -> None:
    recorded = Path(__file__).parent / "answers"
    vllm = json.loads((recorded / "vllm.json").read_text())["choices"][0]
    request = bundled_request(bundled, [vllm["prompt_token_ids"]])
    reply = json.loads((recorded / f"{name}.json").read_text())

    def answer(method: str, path: str, body: Any, headers: Any) -> tuple[int, Any]:
        return (200, {"data": [{"id": "tiny_target"}]}) if method == "GET" else (200, reply)

    with serving(answer) as server:
        (text,) = collect(source_of(server, tmp_path, api=api), request)
        assert text == Trajectory(vllm["prompt_token_ids"], vllm["token_ids"])
        (asked,) = server.requests
    if api == "text":
        assert asked["prompt"].startswith("<|im_start|>user") and set(asked) <= {
            "model", "prompt", "max_tokens", "temperature", "top_p",
        }  # fmt: skip
    elif api == "sglang_generate":
        assert asked["input_ids"] == text.prompt and asked["sampling_params"]["max_new_tokens"] == 200
    else:
        assert asked["prompt"] == text.prompt and asked["return_token_ids"]


@pytest.mark.parametrize(
    "change, usage, reason",
    [
        ({"text": "<think>\ufffd"}, {}, "token count differs|tokenise back"),
        ({}, {"completion_tokens": 57}, "token count differs"),
        ({}, {"prompt_tokens": 30}, "prompt differs"),
        ({"finish_reason": "length"}, {}, "token count differs"),
        ({"text": "12 apples", "finish_reason": "length"}, {"completion_tokens": 3}, "not the target's tokens"),
    ],
)
def test_text_that_cannot_be_proven_is_left_out(
    change: dict[str, Any], usage: dict[str, int], reason: str, tmp_path: Path, bundled: tuple[Target, Any]
) -> None:
    recorded = Path(__file__).parent / "answers"
    prompt = json.loads((recorded / "vllm.json").read_text())["choices"][0]["prompt_token_ids"]
    reply = json.loads((recorded / "transformers.json").read_text())
    reply["choices"][0] |= change
    reply["usage"] |= usage

    def answer(method: str, path: str, body: Any, headers: Any) -> tuple[int, Any]:
        return (200, {"data": [{"id": "tiny_target"}]}) if method == "GET" else (200, reply)

    with serving(answer) as server, pytest.raises(ServerError, match=f"None of 1 answers.*({reason}): 1"):
        collect(source_of(server, tmp_path, api="text"), bundled_request(bundled, [prompt]))


@pytest.fixture(scope="module")
def transformers_server() -> Iterator[int]:
    """transformers' own server with the bundled target, in a process of its own; its port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable, "-m", "transformers.cli.transformers", "serve", resolve("bundled:tiny_target"), "--device",
        "cpu", "--dtype", "float32", "--host", "127.0.0.1", "--port", str(port),
    ]  # fmt: skip
    env = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        limit = time.monotonic() + 120
        while time.monotonic() < limit:
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            except OSError:
                assert process.poll() is None, "transformers serve ended"
                time.sleep(0.2)
        yield port
    finally:
        process.terminate()
        process.wait(30)


@pytest.mark.slow
def test_a_real_server_through_faults(transformers_server: int, tmp_path: Path, bundled: tuple[Target, Any]) -> None:
    prompts = PromptEncoder(bundled[1]).take(ReasoningPrompts("validation"), range(24))
    request = bundled_request(bundled, prompts)
    faults = ["cut", "500", "truncated", "half", "garbage", "429", "cut", "500"]
    with serving(passing_on(transformers_server), faults) as server:
        source = source_of(server, tmp_path, api="text", timeout=60.0, concurrency=4, attempts=12)
        found = collect(source, request)
        assert not server.faults
    # Every text is the target's own, token for token.
    assert found == texts_of(request)
    assert source.counts["generated"] == 24
