"""HTTP connections to a running engine: concurrent requests, retries with growing pauses, answers as they arrive."""

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

#: An answer with more bytes than this is refused; the expected answers are far shorter.
MAX_BYTES = 64 * 2**20

#: Longest pause between two attempts, in seconds.
MAX_PAUSE = 30.0

Item = TypeVar("Item")
Answer = TypeVar("Answer")


class _TransientError(Exception):
    """A failure worth another attempt, after at least ``pause`` seconds."""

    def __init__(self, message: str, pause: float = 0.0) -> None:
        super().__init__(message)
        self.pause = pause


class Address:
    """The address of a server and the options of its requests.

    Args:
        url: the server's address, with or without ``/v1``.
        group: the configuration group that error messages name.
        concurrency: maximum number of simultaneous requests.
        timeout: seconds within which an answer must be complete.
        attempts: maximum number of attempts per request, with growing pauses between them.
        api_key_env: name of the environment variable that holds the server's key.
        after_failure: sentence that ends the message of a request whose attempts all failed.

    Raises:
        ConfigError: if a number lies outside its range, the address has a user or password, or the environment
            variable is not set.
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
        if "@" in re.split("[/?#]", url.partition("://")[2])[0]:
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
                # A value that does not look like a variable's name may be the key itself and is not repeated.
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
        """A server's text for one line of a message, with the key replaced in case the server repeated it."""
        return shown(text.replace(self._key, "[key]") if self._key else text)


class Connection:
    """A pool of connections to one server, used as a context manager; leaving the block closes all of them.

    Raises:
        ServerError: if the address is not a valid URL.
    """

    def __init__(self, address: Address) -> None:
        self.address = address
        self.closed = threading.Event()
        limits = httpx2.Limits(max_connections=address.concurrency, max_keepalive_connections=address.concurrency)
        timeout = httpx2.Timeout(address.timeout, connect=min(10.0, address.timeout))
        try:
            self.client = httpx2.Client(base_url=address.root, headers=address.headers, limits=limits, timeout=timeout)
        except httpx2.InvalidURL as error:
            raise self._invalid_address() from error

    def __enter__(self) -> Connection:
        return self

    def __exit__(self, *_: object) -> None:
        # The answers of unfinished requests are not needed: their threads end by themselves.
        self.closed.set()
        self.client.close()

    def _invalid_address(self) -> ServerError:
        return ServerError(
            f"{shown(self.address.root)} is not an address: write {self.address.group}.url=http://HOST:PORT."
        )

    def only_model(self) -> str:
        """The name of the server's only model.

        Raises:
            ServerError: if the server has no model or several.
        """
        root, group = self.address.root, self.address.group
        answer = self.send("GET", "/v1/models")
        try:
            names = [model["id"] for model in answer["data"]]
        except (KeyError, TypeError):
            names = [None]
        if not all(map(is_text, names)):
            raise ServerError(f"{root}/v1/models lists no models: name one, {group}.model=NAME.")
        if len(names) != 1:
            raise ServerError(f"{root} serves {listed(names) if names else 'no model'}: choose {group}.model=NAME.")
        return str(names[0])

    def answers(self, ask: Callable[[Item], Answer], items: Sequence[Item]) -> Iterator[list[Answer]]:
        """Call ``ask`` on every item, concurrently; yields the answers as they arrive and raises the first error."""
        waiting: queue.SimpleQueue[Item] = queue.SimpleQueue()
        arrived: queue.SimpleQueue[Answer | Exception] = queue.SimpleQueue()

        def work() -> None:
            while not self.closed.is_set():
                try:
                    item = waiting.get_nowait()
                except queue.Empty:
                    return
                try:
                    arrived.put(ask(item))
                except Exception as error:
                    arrived.put(error)

        for item in items:
            waiting.put(item)
        for number in range(min(self.address.concurrency, len(items))):
            # Daemon threads, because the threads of an executor keep the process alive until their last answer.
            threading.Thread(target=work, name=f"server-{number}", daemon=True).start()
        missing = len(items)
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
        """Send a request, repeatedly where it fails, and return the answer as ``read`` parses it.

        Raises:
            ServerError: if the server refuses the request, or every attempt failed.
        """
        retrying = tenacity.Retrying(
            stop=tenacity.stop_after_attempt(self.address.attempts) | tenacity.stop_when_event_set(self.closed),
            retry=tenacity.retry_if_exception_type(_TransientError),
            wait=_pause,
            sleep=tenacity.sleep_using_event(self.closed),
            before_sleep=lambda state: log.warning("%s%s: %s; trying again.", self.address.root, path, _failure(state)),
            reraise=True,
        )
        try:
            return retrying(self._try, method, path, body, read)
        except _TransientError as error:
            raise ServerError(
                f"{self.address.root}{path} failed {self.address.attempts} times, last with {error}. Check the "
                f"server's log and {self.address.group}.url.{self.address.after_failure}"
            ) from error

    def _try(self, method: str, path: str, body: dict[str, Any] | None, read: Callable[[str], Any]) -> Any:
        where, deadline = self.address.root + path, time.monotonic() + self.address.timeout
        content = bytearray()
        try:
            with self.client.stream(method, path, json=body) as response:
                # The client's time-out is per read and would not end an answer that arrives slowly.
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
            raise self._invalid_address() from error
        except httpx2.HTTPError as error:
            raise _TransientError(f"{type(error).__name__}: {self.address.quote(str(error))}") from error
        except RuntimeError as error:
            raise _TransientError("the connection was closed") from error
        status, text = response.status_code, content.decode("utf-8", "replace")
        if status in (408, 409, 425, 429) or status >= 500:
            after = response.headers.get("Retry-After", "")
            raise _TransientError(f"status {status}", float(after) if after.isdecimal() else 0.0)
        if status in (401, 403):
            raise ServerError(
                f"{where} refuses the request ({status}): set {self.address.group}.api_key_env to the name of its "
                "key's variable."
            )
        if status != 200:
            raise ServerError(
                f"{where} refuses the request ({status}): {self.address.quote(text) or 'no reason given'} (check "
                f"{self.address.group}.url and the options of the server)"
            )
        try:
            return read(text)
        except ValueError as error:
            raise _TransientError(f"an answer that is not JSON ({error})") from error


def _failure(state: tenacity.RetryCallState) -> BaseException | None:
    return state.outcome.exception() if state.outcome else None


def _pause(state: tenacity.RetryCallState) -> float:
    """Seconds before the next attempt: random and growing, and at least the pause that the server requested."""
    error = _failure(state)
    requested = error.pause if isinstance(error, _TransientError) else 0.0
    return max(min(requested, MAX_PAUSE), tenacity.wait_random_exponential(multiplier=0.5, max=MAX_PAUSE)(state))
