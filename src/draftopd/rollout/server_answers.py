"""Requests to serving engines, and their answers as verified token ids.

``POST /v1/completions`` with ``return_token_ids`` (vLLM since 0.10.2, SGLang since mid 2026) returns ``token_ids`` and
``prompt_token_ids`` per choice. SGLang's native ``POST /generate`` returns ``output_ids`` and ``meta_info``. A plain
completion returns ``text`` and ``usage``.
"""

from __future__ import annotations

import hashlib
from typing import Any, NamedTuple, Protocol

from transformers import PreTrainedTokenizerBase

from draftopd.decoding.rules import Rules
from draftopd.io.json_text import is_text
from draftopd.rollout.request import Request, Trajectory

#: Servers take options that a request lacks from the model's generation config, so all of them are sent.
_NEUTRAL = {"min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}


class Unproven(NamedTuple):
    """The reason why an answer is left out."""

    reason: str


class AnswerError(Exception):
    """An answer does not have the promised form."""


class ResponseOptions(Protocol):
    """The part of a request that describes the response."""

    @property
    def rules(self) -> Rules: ...
    @property
    def seed(self) -> int: ...


def completion_body(request: ResponseOptions, model: str, prompt: list[int] | str, token_ids: bool) -> dict[str, Any]:
    """The body of ``POST /v1/completions``; without ``token_ids`` it has standard options only."""
    sampling = request.rules.sampling
    body: dict[str, Any] = {
        "model": model,
        "prompt": prompt,
        "max_tokens": request.rules.max_new_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
    }
    if not sampling.greedy:
        body["seed"] = _seed(request, prompt)
    if token_ids:
        body |= {"return_token_ids": True, "stop_token_ids": sorted(request.rules.stop), "top_k": sampling.top_k or -1}
        body |= _NEUTRAL
    return body


def generate_body(request: ResponseOptions, prompt: list[int]) -> dict[str, Any]:
    """The body of SGLang's ``POST /generate``."""
    sampling = request.rules.sampling
    parameters: dict[str, Any] = {
        "max_new_tokens": request.rules.max_new_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k or -1,
        "stop_token_ids": sorted(request.rules.stop),
        "skip_special_tokens": False,
        **_NEUTRAL,
    }
    if not sampling.greedy:
        parameters["sampling_seed"] = _seed(request, prompt)
    return {"input_ids": prompt, "sampling_params": parameters}


def from_token_ids(answer: Any, prompt: list[int], request: Request) -> Trajectory | Unproven:
    """The text of a completion with token ids.

    Raises:
        AnswerError: if the answer has none.
    """
    choice = _choice(answer)
    if "token_ids" not in choice or choice["token_ids"] is None:
        raise AnswerError("the answer has no token_ids; for a server that returns text only set trajectories.api=text")
    if choice.get("prompt_token_ids") not in (None, prompt):
        return Unproven("dropped, prompt differs")
    counted = _usage(answer).get("completion_tokens")
    finish, matched = choice.get("finish_reason"), choice.get("stop_reason")
    return _trajectory(prompt, choice["token_ids"], finish, matched, request, counted)


def from_generate(answer: Any, prompt: list[int], request: Request) -> Trajectory | Unproven:
    """The text of an answer of SGLang's native endpoint.

    Raises:
        AnswerError: if the answer has no token ids or finish reason.
    """
    try:
        ids, meta = answer["output_ids"], answer["meta_info"]
        finish = meta["finish_reason"]
        if meta.get("prompt_tokens", len(prompt)) != len(prompt):
            return Unproven("dropped, prompt differs")
        counted = meta.get("completion_tokens")
        return _trajectory(prompt, ids, finish["type"], finish.get("matched"), request, counted)
    except (KeyError, TypeError, AttributeError) as error:
        raise AnswerError("the answer lacks output_ids or meta_info.finish_reason") from error


def from_text(answer: Any, prompt: list[int], request: Request) -> Trajectory | Unproven:
    """The text of a completion without token ids, tokenised again.

    The tokens are verified if the server counted as many for prompt and response, and they decode to the same text. At
    temperature 0 the caller also compares them with the target's own choices.

    Raises:
        AnswerError: if the answer has no text or usage.
    """
    choice = _choice(answer)
    text, finish = choice.get("text"), choice.get("finish_reason")
    usage = _usage(answer)
    counted, prompted = usage.get("completion_tokens"), usage.get("prompt_tokens")
    if not is_text(text) or type(counted) is not int or type(prompted) is not int:
        raise AnswerError("the answer lacks text or usage, without which its tokens cannot be proven")
    if prompted != len(prompt):
        return Unproven("dropped, prompt differs")
    ids = encode(request.tokenizer, str(text))
    if str(request.tokenizer.decode(ids)) != text:
        return Unproven("dropped, text does not tokenise back")
    # The text does not include the stop token that ended it.
    if finish == "stop" and len(ids) == counted - 1 and request.tokenizer.eos_token_id in request.rules.stop:
        ids = [*ids, int(request.tokenizer.eos_token_id)]
    if len(ids) != counted:
        return Unproven("dropped, token count differs")
    return _trajectory(prompt, ids, finish, None, request, counted)


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of a text, without special tokens before or after it."""
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _choice(answer: Any) -> dict[str, Any]:
    choices = answer.get("choices") if isinstance(answer, dict) else None
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        raise AnswerError("the answer has no choices")
    return choices[0]


def _usage(answer: Any) -> dict[str, Any]:
    usage = answer.get("usage")
    return usage if isinstance(usage, dict) else {}


def _trajectory(
    prompt: list[int], ids: Any, finish: Any, matched: Any, request: Request, counted: Any
) -> Trajectory | Unproven:
    """The text of ``ids``; ``matched`` is the stop token that ended it, ``counted`` the server's token count."""
    if not isinstance(ids, list) or not all(type(i) is int for i in ids):
        raise AnswerError("the answer's token ids are not a list of numbers")
    if finish not in ("stop", "length"):
        known = finish in ("abort", "error", "content_filter", "tool_calls")
        return Unproven(f"dropped, ended by {finish if known else 'something else'}")
    given = len(ids)
    if finish == "stop" and type(matched) is int and matched in request.rules.stop and (not ids or ids[-1] != matched):
        ids = [*ids, matched]
    if type(counted) is int and counted not in (given, len(ids)):
        return Unproven("dropped, token count differs")
    if not ids:
        return Unproven("dropped, empty")
    if not 0 <= min(ids) <= max(ids) < request.target.vocab_size:
        return Unproven("dropped, ids outside the target's vocabulary")
    return Trajectory.ended(prompt, ids, request)


def _seed(request: ResponseOptions, prompt: list[int] | str) -> int:
    """One seed per prompt, so that a text does not depend on the other requests."""
    digest = hashlib.blake2b(f"{request.seed} {prompt}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") >> 1
