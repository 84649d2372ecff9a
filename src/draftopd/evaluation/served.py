"""Evaluate a running vLLM or SGLang server with its own speculative decoding, at several concurrencies.

Acceptance is read off what the engine tells: vLLM's counters at ``/metrics``, or SGLang's own count of verifications in
each answer of ``/generate``. A second server without speculation gives the speedup, and the texts to compare with.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from prometheus_client.parser import text_string_to_metric_families

from draftopd.decoding.rules import Rules
from draftopd.errors import ConfigError, ServerError
from draftopd.io.connection import Address, Connection
from draftopd.io.json_text import whole
from draftopd.rollout.server_answers import completion_body, generate_body

#: vLLM's counters; the last by block position.
DRAFTS = "vllm:spec_decode_num_drafts"
ACCEPTED = "vllm:spec_decode_num_accepted_tokens"
BY_POSITION = "vllm:spec_decode_num_accepted_tokens_per_pos"


@dataclass(frozen=True)
class Asking:
    """What every request asks for."""

    rules: Rules
    seed: int = 0


@dataclass(frozen=True)
class Answered:
    """One response: its token ids where the server gave them, their number, its seconds, its verifications if told."""

    tokens: tuple[int, ...]
    count: int
    seconds: float
    verifications: int | None = None


@dataclass(frozen=True)
class Served:
    """Figures of one concurrency; None for what the servers do not tell.

    ``tokens_per_second`` of all requests together; ``latency`` is the median seconds of a request; ``tau`` counts the
    token of the prefill out; ``acceptance_by_position`` is of the proposals tested there. ``equal`` texts of
    ``compared`` are those of the plain server.
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
        """Whether no more texts differ from the plain server's than are tolerated; None where not compared."""
        if self.compared is None or self.equal is None:
            return None
        return self.compared - self.equal <= self.most_differing * self.compared

    @property
    def speedup(self) -> float | None:
        """Over the plain server at the same concurrency; None without one, and where texts differ."""
        if self.plain_tokens_per_second is None or self.lossless is False:
            return None
        return self.tokens_per_second / self.plain_tokens_per_second

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"speedup": self.speedup, "lossless": self.lossless}


class ServerEngine:
    """A server to evaluate.

    Args:
        url: of the server with speculative decoding.
        plain_url: of the same target served without; None gives no speedup.
        model, plain_model: names to ask for; None takes the only one served.
        api: ``token_ids``: the OpenAI completions protocol with token ids, vLLM and recent SGLang;
            ``sglang_generate``: SGLang's own endpoint, which counts verifications.
        concurrency: how many requests are under way at once, one measurement each.
        most_differing: share of texts that may differ from the plain server's, as ties in low precision make them.
        timeout, attempts, api_key_env: see :class:`Address`.

    Raises:
        ConfigError: if a concurrency is below 1, or the share outside 0 to 1.
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
        """Ask for every prompt at each concurrency, the servers in turns, and before that once unmeasured.

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
        served = Served(
            benchmark=benchmark,
            concurrency=concurrency,
            prompts=len(own.answers),
            tokens_per_second=own.rate,
            latency=statistics.median(a.seconds for a in own.answers),
            tau=own.tau(),
            acceptance_by_position=own.acceptance_by_position(),
        )
        if self.plain is None:
            return served
        plain = measured[self.plain]
        pairs = [(a.tokens, b.tokens) for a, b in zip(own.answers, plain.answers, strict=True) if a.tokens and b.tokens]
        compared = len(pairs) if asking.rules.sampling.greedy and pairs else None
        equal = sum(a == b for a, b in pairs) if compared else None
        return Served(
            **asdict(served)
            | {
                "plain_tokens_per_second": plain.rate,
                "equal": equal,
                "compared": compared,
                "most_differing": self.most_differing,
            }
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
        return counted if counted >= 0 else None  # less than before: it was started anew

    def tau(self) -> float | None:
        """Tokens a verification yields, by the counters, else by the answers' own counts."""
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
        """The answers, in the prompts' order."""
        address = self.address
        address.concurrency = concurrency
        with Connection(address) as connection:
            if self.model is None and self.api == "token_ids":
                self.model = connection.only_model()
            found: dict[int, Answered] = {}

            def one(place: int) -> tuple[int, Answered]:
                began = time.perf_counter()
                if self.api == "sglang_generate":
                    answer = connection.send("POST", "/generate", generate_body(asking, prompts[place]))
                else:
                    body = completion_body(asking, self.model or "", prompts[place], token_ids=True)
                    answer = connection.send("POST", "/v1/completions", body)
                return place, self._read(answer, asking.rules.max_new_tokens, time.perf_counter() - began)

            for answers in connection.answers(one, range(len(prompts))):
                found |= dict(answers)
        return [found[place] for place in range(len(prompts))]

    def counters(self) -> dict[tuple[str, str], float]:
        """vLLM's counters of speculative decoding, over all engines: by name and position."""
        totals: dict[tuple[str, str], float] = {}
        with Connection(self.address) as connection:
            try:
                text = connection.send("GET", "/metrics", read=str)
            except ServerError:
                return totals  # a server without metrics says less
        try:
            samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
        except ValueError:
            return totals  # another page than the engines'
        for sample in samples:
            name = sample.name.removesuffix("_total")
            if math.isfinite(sample.value) and name in (DRAFTS, ACCEPTED, BY_POSITION):
                key = name, sample.labels.get("position", "")
                totals[key] = totals.get(key, 0.0) + sample.value
        return totals

    def _read(self, answer: Any, most: int, seconds: float) -> Answered:
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
        # A token may be left out that ended the text, and a verification begun that nobody needed any more.
        told = 0 <= count <= most and not (tokens and count - len(tokens) not in (0, 1))
        if not told or not 0 <= (verifications or 0) <= count + 1:
            raise ServerError(
                f"{self.address.root} counts {count} tokens in {verifications or 'untold'} verifications, but gives "
                f"{len(tokens)} of at most {most}: is it vLLM or SGLang, and reached without detours?"
            )
        return Answered(tokens, count, seconds, verifications)
