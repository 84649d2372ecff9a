"""Trajectories from a running engine that speaks the OpenAI completions protocol: vLLM, SGLang, transformers.

vLLM and SGLang take prompts as token ids and return the response's own (``return_token_ids``): these are
used as they are. A server that returns text only (``transformers serve``) is asked in text, and its answer is
tokenised again; an answer whose tokens cannot be proven is counted and left out, never used.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from draftopd.errors import ServerError
from draftopd.io.connection import Address, Line
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
        kept = f" What it gave before is kept in {store}: the same command goes on from there."
        self.address = Address(url, "trajectories", concurrency, timeout, attempts, api_key_env, kept)
        self.model, self.api = model, api

    @property
    def root(self) -> str:
        return self.address.root

    def generate(self, request: Request, prompts: list[list[int]]) -> Iterator[list[Trajectory]]:
        """Ask for every prompt.

        Raises:
            ServerError: if the server cannot be reached, refuses a request, or gives nothing that can be used.
        """
        if self.api == "text" and request.rules.sampling.top_k:
            raise ServerError(
                "A server that returns text only takes no top_k: set rollout.top_k=0, or use "
                "trajectories.api=token_ids with vLLM or SGLang."
            )
        used, held = 0, list[Trajectory]()
        with Line(self.address) as line:
            model = self.model or ("" if self.api == "sglang_generate" else line.only_model())
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

    def _ask(self, line: Line, model: str, request: Request, prompt: list[int]) -> Trajectory | Unproven:
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
            raise ServerError(
                f"{self.root} cannot be used: {error}. Check trajectories.url and trajectories.api."
            ) from error

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
        foreign = foreign_tokens(request.target, kept, request.rules.sampling)
        if any(foreign):
            self.counts["dropped, not the target's tokens"] += sum(map(bool, foreign))
        return [text for text, wrong in zip(kept, foreign, strict=True) if not wrong]

    def proven_by_tokens(self, request: Request) -> bool:
        """Whether every token is compared with the target's own choice, so that the first few need no look."""
        return self.api == "text" and request.rules.sampling.greedy
