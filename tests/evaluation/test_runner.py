"""The evaluation: figures, turns and warm-up, and broken decoders that must be caught."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from tests.support.evaluation import EvaluateAll, Pair
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from draftopd.data.prompts import PromptEncoder
from draftopd.decoding import step
from draftopd.decoding.generate import Decoded, Decoder
from draftopd.decoding.verify import Verdict, verify_matching
from draftopd.drafters.base import Drafter
from draftopd.drafters.dflash import DFlashDrafter
from draftopd.errors import DrafterError, PromptError
from draftopd.evaluation.benchmark import Example, ReasoningBenchmark
from draftopd.evaluation.results import Evaluation, PromptResult
from draftopd.evaluation.runner import evaluate
from draftopd.evaluation.settings import Settings
from draftopd.metrics.entropy_acceptance import EDGES
from draftopd.targets.target import Target

Run = Callable[..., Evaluation]


def untimed(result: Evaluation) -> list[PromptResult]:
    return [replace(p, plain_seconds=0.0, speculative_seconds=0.0, batch="") for p in result.prompts]


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
    ratios = [p.plain_seconds / p.speculative_seconds for p in result.prompts]  # of texts of one length
    assert result.speedup == pytest.approx(sorted(ratios)[1])
    # A trained drafter, so that these figures are not those of blocks without an accepted proposal.
    assert result.tau[0] > 1.5
    assert result.solved is not None and result.solved > 0


def test_two_drafters_have_figures_of_their_own(
    evaluate_all: EvaluateAll, evaluate_bundled: Run, bundled_drafters: dict[str, Drafter]
) -> None:
    both = evaluate_all(bundled_drafters)
    assert list(both) == ["sft", "opd"]
    assert both["sft"].prompts != both["opd"].prompts
    for name, drafter in bundled_drafters.items():
        assert untimed(both[name]) == untimed(evaluate_bundled(drafter))
        assert both[name].checked and both[name].mismatches == []
    for sft, opd in zip(both["sft"].prompts, both["opd"].prompts, strict=True):
        assert sft.id == opd.id and sft.plain_seconds == opd.plain_seconds


def test_a_text_is_marked_right_by_its_answer(evaluate_bundled: Run) -> None:
    example = ReasoningBenchmark().examples(1)[0]
    assert evaluate_bundled(examples=[example], max_new_tokens=200).prompts[0].solved is True
    wrong = replace(example, answer=-1)
    unknown = replace(example, answer=None)
    both = evaluate_bundled(examples=[wrong, unknown], max_new_tokens=200)
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


Spied = list[tuple[Decoder, list[list[int]], tuple[int, ...], list[Decoded]]]


@pytest.fixture
def spied(monkeypatch: pytest.MonkeyPatch) -> Spied:
    """Every decoding: by whom, of which prompts, with which layers tapped, and the texts."""
    real, calls = Decoder.decode_batch, Spied()

    def decode_batch(self: Decoder, prompts: Sequence[list[int]], generator: torch.Generator | None = None):
        taps = self.target.taps
        decoded = real(self, prompts, generator)
        calls.append((self, list(prompts), taps, decoded))
        return decoded

    monkeypatch.setattr(Decoder, "decode_batch", decode_batch)
    return calls


def test_turns_and_warm_up(evaluate_bundled: Run, bundled_pair: Pair, spied: Spied) -> None:
    evaluate_bundled(batch_size=2, limit=5, max_new_tokens=4)
    order = [("speculative" if decoder.drafter else "plain", len(prompts)) for decoder, prompts, _, _ in spied]
    assert order == [
        ("plain", 2), ("speculative", 2),  # warm-up
        ("plain", 2), ("speculative", 2),
        ("speculative", 2), ("plain", 2),
        ("plain", 1), ("speculative", 1),
    ]  # fmt: skip
    taps = bundled_pair[1].target_layer_ids
    assert all(tapped == (taps if decoder.drafter else ()) for decoder, _, tapped, _ in spied)


def test_two_drafters_and_plain_decoding_rotate(
    evaluate_all: EvaluateAll, bundled_drafters: dict[str, Drafter], spied: Spied
) -> None:
    evaluate_all(bundled_drafters, limit=4, max_new_tokens=4)
    names = {None: "plain"} | {drafter: name for name, drafter in bundled_drafters.items()}
    assert [names[decoder.drafter] for decoder, _, _, _ in spied] == [
        "plain", "sft", "opd",  # warm-up
        "plain", "sft", "opd",
        "sft", "opd", "plain",
        "opd", "plain", "sft",
        "plain", "sft", "opd",
    ]  # fmt: skip
    assert len({id(decoder) for decoder, _, _, _ in spied}) == 3
    for decoder, _, tapped, _ in spied:
        assert tapped == (decoder.drafter.target_layer_ids if decoder.drafter else ())


@pytest.mark.parametrize("names", [["sft"], ["sft", "opd"]])
def test_warm_up_is_not_timed(
    names: list[str], evaluate_all: EvaluateAll, bundled_drafters: dict[str, Drafter], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A clock that each decoding moves on by a second or more, and the warm-up by a thousand."""
    real, now, calls = Decoder.decode_batch, [0.0], []
    cost = {None: 3.0, bundled_drafters["sft"]: 1.0, bundled_drafters["opd"]: 0.5}

    def decode_batch(self: Decoder, prompts: Sequence[list[int]], generator: torch.Generator | None = None):
        calls.append(self)
        now[0] += 1000.0 if len(calls) <= len(names) + 1 else cost[self.drafter]
        return real(self, prompts, generator)

    monkeypatch.setattr(Decoder, "decode_batch", decode_batch)
    monkeypatch.setattr("draftopd.evaluation.runner.time.perf_counter", lambda: now[0])
    found = evaluate_all({name: bundled_drafters[name] for name in names}, batch_size=2, max_new_tokens=4)
    assert len(calls) == 3 * (len(names) + 1)
    for name in names:
        own = cost[bundled_drafters[name]]
        assert [p.plain_seconds for p in found[name].prompts] == [1.5, 1.5, 3.0]
        assert [p.speculative_seconds for p in found[name].prompts] == [own / 2, own / 2, own]
        assert found[name].speedup == pytest.approx(3.0 / own)


def test_progress_counts_prompts_and_all_tokens(
    bundled_pair: Pair, bundled_tokenizer: PreTrainedTokenizerBase, bundled_drafters: dict[str, Drafter]
) -> None:
    target, _, _, stop = bundled_pair
    told: list[tuple[int, int]] = []
    batches = evaluate(
        target, bundled_drafters, bundled_tokenizer, "x", ReasoningBenchmark().examples(3), stop,
        Settings(batch_size=2, max_new_tokens=6), lambda prompts, tokens: told.append((prompts, tokens)),
    )  # fmt: skip
    done = [example for batch in batches for example in batch]
    assert [prompts for prompts, _ in told] == [2, 1]
    tokens = [turn.response_tokens for example in done for turns in example.values() for turn in turns]
    assert sum(n for _, n in told) == sum(tokens) + sum(e["sft"][0].plain_response_tokens for e in done)


def talk(number: int, *follow_ups: str) -> Example:
    return replace(ReasoningBenchmark().examples(number + 1)[number], follow_ups=follow_ups)


def test_a_later_turn_follows_the_plain_answer(
    evaluate_all: EvaluateAll, bundled_drafters: dict[str, Drafter], bundled_tokenizer: PreTrainedTokenizerBase,
    spied: Spied,
) -> None:  # fmt: skip
    """Above temperature 0 all texts differ; every decoder still reads plain decoding's."""
    examples = [talk(0, "Are you sure?"), talk(1, "And twice that?")]
    found = evaluate_all(bundled_drafters, examples, batch_size=2, max_new_tokens=200, temperature=1.0)
    for result in found.values():
        assert [(p.id, p.turn) for p in result.prompts] == [("test-0", 0), ("test-0", 1), ("test-1", 0), ("test-1", 1)]
        assert [p.solved is None for p in result.prompts] == [True, False, True, False]
    warm, first, second = spied[:3], spied[3:6], spied[6:]
    assert len(second) == 3 and [c[1] for c in warm] == [c[1] for c in first]
    plain = next(decoded for decoder, _, _, decoded in first if decoder.drafter is None)
    assert any([d.response for d in plain] != [d.response for d in decoded] for _, _, _, decoded in first)
    encoder = PromptEncoder(bundled_tokenizer)
    expected = []
    for example, decoded in zip(examples, plain, strict=True):
        answer = bundled_tokenizer.decode(decoded.response, skip_special_tokens=True)
        later = [{"role": "assistant", "content": answer}, {"role": "user", "content": example.follow_ups[0]}]
        expected.append(encoder.encode([*example.messages, *later]))
        # Templates leave the thinking of earlier turns out, and keep what was said.
        assert answer.split("</think>")[-1].strip() in bundled_tokenizer.decode(expected[-1])
    assert [prompts for _, prompts, _, _ in second] == [expected] * 3
    for result in found.values():
        assert [p.prompt_tokens for p in result.prompts if p.turn] == [len(ids) for ids in expected]


def test_examples_with_other_numbers_of_turns_keep_their_order(evaluate_bundled: Run) -> None:
    examples = [talk(0), talk(1, "Why?"), talk(2, "Why?", "Why?"), talk(3)]
    result = evaluate_bundled(examples=examples, batch_size=4, max_new_tokens=6)
    assert [(p.id, p.turn) for p in result.prompts] == [
        ("test-0", 0), ("test-1", 0), ("test-1", 1), ("test-2", 0), ("test-2", 1), ("test-2", 2), ("test-3", 0),
    ]  # fmt: skip
    assert result.mismatches == []


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_entropy_counts(temperature: float, evaluate_bundled: Run, bundled_pair: Pair, spied: Spied) -> None:
    """Against plain forwards over the whole texts, slot by slot."""
    target = bundled_pair[0]
    result = evaluate_bundled(max_new_tokens=200, limit=2, temperature=temperature)
    decoded = [d for decoder, _, _, ds in spied[2:] if decoder.drafter for d in ds]
    assert len(decoded) == 2
    for prompt, text in zip(result.prompts, decoded, strict=True):
        logits = target.model(torch.tensor([text.tokens])).logits[0].double() / (temperature or 1.0)
        tested, accepted = [0] * len(EDGES), [0] * len(EDGES)
        place = len(text.prompt)
        for n, emitted, proposals in zip(text.accepted, text.emitted, text.proposals, strict=True):
            for slot in range(len(proposals)):
                if slot > n or place + 1 + slot >= len(text.tokens):
                    continue
                law = logits[place + slot].softmax(-1)
                entropy = float(-(law * law.log()).nansum())
                bin_ = max(i for i, edge in enumerate(EDGES) if entropy >= edge or i == 0)
                tested[bin_] += 1
                accepted[bin_] += slot < n
            place += emitted
        assert (prompt.entropy_tested, prompt.entropy_accepted) == (tested, accepted)
        assert sum(tested) > len(text.accepted) and sum(bool(t) for t in tested) > 1
        assert sum(accepted) == sum(min(n, e) for n, e in zip(text.accepted, text.emitted, strict=True))
    assert result.acceptance_by_entropy()[0][1] > result.acceptance_by_entropy()[-1][1]


def test_tested_slots_are_the_accepted_and_the_first_rejections(evaluate_bundled: Run, bundled_pair: Pair) -> None:
    result = evaluate_bundled(max_new_tokens=200)
    slots = bundled_pair[1].block_size - 1
    for prompt in result.prompts:
        rejections = sum(n < slots and e == n + 1 for n, e in zip(prompt.accepted, prompt.emitted, strict=True))
        assert sum(prompt.entropy_accepted) == sum(prompt.accepted)
        assert sum(prompt.entropy_tested) == sum(prompt.accepted) + rejections


def test_drafts_are_kept_of_the_first_few(
    evaluate_all: EvaluateAll, bundled_drafters: dict[str, Drafter], bundled_tokenizer: PreTrainedTokenizerBase,
    spied: Spied,
) -> None:  # fmt: skip
    examples = [talk(0, "Why?"), talk(1), talk(2)]
    found = evaluate_all(bundled_drafters, examples, shown=2)
    for name, result in found.items():
        assert [(p.id, p.turn) for p in result.prompts if p.drafts] == [("test-0", 0), ("test-0", 1), ("test-1", 0)]
        assert [p.question for p in result.prompts] == [
            examples[0].messages[0]["content"], "Why?", examples[1].messages[0]["content"], "",
        ]  # fmt: skip
        mine = [d[0] for decoder, _, _, d in spied[3:] if decoder.drafter is bundled_drafters[name]]
        for prompt, decoded in zip(result.prompts[:3], mine[:3], strict=True):
            assert len(prompt.drafts) == len(prompt.emitted) + 1
            text = "".join(block.accepted + block.emitted for block in prompt.drafts)
            assert text == bundled_tokenizer.decode(decoded.response)
    assert not any(p.drafts for p in evaluate_all(bundled_drafters, shown=0)["sft"].prompts)


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
    monkeypatch.setattr(step, "verify_matching", too_generous)
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
    monkeypatch.setattr(step, "verify_matching", wrong_slot)
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
    # The first slot of the block cut short was accepted, its second never tested.
    assert result.acceptance_by_position() == pytest.approx([3 / 4, 1.0, 1 / 2])
    assert result.mean_accepted == pytest.approx(5 / 3)
    assert result.tau == pytest.approx((9 / 4, (5 / 3 + 4) / 2))


def test_rates(make_result: Callable[..., PromptResult]) -> None:
    prompts = [make_result(0), make_result(1, response_tokens=12, plain_response_tokens=9, solved=False)]
    result = Evaluation("x", 4, Settings(), prompts)
    assert (result.plain_rate, result.speculative_rate, result.speedup) == (15 / 6, 18 / 2, pytest.approx((3 + 4) / 2))
    assert result.solved == 0.5
    slow = replace(result, prompts=[*prompts, make_result(2, speculative_seconds=100.0)])
    assert slow.speedup == pytest.approx(3.0)
    unknown = Evaluation("x", 4, Settings(), [make_result(solved=None)])
    assert unknown.solved is None


def test_tau_by_length(make_result: Callable[..., PromptResult]) -> None:
    """Blocks are counted where they begin; the prefill's token comes before the first."""
    prompts = [make_result(0, accepted=[2] * 400, emitted=[3] * 400), make_result(1, accepted=[0] * 2, emitted=[1] * 2)]
    result = Evaluation("x", 4, Settings(), prompts)
    first = len([i for i in range(400) if 1 + 3 * i < 1024])
    assert result.tau_by_length() == [(0, (3 * first + 2) / (first + 2), first + 2), (1024, 3.0, 400 - first)]
    endless = Evaluation("x", 4, Settings(), [make_result(accepted=[3] * 3000, emitted=[4] * 3000)])
    assert [start for start, _, _ in endless.tau_by_length()] == [1024 * i for i in range(8)]


def test_refusals(
    bundled_pair: Pair, bundled_tokenizer: PreTrainedTokenizerBase, target: Target,
    make_drafter: Callable[..., DFlashDrafter],
) -> None:  # fmt: skip
    bundled_target, drafter, _, stop = bundled_pair

    def start(drafters: dict[str, Drafter], examples: list[Example]) -> None:
        """Refused at once, before the first batch is asked for."""
        evaluate(bundled_target, drafters, bundled_tokenizer, "x", examples, stop, Settings())

    with pytest.raises(PromptError, match="benchmark x holds no prompts"):
        start({"a": drafter}, [])
    long = Example("long", [{"role": "user", "content": "Mia has 3 apples. " * 2000}])
    with pytest.raises(PromptError, match="Prompt 1 has"):
        start({"a": drafter}, [*ReasoningBenchmark().examples(1), long])
    with pytest.raises(DrafterError, match="hidden size"):
        start({"a": drafter, "b": make_drafter(target)}, ReasoningBenchmark().examples(1))


def test_a_later_turn_that_does_not_fit_is_refused(evaluate_bundled: Run) -> None:
    with pytest.raises(PromptError, match="Prompt 0 has"):
        evaluate_bundled(examples=[talk(0, "Mia has 3 apples. " * 2000)])


def test_speedup_is_of_batches(make_result: Callable[..., PromptResult]) -> None:
    """Seconds are a batch's, so a prompt alone says nothing of speed: here each batch takes half as long."""
    lengths = [(10, 100), (100, 10), (20, 10), (90, 30)]
    prompts = [
        make_result(
            i,
            response_tokens=drafted,
            plain_response_tokens=plain,
            plain_seconds=1.0,
            speculative_seconds=0.5,
            batch=f"b{i // 2}",
        )
        for i, (drafted, plain) in enumerate(lengths)
    ]
    result = Evaluation("x", 4, Settings(batch_size=2), prompts)
    assert result.speedups() == pytest.approx({"b0": 2.0, "b1": 2 * 110 / 40})
    assert result.speedup == pytest.approx((2.0 + 5.5) / 2)


def test_batches_are_named(evaluate_bundled: Run) -> None:
    assert [p.batch for p in evaluate_bundled(batch_size=2).prompts] == ["test-0", "test-0", "test-2"]
