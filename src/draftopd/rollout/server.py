"""Trajectories from a running engine with the OpenAI completions protocol: vLLM, SGLang, transformers.

vLLM and SGLang take prompts as token ids and return the token ids of responses (``return_token_ids``), which are used
unchanged. For a server that returns text only (``transformers serve``) prompts are sent as text and responses are
tokenised again. An answer whose tokens cannot be verified is counted and left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from draftopd.errors import ServerError
from draftopd.io.connection import Address, Connection
from draftopd.rollout.origin import foreign_tokens
from draftopd.rollout.request import Request, Trajectory
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
from draftopd.rollout.trajectories import GeneratedTrajectories

Api = Literal["token_ids", "text", "sglang_generate"]


class ServerTrajectories(GeneratedTrajectories):
    """Texts of a running server.

    Args:
        url, concurrency, timeout, attempts, api_key_env: see :class:`~draftopd.io.connection.Address`.
        store: directory of the texts; those of an interrupted collection are kept there.
        model: the model's name on the server; None takes the only one.
        api: ``token_ids`` for vLLM and SGLang; ``text`` for servers that return text only; ``sglang_generate`` for the
            native endpoint of SGLang releases without ``return_token_ids``.

    Raises:
        ConfigError: see :class:`~draftopd.io.connection.Address`.
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
        kept = f" The earlier answers are kept in {store}: the same command goes on from there."
        self.address = Address(url, "trajectories", concurrency, timeout, attempts, api_key_env, kept)
        self.model, self.api = model, api

    def generate(self, request: Request, prompts: list[list[int]]) -> Iterator[list[Trajectory]]:
        """Request a text for every prompt.

        Raises:
            ServerError: if the server cannot be reached, refuses a request, or gives no usable answer.
        """
        if self.api == "text" and request.rules.sampling.top_k:
            raise ServerError(
                "A server that returns text only does not take top_k: set top_k=0, or use trajectories.api=token_ids "
                "with vLLM or SGLang."
            )
        used, held = 0, list[Trajectory]()
        with Connection(self.address) as server:
            model = self.model or ("" if self.api == "sglang_generate" else server.only_model())
            try:
                for answers in server.answers(lambda prompt: self._ask(server, model, request, prompt), prompts):
                    kept = self._proven(request, answers)
                    used += len(kept)
                    held += kept
                    # Texts are stored once yielded, so they are held back until their origin is checked.
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
                f"None of {len(prompts)} answers of {self.address.root} can be used ({reasons}). Use a server that "
                "returns token ids (vLLM or SGLang with trajectories.api=token_ids), or check that it serves this "
                "target."
            )

    def _ask(self, server: Connection, model: str, request: Request, prompt: list[int]) -> Trajectory | Unproven:
        try:
            if self.api == "sglang_generate":
                return from_generate(server.send("POST", "/generate", generate_body(request, prompt)), prompt, request)
            if self.api == "token_ids":
                body = completion_body(request, model, prompt, token_ids=True)
                return from_token_ids(server.send("POST", "/v1/completions", body), prompt, request)
            text = str(request.tokenizer.decode(prompt))
            if encode(request.tokenizer, text) != prompt:
                return Unproven("dropped, prompt does not tokenise back")
            body = completion_body(request, model, text, token_ids=False)
            return from_text(server.send("POST", "/v1/completions", body), prompt, request)
        except AnswerError as error:
            raise ServerError(
                f"{self.address.root} cannot be used: {error}. Check trajectories.url and trajectories.api."
            ) from error

    def _proven(self, request: Request, answers: list[Trajectory | Unproven]) -> list[Trajectory]:
        """The answers whose tokens are verified; the others are counted by reason."""
        kept: list[Trajectory] = []
        for answer in answers:
            if isinstance(answer, Unproven):
                self.counts[answer.reason] += 1
            else:
                kept.append(answer)
        if not self.proven_by_tokens(request):
            return kept
        foreign = foreign_tokens(request.target, kept, request.rules.sampling)
        if any(foreign):
            self.counts["dropped, not the target's tokens"] += sum(map(bool, foreign))
        return [text for text, wrong in zip(kept, foreign, strict=True) if not wrong]

    def proven_by_tokens(self, request: Request) -> bool:
        """Whether every token is compared with the target's own choice, which replaces the check of the origin."""
        return self.api == "text" and request.rules.sampling.greedy
