"""Connections to a running engine: requests under way at once, tries with growing pauses, answers as they arrive."""

from __future__ import annotations

import logging
import os
import queue
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import httpx2
import tenacity

from draftopd.errors import ConfigError, ServerError
from draftopd.io.json_text import is_text, listed, parse_json, shown

log = logging.getLogger(__name__)

#: An answer longer than this is cut off: none of ours is.
MAX_BYTES = 64 * 2**20

#: Longest pause between two tries, in seconds.
MAX_PAUSE = 30.0

Asked = TypeVar("Asked")
Answer = TypeVar("Answer")


class _TransientError(Exception):
    """What may go better the next time; ``pause`` seconds where the server said so."""

    def __init__(self, message: str, pause: float = 0.0) -> None:
        super().__init__(message)
        self.pause = pause


class Address:
    """Where a server is and how it is asked.

    Args:
        url: the server's address, with or without ``/v1``.
        group: the configuration group that errors point to.
        concurrency: requests under way at once.
        timeout: seconds until one answer must be complete.
        attempts: tries for one request, with growing pauses between them.
        api_key_env: name of the environment variable that holds the server's key.
        after_failure: what the user is told of what came before a failure.

    Raises:
        ConfigError: if a number lies outside its range, the address holds a password, or the named variable is not
            set.
    """

    def __init__(
        self,
        url: str,
        group: str,
        concurrency: int = 16,
        timeout: float = 600.0,
        attempts: int = 6,
        api_key_env: str | None = None,
        after_failure: str = "",
    ) -> None:
        if concurrency < 1 or attempts < 1 or not timeout > 0:
            raise ConfigError(
                f"{group}.concurrency and attempts must be 1 or more and timeout above 0, "
                f"found {concurrency}, {attempts} and {timeout}."
            )
        if has_password(url):
            raise ConfigError(
                f"{group}.url holds a user or password, which logs and records would show: leave it out, and name the "
                f"environment variable of a key with {group}.api_key_env."
            )
        self.root, self.group = url.rstrip("/").removesuffix("/v1"), group
        self.concurrency, self.timeout, self.attempts = concurrency, timeout, attempts
        self.after_failure = after_failure
        self.headers: dict[str, str] = {}
        self._key = ""
        if api_key_env is not None:
            if api_key_env not in os.environ:
                # What looks like no variable's name may be the key itself: it is not repeated.
                name = api_key_env if re.fullmatch("[A-Z_][A-Z0-9_]*", api_key_env) else "that it names"
                raise ConfigError(
                    f"The environment variable {name} ({group}.api_key_env) is not set: give the variable's name, not "
                    "the key, and set it."
                )
            self._key = os.environ[api_key_env].strip()
            if not (self._key.isascii() and self._key.isprintable() and self._key):
                raise ConfigError(f"The environment variable {api_key_env} holds no key that a header can carry.")
            self.headers["Authorization"] = f"Bearer {self._key}"

    def quote(self, text: str) -> str:
        """What the server said, for one line of a message: without the key, should it have sent that back."""
        return shown(text.replace(self._key, "[key]") if self._key else text)


def has_password(url: str) -> bool:
    """Whether an address carries a user or password."""
    return "@" in re.split("[/?#]", url.partition("://")[2])[0]


class Line:
    """Connections to one server for one collection, in a ``with`` block that ends all of them.

    Raises:
        ServerError: if the address is none.
    """

    def __init__(self, address: Address) -> None:
        self.address = address
        self.over = threading.Event()
        most = httpx2.Limits(max_connections=address.concurrency, max_keepalive_connections=address.concurrency)
        patience = httpx2.Timeout(address.timeout, connect=min(10.0, address.timeout))
        try:
            self.client = httpx2.Client(base_url=address.root, headers=address.headers, limits=most, timeout=patience)
        except httpx2.InvalidURL as error:
            raise self._no_address() from error

    def __enter__(self) -> Line:
        return self

    def __exit__(self, *_: object) -> None:
        # What is still under way is of no use to anybody: its threads are left to end by themselves.
        self.over.set()
        self.client.close()

    def _no_address(self) -> ServerError:
        return ServerError(
            f"{shown(self.address.root)} is no address: write {self.address.group}.url=http://HOST:PORT."
        )

    def only_model(self) -> str:
        """The name of the only model served.

        Raises:
            ServerError: if there is none, or several.
        """
        root, group = self.address.root, self.address.group
        answer = self.send("GET", "/v1/models")
        try:
            names = [model["id"] for model in answer["data"]]
        except (KeyError, TypeError) as error:
            raise ServerError(f"{root}/v1/models lists no models: name one, {group}.model=NAME.") from error
        if not all(map(is_text, names)):
            raise ServerError(f"{root}/v1/models lists no models: name one, {group}.model=NAME.")
        if len(names) != 1:
            raise ServerError(f"{root} serves {listed(names) if names else 'no model'}: choose {group}.model=NAME.")
        return str(names[0])

    def answers(self, ask: Callable[[Asked], Answer], prompts: Sequence[Asked]) -> Iterator[list[Answer]]:
        """All answers as they arrive; the first error ends it."""
        waiting: queue.SimpleQueue[Asked] = queue.SimpleQueue()
        arrived: queue.SimpleQueue[Answer | Exception] = queue.SimpleQueue()

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
        for number in range(min(self.address.concurrency, len(prompts))):
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

    def send(
        self, method: str, path: str, body: dict[str, Any] | None = None, read: Callable[[str], Any] = parse_json
    ) -> Any:
        """What the server answers, read as JSON unless told otherwise, after as many tries as it takes.

        Raises:
            ServerError: if the server refuses, or every try failed.
        """
        retrying = tenacity.Retrying(
            stop=tenacity.stop_after_attempt(self.address.attempts) | tenacity.stop_when_event_set(self.over),
            retry=tenacity.retry_if_exception_type(_TransientError),
            wait=_pause,
            sleep=tenacity.sleep_using_event(self.over),
            before_sleep=lambda state: log.warning("%s%s: %s; trying again.", self.address.root, path, _failure(state)),
            reraise=True,
        )
        try:
            return retrying(self._try, method, path, body, read)
        except _TransientError as error:
            raise ServerError(
                f"{self.address.root}{path} failed {self.address.attempts} times, last with {error}. Look into the "
                f"server's log, and at {self.address.group}.url.{self.address.after_failure}"
            ) from error

    def _try(self, method: str, path: str, body: dict[str, Any] | None, read: Callable[[str], Any]) -> Any:
        where, deadline = self.address.root + path, time.monotonic() + self.address.timeout
        content = bytearray()
        try:
            with self.client.stream(method, path, json=body) as response:
                # Each read has its own time-out; an answer that drips on would never meet it.
                for part in response.iter_bytes():
                    content += part
                    if time.monotonic() > deadline:
                        raise _TransientError(f"no complete answer within {self.address.timeout:g} s")
                    if len(content) > MAX_BYTES:
                        raise ServerError(
                            f"{where} sent more than {MAX_BYTES} bytes for one answer: check that "
                            f"{self.address.group}.url is an engine's address."
                        )
        except (httpx2.UnsupportedProtocol, httpx2.InvalidURL) as error:
            raise self._no_address() from error
        except httpx2.HTTPError as error:
            raise _TransientError(f"{type(error).__name__}: {self.address.quote(str(error))}") from error
        except RuntimeError as error:
            raise _TransientError("the connection was closed") from error
        status, text = response.status_code, content.decode("utf-8", "replace")
        if status in (408, 409, 425, 429) or status >= 500:
            raise _TransientError(f"status {status}", _seconds(response.headers.get("Retry-After")))
        if status in (401, 403):
            raise ServerError(
                f"{where} refuses the request ({status}): name its key's variable, {self.address.group}.api_key_env."
            )
        if status != 200:
            raise ServerError(
                f"{where} refuses the request ({status}): {self.address.quote(text) or 'no reason given'} (check "
                f"{self.address.group}.url, and what the server was started with)"
            )
        try:
            return read(text)
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
