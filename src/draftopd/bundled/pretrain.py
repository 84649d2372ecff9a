"""Rebuild the bundled target, or make another family's: ``python -m draftopd pretrain --out DIR``.

A small Qwen3 (``--family llama``: a Llama of the same shape) is pretrained from scratch on the reasoning problems.
Muon trains the matrices, AdamW embeddings and norms; the rate warms up, stays, and falls linearly to zero over the
last quarter. The run can be cut off and started again with the same command: it continues from ``DIR/training.pt``.
"""

from __future__ import annotations

import inspect
import json
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

from draftopd.bundled.problems import Split, problem, problems, read_answer
from draftopd.bundled.tokenizer import build_tokenizer

CARD = """\
---
license: apache-2.0
library_name: transformers
---
# {title}

A {family} of {parameters:,} parameters (bf16) that solves word problems of two to five steps. It is
pretrained from scratch on procedurally generated problems and serves as a small but real target for
speculative decoding; it knows nothing else.

| | |
|---|---|
| training | {steps:,} steps, {training_tokens:,} tokens of `draftopd.bundled.problems`, split `train` |
| held-out problems solved, thinking | {solved_test_thinking:.1%} of 500 (split `test`, greedy, float32) |
| held-out problems solved, non-thinking | {solved_test_non_thinking:.1%} of 500 |

Rebuild it, measure it and write this card: `python -m draftopd pretrain --out DIR{options}`.
"""

#: By ``model_type`` what the card calls them. The first is the bundled target's.
FAMILIES = {"qwen3": "Qwen3", "llama": "Llama"}

#: Every eighth problem is solved without thinking, so that both chat modes work.
NON_THINKING_EVERY = 8
PAD_TO = 32
POOL = 16  # batches sorted by length together


def tiny_config(tokenizer: PreTrainedTokenizerFast, family: str = "qwen3") -> PreTrainedConfig:
    """The bundled target's shape: 2.9 M parameters; of another family the same but for its own norms and biases."""
    return AutoConfig.for_model(
        family,
        vocab_size=1024,
        hidden_size=192,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        intermediate_size=512,
        max_position_embeddings=2048,
        rope_theta=10_000.0,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def encode(tokenizer: PreTrainedTokenizerFast, index: int) -> tuple[list[int], int]:
    """Token ids of training problem ``index`` and the length of its prompt."""
    example = problem("train", index)
    thinking = index % NON_THINKING_EVERY != 0
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": example.question}], tokenize=False, add_generation_prompt=True
    )
    full = prompt + example.response(thinking) + tokenizer.eos_token
    ids = tokenizer(full, add_special_tokens=False).input_ids
    return ids, len(tokenizer(prompt, add_special_tokens=False).input_ids)


def batches(tokenizer: PreTrainedTokenizerFast, batch: int, start: int):
    """Endless batches ``(ids [batch, length], is_response [batch, length])`` from step ``start`` on."""
    step = start - start % POOL
    while True:
        first = step * batch
        pool = sorted((encode(tokenizer, i) for i in range(first, first + POOL * batch)), key=lambda e: len(e[0]))
        order = torch.randperm(POOL, generator=torch.Generator().manual_seed(step)).tolist()
        for place, k in enumerate(order):
            if step + place >= start:
                yield _collate(pool[k * batch : (k + 1) * batch], tokenizer.pad_token_id)
        step += POOL


def _collate(rows: list[tuple[list[int], int]], pad: int) -> tuple[Tensor, Tensor]:
    length = -(-max(len(ids) for ids, _ in rows) // PAD_TO) * PAD_TO
    ids = torch.full((len(rows), length), pad)
    response = torch.zeros(len(rows), length, dtype=torch.bool)
    for i, (row, prompt) in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
        response[i, prompt : len(row)] = True
    return ids, response


@torch.no_grad()
def solve_rate(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, split: Split, count: int, thinking: bool = True
) -> float:
    """Share of a split's first ``count`` problems answered right under greedy decoding."""
    model.eval()
    right = 0
    examples = list(problems(split, count))
    tokenizer.padding_side = "left"
    for first in range(0, count, 64):
        group = examples[first : first + 64]
        chats = [[{"role": "user", "content": p.question}] for p in group]
        inputs = tokenizer.apply_chat_template(
            chats, add_generation_prompt=True, enable_thinking=thinking, padding=True,
            return_dict=True, return_tensors="pt",
        )  # fmt: skip
        out = model.generate(**inputs, max_new_tokens=256, do_sample=False)
        texts = tokenizer.batch_decode(out[:, inputs.input_ids.shape[1] :], skip_special_tokens=False)
        texts = [t.split(tokenizer.eos_token)[0] for t in texts]
        right += sum(read_answer(t) == p.value for t, p in zip(texts, group, strict=True))
    model.train()
    return right / count


def pretrain(
    out: Path, steps: int = 1600, batch: int = 48, rate: float = 3e-3, family: str = "qwen3", check_every: int = 500
) -> None:
    """Train, test, and write model and card.

    Args:
        steps: optimizer steps, of ``batch`` problems each; ``rate`` is the peak learning rate.
        family: one of :data:`FAMILIES`.
        check_every: steps between measurements, at which the run can be continued.
    """
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    model = AutoModelForCausalLM.from_config(tiny_config(tokenizer, family), dtype=torch.float32)
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    rest = [p for p in model.parameters() if not any(p is m for m in matrices)]
    optimizers = [
        torch.optim.Muon(matrices, lr=rate, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=rate, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    resume = out / "training.pt"
    start, tokens = 0, 0
    if resume.exists():
        state = torch.load(resume, weights_only=True)
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        start, tokens = state["step"], state["tokens"]
    out.mkdir(parents=True, exist_ok=True)
    body = torch.compile(model.model)
    began = time.time()
    for step, (ids, response) in enumerate(batches(tokenizer, batch, start), start=start):
        if step >= steps:
            break
        factor = min(1.0, (step + 1) / 100, (steps - step) / (0.25 * steps))
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate * factor
        with torch.autocast("cpu", torch.bfloat16):
            hidden = body(input_ids=ids[:, :-1], use_cache=False).last_hidden_state
            logits = F.linear(hidden[response[:, 1:]], model.lm_head.weight)
        loss = F.cross_entropy(logits.float(), ids[:, 1:][response[:, 1:]])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        tokens += int((ids != tokenizer.pad_token_id).sum())
        if step % 50 == 0:
            print(
                f"step {step} loss {loss.item():.4f} tokens {tokens / 1e6:.1f}M {time.time() - began:.0f}s", flush=True
            )
        if (step + 1) % check_every == 0:
            torch.save(
                {"model": model.state_dict(), "optimizers": [o.state_dict() for o in optimizers],
                 "step": step + 1, "tokens": tokens},
                resume,
            )  # fmt: skip
            print(
                f"step {step + 1} validation solved {solve_rate(model, tokenizer, 'validation', 128):.3f}", flush=True
            )
    model = model.to(torch.bfloat16)
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, tokenizer.pad_token_id]
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(out)
    tokenizer.padding_side = "left"
    tokenizer.save_pretrained(out)
    model = model.float()
    figures: dict[str, Any] = {
        "family": family,
        "options": _options(steps=steps, batch=batch, rate=rate, family=family),
        "parameters": model.num_parameters(),
        "training_tokens": tokens,
        "steps": steps,
        "solved_test_thinking": solve_rate(model, tokenizer, "test", 500),
        "solved_test_non_thinking": solve_rate(model, tokenizer, "test", 500, thinking=False),
    }
    (out / "figures.json").write_text(json.dumps(figures, indent=2) + "\n")
    write_card(out, figures)
    print(json.dumps(figures, indent=2))


def _options(**chosen: object) -> str:
    """The command's options that are not the default, for the card."""
    usual = inspect.signature(pretrain).parameters
    return "".join(f" --{name} {value}" for name, value in chosen.items() if value != usual[name].default)


def write_card(out: Path, figures: dict[str, Any]) -> None:
    """The model card, from the measured figures."""
    family, bundled = figures["family"], next(iter(FAMILIES))
    named = {
        "family": FAMILIES[family],
        "title": "The bundled target" if family == bundled else f"A small {FAMILIES[family]}",
    }
    (out / "README.md").write_text(CARD.format(**figures | named), encoding="utf-8")
