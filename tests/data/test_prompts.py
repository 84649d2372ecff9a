"""Prompts: the bundled source, JSON lines good and bad, encoding."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from draftopd.bundled.problems import problem
from draftopd.data.prompts import HubPrompts, JsonlPrompts, ListedPrompts, PromptEncoder, ReasoningPrompts
from draftopd.errors import PromptError

BENCHMARKS = Path(__file__).parents[3] / "shared" / "benchmarks"


def test_good_lines(tmp_path: Path) -> None:
    chat = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Hi"}]
    rows = [{"prompt": "one"}, {"messages": chat, "id": 3}, {"prompt": "zwei äöü"}]
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n\n".join(json.dumps(r, ensure_ascii=False) for r in rows), encoding="utf-8")
    source = JsonlPrompts(str(path))
    assert len(source) == 3
    served = [source.messages(i) for i in range(3)]
    assert sorted(map(str, served)) == sorted(
        map(str, [[{"role": "user", "content": "one"}], chat, [{"role": "user", "content": "zwei äöü"}]])
    )
    assert len(JsonlPrompts(str(path), limit=2)) == 2


def test_lists_are_shuffled_anew_each_round() -> None:
    source = ListedPrompts([[{"role": "user", "content": str(i)}] for i in range(20)], seed=1)
    rounds = [[int(source.messages(r * 20 + i)[0]["content"]) for i in range(20)] for r in range(2)]
    assert sorted(rounds[0]) == sorted(rounds[1]) == list(range(20)) and rounds[0] != rounds[1]


def test_reasoning_prompts() -> None:
    assert ReasoningPrompts("validation").messages(5)[0]["content"] == problem("validation", 5).question


def test_hub_prompts_without_network() -> None:
    with pytest.raises(PromptError, match="datasets|could not be loaded"):
        HubPrompts([{"path": "nobody/nothing", "field": "question"}])


def test_encoding(tokenizer: PreTrainedTokenizerFast) -> None:
    chat = [{"role": "user", "content": "Mia has 3 apples."}]
    thinking, plain = (PromptEncoder(tokenizer, t).encode(chat) for t in (True, False))
    assert tokenizer.decode(thinking) == "<|im_start|>user\nMia has 3 apples.<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(plain) == tokenizer.decode(thinking) + "<think>\n\n</think>\n\n"


def test_long_prompts_are_left_out(tokenizer: PreTrainedTokenizerFast) -> None:
    texts = ["Mia has 3 apples.", "Mia has 3 apples. " * 40]
    source = ListedPrompts([[{"role": "user", "content": t}] for t in texts])
    assert len(PromptEncoder(tokenizer, max_tokens=40).take(source, range(2))) == 1
    with pytest.raises(PromptError, match="max_prompt_tokens=5"):
        PromptEncoder(tokenizer, max_tokens=5).take(source, range(2))


def test_a_tokenizer_without_a_chat_template(tokenizer: PreTrainedTokenizerFast) -> None:
    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(PromptError, match="no chat template"):
        PromptEncoder(bare)


@pytest.mark.parametrize("file, field", [("gsm8k_test.jsonl", "question"), ("humaneval.jsonl", "prompt")])
def test_real_rows(file: str, field: str, tokenizer: PreTrainedTokenizerFast) -> None:
    path = BENCHMARKS / file
    if not path.exists():
        pytest.skip(f"{path} is not here")
    source = JsonlPrompts(str(path), field=field)
    assert len(source) > 50
    assert PromptEncoder(tokenizer, max_tokens=4000).take(source, range(len(source)))
