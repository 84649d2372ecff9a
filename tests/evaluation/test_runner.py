"""The evaluation: figures, turns and warm-up, and broken decoders that must be caught."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from draftopd.decoding import generate
from draftopd.decoding.generate import Decoder
from draftopd.decoding.verify import Verdict, verify_matching
from draftopd.drafters.dflash import DFlashDrafter
from draftopd.errors import DrafterError, PromptError
from draftopd.evaluation.benchmark import Example, ReasoningBenchmark
from draftopd.evaluation.runner import Evaluation, PromptResult, evaluate
from draftopd.evaluation.settings import Settings
from draftopd.targets.target import Target

Pair = tuple[Target, DFlashDrafter, list[list[int]], frozenset[int]]
Run = Callable[..., Evaluation]


def untimed(result: Evaluation) -> list[PromptResult]:
    return [replace(p, plain_seconds=0.0, speculative_seconds=0.0) for p in result.prompts]


def test_every_prompt_has_its_figures(evaluate_bundled: Run) -> None:
    result = evaluate_bundled(max_new_tokens=200)
    assert [p.id for p in result.prompts] == ["test-0", "test-1", "test-2"]
    for prompt in result.prompts:
        # The first token comes from the prefill, all others from blocks.
        assert sum(prompt.emitted) + 1 == prompt.response_tokens == prompt.plain_response_tokens
        assert len(prompt.accepted) == len(prompt.emitted)
        assert prompt.finish == "stop" and prompt.mismatch is None
        assert prompt.plain_seconds > 0 and prompt.speculative_seconds > 0
    assert result.checked and result.mismatches == [] and result.withheld is None
    assert result.speedup == pytest.approx(result.speculative_rate / result.plain_rate)
    # A trained drafter, so that these figures are not those of blocks without an accepted proposal.
    assert result.tau[0] > 1.5
    assert result.solved is not None and result.solved > 0


def test_a_text_is_marked_right_by_its_answer(bundled_pair: Pair, bundled_tokenizer: PreTrainedTokenizerBase) -> None:
    target, drafter, _, stop = bundled_pair
    example = ReasoningBenchmark().examples(1)[0]
    settings = Settings(max_new_tokens=200)
    right = evaluate(target, drafter, bundled_tokenizer, "x", [example], stop, settings)
    assert right.prompts[0].solved is True
    wrong = replace(example, answer=-1)
    unknown = replace(example, answer=None)
    both = evaluate(target, drafter, bundled_tokenizer, "x", [wrong, unknown], stop, settings)
    assert [p.solved for p in both.prompts] == [False, None] and both.solved == 0.0


def test_figures_do_not_depend_on_the_batch_size(evaluate_bundled: Run) -> None:
    assert untimed(evaluate_bundled(batch_size=1)) == untimed(evaluate_bundled(batch_size=2))


@pytest.mark.parametrize("verification", ["rejection_sampling", "target_only"])
def test_above_temperature_0_texts_are_not_compared(evaluate_bundled: Run, verification: str) -> None:
    result = evaluate_bundled(temperature=1.0, verification=verification)
    assert not result.checked and result.mismatches == [] and result.speedup is not None
    again = evaluate_bundled(temperature=1.0, verification=verification)
    assert untimed(result) == untimed(again)
    assert untimed(result) != untimed(evaluate_bundled(temperature=1.0, verification=verification, seed=1))


def test_turns_and_warm_up(evaluate_bundled: Run, bundled_pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = Decoder.decode_batch, []

    def decode_batch(self: Decoder, prompts: Sequence[list[int]], generator: torch.Generator | None = None):
        calls.append(("plain" if self.drafter is None else "speculative", len(prompts), self.target.taps))
        return real(self, prompts, generator)

    monkeypatch.setattr(Decoder, "decode_batch", decode_batch)
    evaluate_bundled(batch_size=2, limit=5, max_new_tokens=4)
    order = [(kind, size) for kind, size, _ in calls]
    assert order == [
        ("plain", 2), ("speculative", 2),  # warm-up
        ("plain", 2), ("speculative", 2),
        ("speculative", 2), ("plain", 2),
        ("plain", 1), ("speculative", 1),
    ]  # fmt: skip
    taps = bundled_pair[1].target_layer_ids
    assert all(tapped == (() if kind == "plain" else taps) for kind, _, tapped in calls)


def test_warm_up_is_not_timed(evaluate_bundled: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that each decoding moves on by a second, and the warm-up by a thousand."""
    real, now, calls = Decoder.decode_batch, [0.0], []

    def decode_batch(self: Decoder, prompts: Sequence[list[int]], generator: torch.Generator | None = None):
        calls.append(self)
        now[0] += 1000.0 if len(calls) <= 2 else 1.0 if self.drafter else 3.0
        return real(self, prompts, generator)

    monkeypatch.setattr(Decoder, "decode_batch", decode_batch)
    monkeypatch.setattr("draftopd.evaluation.runner.time.perf_counter", lambda: now[0])
    result = evaluate_bundled(batch_size=2, max_new_tokens=4)
    assert [p.plain_seconds for p in result.prompts] == [1.5, 1.5, 3.0]
    assert [p.speculative_seconds for p in result.prompts] == [0.5, 0.5, 1.0]
    assert result.speedup == pytest.approx(3.0)


def test_progress_counts_prompts_and_all_tokens(bundled_pair: Pair, bundled_tokenizer: PreTrainedTokenizerBase) -> None:
    target, drafter, _, stop = bundled_pair
    told: list[tuple[int, int]] = []
    result = evaluate(
        target, drafter, bundled_tokenizer, "x", ReasoningBenchmark().examples(3), stop,
        Settings(batch_size=2, max_new_tokens=6), lambda prompts, tokens: told.append((prompts, tokens)),
    )  # fmt: skip
    assert [prompts for prompts, _ in told] == [2, 1]
    assert sum(tokens for _, tokens in told) == sum(p.response_tokens + p.plain_response_tokens for p in result.prompts)


def test_a_useless_drafter_is_slow_but_lossless(
    evaluate_bundled: Run, bundled_pair: Pair, make_drafter: Callable[..., DFlashDrafter]
) -> None:
    """The check must not blame a decoder for bad proposals."""
    result = evaluate_bundled(make_drafter(bundled_pair[0], num_layers=1))
    assert result.mismatches == [] and result.tau[0] < 1.2


def too_generous(proposals: Tensor, target_tokens: Tensor) -> Verdict:
    """Accepts one proposal more than the target agrees with."""
    accepted = (verify_matching(proposals, target_tokens).accepted + 1).clamp_max(proposals.shape[-1])
    return Verdict(accepted, target_tokens.gather(-1, accepted[..., None])[..., 0])


def test_a_decoder_that_accepts_too_much_is_caught(evaluate_bundled: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generate, "verify_matching", too_generous)
    result = evaluate_bundled()
    assert result.mismatches and result.speedup is None
    assert result.withheld == f"not lossless: {len(result.mismatches)} of 3 texts differ"
    for prompt in result.mismatches:
        assert prompt.mismatch is not None and prompt.mismatch.logit_gap is not None
        # The wrong token was not the target's choice, and not by rounding.
        assert prompt.mismatch.logit_gap > 0.01


def wrong_slot(proposals: Tensor, target_tokens: Tensor) -> Verdict:
    """Emits the bonus where the correction is due."""
    return Verdict(verify_matching(proposals, target_tokens).accepted, target_tokens[..., -1])


def test_a_decoder_with_a_wrong_correction_is_caught(evaluate_bundled: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generate, "verify_matching", wrong_slot)
    assert evaluate_bundled().speedup is None


def test_a_text_that_ends_too_early_is_caught(evaluate_bundled: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Decoder.decode_batch

    def decode_batch(self: Decoder, prompts: Sequence[list[int]], generator: torch.Generator | None = None):
        decoded = real(self, prompts, generator)
        if self.drafter:
            decoded[0].response.pop()
        return decoded

    monkeypatch.setattr(Decoder, "decode_batch", decode_batch)
    result = evaluate_bundled(limit=2, batch_size=2)
    assert [p.id for p in result.mismatches] == ["test-0"] and result.speedup is None
    mismatch = result.prompts[0].mismatch
    assert mismatch is not None and mismatch.position == 23 and mismatch.speculative_token is None


def test_a_drafter_that_disturbs_the_target_is_caught(
    evaluate_bundled: Run, bundled_pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, drafter, _, _ = bundled_pair
    real, norm = type(drafter).draft, target.body.norm.weight

    def draft(self: DFlashDrafter, *args, **kwargs):
        norm.data.neg_()
        return real(self, *args, **kwargs)

    monkeypatch.setattr(type(drafter), "draft", draft)
    before = norm.data.clone()
    try:
        assert evaluate_bundled(limit=1).speedup is None
    finally:
        norm.data.copy_(before)


def test_blocks_cut_short_count_for_tau_but_not_as_rejections(make_result: Callable[..., PromptResult]) -> None:
    prompts = [make_result(0, accepted=[0, 2, 1], emitted=[1, 3, 1]), make_result(1, accepted=[3], emitted=[4])]
    result = Evaluation("x", 4, Settings(), prompts)
    assert result.whole_blocks().tolist() == [0, 2, 3]
    assert result.rejection_positions() == [1, 0, 1, 1]
    assert result.acceptance_by_position() == pytest.approx([2 / 3, 1.0, 1 / 2])
    assert result.mean_accepted == pytest.approx(5 / 3)
    assert result.tau == pytest.approx((9 / 4, (5 / 3 + 4) / 2))


def test_rates(make_result: Callable[..., PromptResult]) -> None:
    prompts = [make_result(0), make_result(1, response_tokens=12, plain_response_tokens=9, solved=False)]
    result = Evaluation("x", 4, Settings(), prompts)
    assert (result.plain_rate, result.speculative_rate, result.speedup) == (15 / 6, 18 / 2, pytest.approx(3.6))
    assert result.solved == 0.5
    unknown = Evaluation("x", 4, Settings(), [make_result(solved=None)])
    assert unknown.solved is None


def test_refusals(
    bundled_pair: Pair, bundled_tokenizer: PreTrainedTokenizerBase, target: Target,
    make_drafter: Callable[..., DFlashDrafter],
) -> None:  # fmt: skip
    bundled_target, drafter, _, stop = bundled_pair
    with pytest.raises(PromptError, match="benchmark x holds no prompts"):
        evaluate(bundled_target, drafter, bundled_tokenizer, "x", [], stop, Settings())
    long = Example("long", [{"role": "user", "content": "Mia has 3 apples. " * 2000}])
    with pytest.raises(PromptError, match="Prompt 0 has"):
        evaluate(bundled_target, drafter, bundled_tokenizer, "x", [long], stop, Settings())
    with pytest.raises(DrafterError, match="hidden size"):
        evaluate(
            bundled_target, make_drafter(target), bundled_tokenizer, "x", ReasoningBenchmark().examples(1), stop,
            Settings(),
        )  # fmt: skip
