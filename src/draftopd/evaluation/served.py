"""Evaluate a running vLLM or SGLang server with its own speculative decoding, at several concurrencies.

Acceptance is read from vLLM's counters at ``/metrics``, or from SGLang's count of verifications in each answer of
``/generate``. A second server without speculation gives the speedup, and the texts to compare with.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console
from rich.table import Table

from draftopd.decoding.rules import Rules
from draftopd.errors import ConfigError, ServerError
from draftopd.evaluation.report import markdown
from draftopd.evaluation.store import finite
from draftopd.io.connection import Address, Connection
from draftopd.io.files import replaced, write_json
from draftopd.io.json_text import whole
from draftopd.rollout.server_answers import completion_body, generate_body

#: Format version of ``served.json``.
FORMAT = 1

HEADINGS = (
    "benchmark", "concurrency", "tau", "tokens/s", "plain tokens/s", "speedup", "median latency", "equal to plain",
)  # fmt: skip

#: vLLM's counters; the last one by block position.
DRAFTS = "vllm:spec_decode_num_drafts"
ACCEPTED = "vllm:spec_decode_num_accepted_tokens"
BY_POSITION = "vllm:spec_decode_num_accepted_tokens_per_pos"


@dataclass(frozen=True)
class Asking:
    """Decoding rules and seed of every request."""

    rules: Rules
    seed: int = 0


@dataclass(frozen=True)
class Answered:
    """One response: its token ids if the server gives them, their number, seconds, and verifications if given."""

    tokens: tuple[int, ...]
    count: int
    seconds: float
    verifications: int | None = None


@dataclass(frozen=True)
class Served:
    """Figures of one concurrency; None for figures that the servers do not give.

    ``tokens_per_second`` is of all requests together; ``latency`` is the median seconds per request; ``tau`` leaves out
    the token of the prefill; ``acceptance_by_position`` is the accepted fraction of the proposals tested there.
    ``equal`` of the ``compared`` texts are the plain server's.
    """

    benchmark: str
    concurrency: int
    prompts: int
    tokens_per_second: float
    latency: float
    tau: float | None
    acceptance_by_position: list[float] | None
    plain_tokens_per_second: float | None = None
    equal: int | None = None
    compared: int | None = None
    most_differing: float = 0.0

    @property
    def lossless(self) -> bool | None:
        """Whether at most the tolerated fraction of texts differs from the plain server's; None if not compared."""
        if self.compared is None or self.equal is None:
            return None
        return self.compared - self.equal <= self.most_differing * self.compared

    @property
    def speedup(self) -> float | None:
        """Speedup over the plain server at the same concurrency; None without one, or if not lossless."""
        if self.plain_tokens_per_second is None or self.lossless is False:
            return None
        return self.tokens_per_second / self.plain_tokens_per_second

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"speedup": self.speedup, "lossless": self.lossless}


class ServerEngine:
    """A server to evaluate.

    Args:
        url: of the server with speculative decoding.
        plain_url: of the same target served without speculation; None gives no speedup.
        model, plain_model: names to ask for; None takes the only one served.
        api: ``token_ids``: the OpenAI completions protocol with token ids (vLLM and recent SGLang);
            ``sglang_generate``: SGLang's own endpoint, which counts verifications.
        concurrency: numbers of simultaneous requests, with one measurement for each.
        most_differing: maximum fraction of texts that may differ from the plain server's, for ties in low precision.
        timeout, attempts, api_key_env: see :class:`Address`.

    Raises:
        ConfigError: if a concurrency is below 1, or ``most_differing`` outside 0 to 1.
    """

    def __init__(
        self,
        url: str,
        plain_url: str | None = None,
        model: str | None = None,
        plain_model: str | None = None,
        api: Literal["token_ids", "sglang_generate"] = "token_ids",
        concurrency: Sequence[int] = (1, 2, 4, 8, 16),
        most_differing: float = 0.0,
        timeout: float = 600.0,
        attempts: int = 3,
        api_key_env: str | None = None,
    ) -> None:
        if not concurrency or min(concurrency) < 1:
            raise ConfigError(f"engine.concurrency must list numbers of 1 or more, found {list(concurrency)}.")
        if not 0 <= most_differing <= 1:
            raise ConfigError(f"engine.most_differing must lie in 0 to 1, found {most_differing}.")
        self.concurrency, self.api, self.most_differing = tuple(concurrency), api, most_differing

        def address(where: str) -> Address:
            return Address(where, "engine", max(concurrency), timeout, attempts, api_key_env)

        self.drafted = _Server(address(url), model, api)
        self.plain = None if plain_url is None else _Server(address(plain_url), plain_model, api)

    def evaluate(
        self,
        benchmark: str,
        prompts: Sequence[list[int]],
        asking: Asking,
        advance: Callable[[int, int], None] = lambda prompts, tokens: None,
    ) -> list[Served]:
        """Warm each server up with all prompts, then measure it at each concurrency, the servers in turns.

        Raises:
            ServerError: if a server cannot be reached or refuses a request.
        """
        servers = [self.drafted] if self.plain is None else [self.drafted, self.plain]
        for server in servers:
            server.ask(prompts, asking, max(self.concurrency))
        found = []
        for number, concurrency in enumerate(self.concurrency):
            measured = {}
            for server in servers if number % 2 == 0 else servers[::-1]:
                before = server.counters()
                began = time.perf_counter()
                answers = server.ask(prompts, asking, concurrency)
                measured[server] = _Measured(answers, time.perf_counter() - began, before, server.counters())
            found.append(self._served(benchmark, concurrency, measured, asking))
            advance(len(prompts), sum(a.count for m in measured.values() for a in m.answers))
        return found

    def _served(self, benchmark: str, concurrency: int, measured: dict[_Server, _Measured], asking: Asking) -> Served:
        own = measured[self.drafted]
        latency = statistics.median(a.seconds for a in own.answers)
        served = Served(
            benchmark, concurrency, len(own.answers), own.rate, latency, own.tau(), own.acceptance_by_position()
        )
        if self.plain is None:
            return served
        plain = measured[self.plain]
        pairs = [(a.tokens, b.tokens) for a, b in zip(own.answers, plain.answers, strict=True) if a.tokens and b.tokens]
        compared = len(pairs) if asking.rules.sampling.greedy and pairs else None
        equal = sum(a == b for a, b in pairs) if compared else None
        return replace(
            served,
            plain_tokens_per_second=plain.rate,
            equal=equal,
            compared=compared,
            most_differing=self.most_differing,
        )


@dataclass(frozen=True)
class _Measured:
    """A round of requests to one server, and its counters before and after."""

    answers: list[Answered]
    seconds: float
    before: dict[tuple[str, str], float]
    after: dict[tuple[str, str], float]

    @property
    def rate(self) -> float:
        return sum(a.count for a in self.answers) / self.seconds

    def counted(self, name: str, position: str = "") -> float | None:
        key = name, position
        if key not in self.after:
            return None
        counted = self.after[key] - self.before.get(key, 0.0)
        return counted if counted >= 0 else None  # the server was restarted if it counts fewer than before

    def tau(self) -> float | None:
        """Tokens per verification, from the counters or else from the answers' own counts."""
        drafts, accepted = self.counted(DRAFTS), self.counted(ACCEPTED)
        if drafts and accepted is not None:
            return 1 + accepted / drafts
        told = [(a.count - 1, a.verifications) for a in self.answers if a.verifications]
        return sum(count for count, _ in told) / sum(v for _, v in told if v) if told else None

    def acceptance_by_position(self) -> list[float] | None:
        reached = self.counted(DRAFTS)
        rates: list[float] = []
        while reached and (accepted := self.counted(BY_POSITION, str(len(rates)))) is not None:
            rates.append(accepted / reached)
            reached = accepted
        return rates or None


class _Server:
    def __init__(self, address: Address, model: str | None, api: str) -> None:
        self.address, self.model, self.api = address, model, api

    def ask(self, prompts: Sequence[list[int]], asking: Asking, concurrency: int) -> list[Answered]:
        """The answers, in the order of the prompts."""
        self.address.concurrency = concurrency
        with Connection(self.address) as connection:
            if self.model is None and self.api == "token_ids":
                self.model = connection.only_model()
            found: dict[int, Answered] = {}

            def one(index: int) -> tuple[int, Answered]:
                began = time.perf_counter()
                if self.api == "sglang_generate":
                    answer = connection.send("POST", "/generate", generate_body(asking, prompts[index]))
                else:
                    body = completion_body(asking, self.model or "", prompts[index], token_ids=True)
                    answer = connection.send("POST", "/v1/completions", body)
                return index, self._read(answer, asking.rules.max_new_tokens, time.perf_counter() - began)

            for answers in connection.answers(one, range(len(prompts))):
                found |= dict(answers)
        return [found[index] for index in range(len(prompts))]

    def counters(self) -> dict[tuple[str, str], float]:
        """vLLM's counters of speculative decoding by name and position, summed over its engines; empty if none."""
        totals: dict[tuple[str, str], float] = {}
        with Connection(self.address) as connection:
            try:
                text = connection.send("GET", "/metrics", read=str)
            except ServerError:
                return totals  # the server has no metrics
        try:
            samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
        except ValueError:
            return totals  # the page is not in the format of metrics
        for sample in samples:
            name = sample.name.removesuffix("_total")
            if math.isfinite(sample.value) and name in (DRAFTS, ACCEPTED, BY_POSITION):
                key = name, sample.labels.get("position", "")
                totals[key] = totals.get(key, 0.0) + sample.value
        return totals

    def _read(self, answer: Any, max_tokens: int, seconds: float) -> Answered:
        verifications = None
        try:
            if self.api == "sglang_generate":
                ids, meta = answer["output_ids"], answer["meta_info"]
                count = whole(meta["completion_tokens"])
                if meta.get("spec_verify_ct") is not None:
                    verifications = whole(meta["spec_verify_ct"])
            else:
                ids = answer["choices"][0].get("token_ids") or []
                count = whole((answer.get("usage") or {}).get("completion_tokens") or len(ids))
            tokens = tuple(map(whole, ids))
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            raise ServerError(f"{self.address.root} answers without {error}: is it vLLM or SGLang?") from error
        # The token that ended the text may be left out, and a last verification may have given no token.
        plausible = 0 <= count <= max_tokens and not (tokens and count - len(tokens) not in (0, 1))
        if not plausible or not 0 <= (verifications or 0) <= count + 1:
            raise ServerError(
                f"{self.address.root} counts {count} tokens and {verifications or 'no'} verifications, but gives "
                f"{len(tokens)} of at most {max_tokens}: is it vLLM or SGLang, and reached directly?"
            )
        return Answered(tokens, count, seconds, verifications)


def rows(found: Sequence[Served]) -> list[list[str]]:
    """The table's cells, one row per benchmark and concurrency."""

    def number(value: float | None, digits: int) -> str:
        return "-" if value is None else f"{value:.{digits}f}"

    return [
        [
            s.benchmark, str(s.concurrency), number(s.tau, 2), number(s.tokens_per_second, 0),
            number(s.plain_tokens_per_second, 0),
            "none" if s.lossless is False else "-" if s.speedup is None else f"{s.speedup:.2f}x",
            f"{s.latency:.2f} s", "-" if s.compared is None else f"{s.equal} of {s.compared}",
        ]
        for s in found
    ]  # fmt: skip


def print_served(found: Sequence[Served], console: Console | None = None) -> None:
    """Print the table."""
    table = Table(title="Served", title_justify="left")
    for heading in HEADINGS:
        table.add_column(heading, overflow="fold")
    for row in rows(found):
        table.add_row(*row)
    (console or Console()).print(table)


def write_served(found: Sequence[Served], directory: Path, record: dict[str, Any]) -> None:
    """Write ``served.json``, with ``record`` (what was evaluated, with which versions), and ``table.md``."""
    content = finite({**record, "served": [s.as_dict() for s in found]})
    write_json(directory / "served.json", content, FORMAT)
    with replaced(directory / "table.md") as partial:
        partial.write_text(markdown(HEADINGS, rows(found)), encoding="utf-8")
