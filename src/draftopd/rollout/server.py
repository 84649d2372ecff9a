"""Trajectories from a running engine that speaks the OpenAI completions protocol: vLLM, SGLang, transformers.

vLLM and SGLang take prompts as token ids and return the response's own (``return_token_ids``): these are
used as they are. A server that returns text only (``transformers serve``) is asked in text, and its answer is
tokenised again; an answer whose tokens cannot be proven is counted and left out, never used.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, Literal

import httpx2
import tenacity

from draftopd.errors import ConfigError, ServerError
from draftopd.rollout.origin import foreign_tokens
from draftopd.rollout.server_answers import (
    AnswerError,
    Unproven,
    completion_body,
    encode,
    from_generate,
    from_text,
    from_token_ids,
    generate_body,
)
from draftopd.rollout.trajectories import GeneratedTrajectories, Request, Trajectory

log = logging.getLogger(__name__)

Api = Literal["token_ids", "text", "sglang_generate"]

#: An answer longer than this is cut off: none of ours is.
MAX_BYTES = 64 * 2**20

#: Longest pause between two tries, in seconds.
MAX_PAUSE = 30.0


class _TransientError(Exception):
    """What may go better the next time; ``pause`` seconds where the server said so."""

    def __init__(self, message: str, pause: float = 0.0) -> None:
        super().__init__(message)
        self.pause = pause


class ServerTrajectories(GeneratedTrajectories):
    """Texts of a running server.

    Args:
        url: the server's address, with or without ``/v1``.
        store: directory of the texts; what an interrupted collection got is kept there.
        model: the name to ask for; None takes the only one served.
        api: ``token_ids`` for vLLM and SGLang; ``text`` for servers that return text only; ``sglang_generate``
            for the native endpoint of SGLang releases without ``return_token_ids``.
        concurrency: requests under way at once.
        timeout: seconds until one answer must be complete.
        attempts: tries for one request, with growing pauses between them.
        api_key_env: name of the environment variable that holds the server's key.

    Raises:
        ConfigError: if a number lies outside its range, or the named variable is not set.
    """

    def __init__(
        self,
        url: str,
        store: str,
        model: str | None = None,
        api: Api = "token_ids",
        concurrency: int = 16,
        timeout: float = 600.0,
        attempts: int = 6,
        api_key_env: str | None = None,
    ) -> None:
        super().__init__(store)
        if concurrency < 1 or attempts < 1 or not timeout > 0:
            raise ConfigError(
                "trajectories.concurrency and attempts must be 1 or more and timeout above 0, "
                f"found {concurrency}, {attempts} and {timeout}."
            )
        self.root = url.rstrip("/").removesuffix("/v1")
        self.model, self.api = model, api
        self.concurrency, self.timeout, self.attempts = concurrency, timeout, attempts
        self._headers = {}
        if api_key_env is not None:
            if api_key_env not in os.environ:
                raise ConfigError(f"The environment variable {api_key_env} (trajectories.api_key_env) is not set.")
            key = os.environ[api_key_env].strip()
            if not (key.isascii() and key.isprintable() and key):
                raise ConfigError(f"The environment variable {api_key_env} holds no key that a header can carry.")
            self._headers["Authorization"] = f"Bearer {key}"

    def generate(self, request: Request, prompts: list[list[int]]) -> Iterator[list[Trajectory]]:
        """Ask for every prompt.

        Raises:
            ServerError: if the server cannot be reached, refuses a request, or gives nothing that can be used.
        """
        if self.api == "text" and request.sampling.top_k:
            raise ServerError(
                "A server that returns text only takes no top_k: set rollout.top_k=0, or use "
                "trajectories.api=token_ids with vLLM or SGLang."
            )
        used, held = 0, list[Trajectory]()
        with _Line(self) as line:
            model = self.model or ("" if self.api == "sglang_generate" else self._only_model(line))
            try:
                for answers in line.answers(lambda prompt: self._ask(line, model, request, prompt), prompts):
                    kept = self._proven(request, answers)
                    used += len(kept)
                    held += kept
                    # Texts whose origin is still open are not handed on: what is handed on is kept for good.
                    if self.proven_by_tokens(request) or self.check_origin(request, kept):
                        yield held
                        held = []
            except ServerError:
                if held and self.check_origin(request, [], last=True):
                    yield held
                raise
        if held and self.check_origin(request, [], last=True):
            yield held
        if not used and not self.counts["reused"]:
            reasons = ", ".join(f"{reason}: {count}" for reason, count in self.counts.items() if count)
            raise ServerError(
                f"None of {len(prompts)} answers of {self.root} can be used ({reasons}). Use a server that returns "
                "token ids (vLLM or SGLang with trajectories.api=token_ids), or check that it serves this target."
            )

    def _ask(self, line: _Line, model: str, request: Request, prompt: list[int]) -> Trajectory | Unproven:
        try:
            if self.api == "sglang_generate":
                return from_generate(line.send("POST", "/generate", generate_body(request, prompt)), prompt, request)
            if self.api == "token_ids":
                body = completion_body(request, model, prompt, token_ids=True)
                return from_token_ids(line.send("POST", "/v1/completions", body), prompt, request)
            text = str(request.tokenizer.decode(prompt))
            if encode(request.tokenizer, text) != prompt:
                return Unproven("dropped, prompt does not tokenise back")
            body = completion_body(request, model, text, token_ids=False)
            return from_text(line.send("POST", "/v1/completions", body), prompt, request)
        except AnswerError as error:
            raise ServerError(f"{self.root} cannot be used: {error}.") from error

    def _proven(self, request: Request, answers: list[Trajectory | Unproven]) -> list[Trajectory]:
        """The answers whose tokens are sure; the others are counted by reason."""
        kept: list[Trajectory] = []
        for answer in answers:
            if isinstance(answer, Unproven):
                self.counts[answer.reason] += 1
            else:
                kept.append(answer)
        if not self.proven_by_tokens(request):
            return kept
        foreign = foreign_tokens(request.target, kept, request.sampling)
        if any(foreign):
            self.counts["dropped, not the target's tokens"] += sum(map(bool, foreign))
        return [text for text, wrong in zip(kept, foreign, strict=True) if not wrong]

    def proven_by_tokens(self, request: Request) -> bool:
        """Whether every token is compared with the target's own choice, so that the first few need no look."""
        return self.api == "text" and request.sampling.greedy

    def _only_model(self, line: _Line) -> str:
        answer = line.send("GET", "/v1/models", None)
        try:
            names = [str(model["id"]) for model in answer["data"]]
        except (KeyError, TypeError) as error:
            raise ServerError(f"{self.root}/v1/models lists no models: name one, trajectories.model=NAME.") from error
        if len(names) != 1:
            raise ServerError(f"{self.root} serves {', '.join(names) or 'no model'}: choose trajectories.model=NAME.")
        return names[0]


class _Line:
    """Connections to one server for one collection, in a ``with`` block that ends all of them.

    Raises:
        ServerError: if the address is none.
    """

    def __init__(self, server: ServerTrajectories) -> None:
        self.server = server
        self.over = threading.Event()
        most = httpx2.Limits(max_connections=server.concurrency, max_keepalive_connections=server.concurrency)
        patience = httpx2.Timeout(server.timeout, connect=min(10.0, server.timeout))
        try:
            self.client = httpx2.Client(base_url=server.root, headers=server._headers, limits=most, timeout=patience)
        except httpx2.InvalidURL as error:
            raise ServerError(f"{server.root} is no address: write trajectories.url=http://HOST:PORT.") from error

    def __enter__(self) -> _Line:
        return self

    def __exit__(self, *_: object) -> None:
        # What is still under way is of no use to anybody: its threads are left to end by themselves.
        self.over.set()
        self.client.close()

    def answers(
        self, ask: Callable[[list[int]], Trajectory | Unproven], prompts: list[list[int]]
    ) -> Iterator[list[Trajectory | Unproven]]:
        """All answers as they arrive; the first error ends it."""
        waiting: queue.SimpleQueue[list[int]] = queue.SimpleQueue()
        arrived: queue.SimpleQueue[Trajectory | Unproven | Exception] = queue.SimpleQueue()

        def work() -> None:
            while not self.over.is_set():
                try:
                    prompt = waiting.get_nowait()
                except queue.Empty:
                    return
                try:
                    arrived.put(ask(prompt))
                except Exception as error:
                    arrived.put(error)

        for prompt in prompts:
            waiting.put(prompt)
        for number in range(min(self.server.concurrency, len(prompts))):
            # Daemons: a pool's threads would keep the process alive until their last answer came.
            threading.Thread(target=work, name=f"server-{number}", daemon=True).start()
        missing = len(prompts)
        while missing:
            answers = [arrived.get()]
            while not arrived.empty():
                answers.append(arrived.get())
            missing -= len(answers)
            yield [answer for answer in answers if not isinstance(answer, Exception)]
            for answer in answers:
                if isinstance(answer, Exception):
                    raise answer

    def send(self, method: str, path: str, body: dict[str, Any] | None) -> Any:
        """The JSON object that the server answers, after as many tries as it takes.

        Raises:
            ServerError: if the server refuses, or every try failed.
        """
        retrying = tenacity.Retrying(
            stop=tenacity.stop_after_attempt(self.server.attempts) | tenacity.stop_when_event_set(self.over),
            retry=tenacity.retry_if_exception_type(_TransientError),
            wait=_pause,
            sleep=tenacity.sleep_using_event(self.over),
            before_sleep=lambda state: log.warning("%s%s: %s; trying again.", self.server.root, path, _failure(state)),
            reraise=True,
        )
        try:
            return retrying(self._try, method, path, body)
        except _TransientError as error:
            raise ServerError(
                f"{self.server.root}{path} failed {self.server.attempts} times, last with {error}. What it gave "
                f"before is kept in {self.server.store}: the same command goes on from there."
            ) from error

    def _try(self, method: str, path: str, body: dict[str, Any] | None) -> Any:
        where, deadline = self.server.root + path, time.monotonic() + self.server.timeout
        content = bytearray()
        try:
            with self.client.stream(method, path, json=body) as response:
                # Each read has its own time-out; an answer that drips on would never meet it.
                for part in response.iter_bytes():
                    content += part
                    if time.monotonic() > deadline:
                        raise _TransientError(f"no complete answer within {self.server.timeout:g} s")
                    if len(content) > MAX_BYTES:
                        raise ServerError(f"{where} sent more than {MAX_BYTES} bytes for one answer.")
        except (httpx2.UnsupportedProtocol, httpx2.InvalidURL) as error:
            raise ServerError(f"{self.server.root} is no address: write trajectories.url=http://HOST:PORT.") from error
        except httpx2.HTTPError as error:
            raise _TransientError(f"{type(error).__name__}: {error}") from error
        except RuntimeError as error:
            raise _TransientError("the connection was closed") from error
        status, text = response.status_code, content.decode("utf-8", "replace")
        if status in (408, 409, 425, 429) or status >= 500:
            raise _TransientError(f"status {status}", _seconds(response.headers.get("Retry-After")))
        if status in (401, 403):
            raise ServerError(
                f"{where} refuses the request ({status}): name its key's variable, trajectories.api_key_env."
            )
        if status != 200:
            raise ServerError(f"{where} refuses the request ({status}): {text[:300]}")
        try:
            return json.loads(text)
        except ValueError as error:
            raise _TransientError(f"an answer that is not JSON ({error})") from error


def _failure(state: tenacity.RetryCallState) -> BaseException | None:
    return state.outcome.exception() if state.outcome else None


def _pause(state: tenacity.RetryCallState) -> float:
    """Seconds before the next try: growing at random, and no less than the server asked for."""
    error = _failure(state)
    asked = error.pause if isinstance(error, _TransientError) else 0.0
    return max(min(asked, MAX_PAUSE), tenacity.wait_random_exponential(multiplier=0.5, max=MAX_PAUSE)(state))


def _seconds(value: str | None) -> float:
    """A ``Retry-After`` header given in seconds; 0 for any other."""
    return float(value) if value is not None and value.isdecimal() else 0.0
