"""A stand-in for a serving engine with speculative decoding."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from typing import Any

from tests.support.serving import Server


def text_of(prompt: Sequence[int]) -> list[int]:
    """Of seven tokens or more, another one for every prompt."""
    return [prompt[0] % 13 + i for i in range(6 + prompt[0] % 3)] + [2]


class Engine:
    """Answers as an engine does: ``blocks`` are the accepted lengths of a response, counted as vLLM counts them."""

    slots = 3

    def __init__(self, blocks: Sequence[int] = (), seconds: float = 0.02, metrics: bool = True) -> None:
        self.blocks, self.seconds, self.metrics = list(blocks), seconds, metrics
        self.drafts, self.accepted = 0, [0] * self.slots
        self.at_once: list[int] = []
        self.server: Server | None = None
        self.lock = threading.Lock()

    def __call__(self, method: str, path: str, body: Any, headers: Any) -> tuple[int, Any]:
        if path == "/v1/models":
            return 200, {"data": [{"id": "m"}]}
        if path == "/metrics":
            if self.server is not None:
                self.at_once.append(self.server.most_at_once)
                self.server.most_at_once = 0
            return (200, self.exposition()) if self.metrics else (404, {"detail": "Not Found"})
        time.sleep(self.seconds)
        with self.lock:
            self.drafts += len(self.blocks)
            for n in self.blocks:
                for slot in range(n):
                    self.accepted[slot] += 1
        return 200, self.generate(body) if path == "/generate" else self.complete(body)

    def complete(self, body: Any) -> Any:
        assert body["return_token_ids"] is True and body["model"] == "m"
        ids = self.text(body["prompt"])
        return {
            "choices": [{"text": "?", "finish_reason": "stop", "token_ids": ids, "prompt_token_ids": body["prompt"]}],
            "usage": {"prompt_tokens": len(body["prompt"]), "completion_tokens": len(ids)},
        }

    def generate(self, body: Any) -> Any:
        ids = self.text(body["input_ids"])
        meta: dict[str, Any] = {"completion_tokens": len(ids), "finish_reason": {"type": "stop", "matched": 2}}
        if self.blocks:
            meta["spec_verify_ct"] = len(self.blocks)
        return {"text": "?", "output_ids": ids, "meta_info": meta}

    def text(self, prompt: list[int]) -> list[int]:
        return text_of(prompt)

    def exposition(self) -> str:
        """vLLM's page, as prometheus_client writes it; two engines share the requests."""
        lines = ["# HELP vllm:num_requests_running Running.", "# TYPE vllm:num_requests_running gauge"]
        lines += ['vllm:num_requests_running{engine="0",model_name="m"} 3.0']
        drafts = "vllm:spec_decode_num_drafts"
        accepted = "vllm:spec_decode_num_accepted_tokens"
        if self.blocks:
            counters: list[tuple[str, str, int]] = [(drafts, "", self.drafts), (accepted, "", sum(self.accepted))]
            counters += [(f"{accepted}_per_pos", f',position="{i}"', n) for i, n in enumerate(self.accepted)]
            for name, label, value in counters:
                lines += [f"# TYPE {name} counter"]
                lines += [f'{name}_total{{engine="0",model_name="m"{label}}} {value - value // 3}.0']
                lines += [f'{name}_total{{engine="1",model_name="m"{label}}} {value // 3}.0']
                lines += [f'{name}_created{{engine="0",model_name="m"{label}}} 1.76e+09']
        return "\n".join(lines) + "\n"
