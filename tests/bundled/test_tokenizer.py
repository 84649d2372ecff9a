"""The bundled target's tokenizer, here trained on a small corpus."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from draftopd.bundled.problems import problems
from draftopd.bundled.tokenizer import SPECIAL_TOKENS, build_tokenizer
from draftopd.targets.load import load_tokenizer

USER = {"role": "user", "content": "How many?"}


def chat(tokenizer: PreTrainedTokenizerFast, messages: list[dict[str, str]], **options: bool) -> str:
    return tokenizer.apply_chat_template(messages, tokenize=False, **options)


def test_vocabulary(tokenizer: PreTrainedTokenizerFast) -> None:
    assert len(tokenizer) == 400
    assert tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS)) == list(range(6))
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    assert tokenizer.mask_token == "<|mask|>"


@pytest.mark.parametrize(
    "text", ["", " 12 + 3 = 15.", "Mia\n\nhas  2  äpples – 苹果 🍎!", "<think>\nSo.\n</think>\n\n7"]
)
def test_round_trip(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text


def test_problems_round_trip_in_few_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    texts = [p.response() for p in problems("validation", 20)]
    encoded = tokenizer(texts, add_special_tokens=False).input_ids
    assert tokenizer.batch_decode(encoded, clean_up_tokenization_spaces=False) == texts
    assert sum(map(len, encoded)) < 0.6 * sum(map(len, texts))


def test_digits_stand_apart(tokenizer: PreTrainedTokenizerFast) -> None:
    for text in ("1234", "x 40 + 59", "12 apples"):
        pieces = [tokenizer.decode([i]) for i in tokenizer(text, add_special_tokens=False).input_ids]
        assert [p for p in pieces if any(c.isdigit() for c in p)] == [c for c in text if c.isdigit()]


def test_special_tokens_are_single(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = tokenizer("a<think>b</think><|im_end|>", add_special_tokens=False).input_ids
    for token in ("<think>", "</think>", "<|im_end|>"):
        assert ids.count(tokenizer.convert_tokens_to_ids(token)) == 1
    assert len(ids) == 5


def test_thinking_is_part_of_the_visible_text(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = tokenizer("<think>\nSo.\n</think>\n\n7<|im_end|>", add_special_tokens=False).input_ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == "<think>\nSo.\n</think>\n\n7"
    bundled = load_tokenizer("bundled:tiny_target")
    ids = bundled("<think> 7</think><|im_end|>", add_special_tokens=False).input_ids
    assert bundled.decode(ids, skip_special_tokens=True) == "<think> 7</think>"


def test_building_is_deterministic() -> None:
    first, second = (build_tokenizer(vocab_size=300, corpus=20).get_vocab() for _ in range(2))
    assert first == second and len(first) == 300


def test_chat_with_thinking(tokenizer: PreTrainedTokenizerFast) -> None:
    expected = "<|im_start|>user\nHow many?<|im_end|>\n<|im_start|>assistant\n"
    assert chat(tokenizer, [USER], add_generation_prompt=True) == expected
    assert chat(tokenizer, [USER], add_generation_prompt=True, enable_thinking=True) == expected
    assert chat(tokenizer, [USER]) == "<|im_start|>user\nHow many?<|im_end|>\n"


def test_chat_without_thinking(tokenizer: PreTrainedTokenizerFast) -> None:
    prompt = chat(tokenizer, [USER], add_generation_prompt=True, enable_thinking=False)
    assert prompt.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    response = next(problems("test", 1)).response(thinking=False)
    assert response.startswith(prompt.rpartition("assistant\n")[2])


def test_earlier_thoughts_are_dropped(tokenizer: PreTrainedTokenizerFast) -> None:
    answer = {"role": "assistant", "content": "<think>\nHm.\n</think>\n\nThere are 3."}
    text = chat(tokenizer, [USER, answer, USER], add_generation_prompt=True)
    assert text.count("<|im_start|>assistant\nThere are 3.<|im_end|>\n") == 1
    assert "think" not in text and "Hm." not in text


@pytest.mark.parametrize("thinking", [True, False])
def test_a_prompts_tokens_begin_the_conversations(tokenizer: PreTrainedTokenizerFast, thinking: bool) -> None:
    for example in problems("train", 20):
        question = [{"role": "user", "content": example.question}]
        opening = chat(tokenizer, question, add_generation_prompt=True)
        whole = tokenizer(opening + example.response(thinking), add_special_tokens=False).input_ids
        prompt = chat(tokenizer, question, add_generation_prompt=True, enable_thinking=thinking)
        ids = tokenizer(prompt, add_special_tokens=False).input_ids
        assert whole[: len(ids)] == ids


def test_saved_and_loaded(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(str(tmp_path))
    text = "<|im_start|>user\nMia has 12 apples.<|im_end|>\n"
    assert loaded(text).input_ids == tokenizer(text).input_ids
    assert (loaded.eos_token_id, loaded.mask_token_id) == (tokenizer.eos_token_id, tokenizer.mask_token_id)
    assert chat(loaded, [USER], add_generation_prompt=True) == chat(tokenizer, [USER], add_generation_prompt=True)
