"""Speculative decoding is lossless, and keeps its books."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
from tests.support.laws import correction_from_target
from tests.support.models import DRAFTERS, KINDS, MakeDrafter, MakeTarget
from torch import Tensor

from draftopd.bundled.problems import problems
from draftopd.decoding import step
from draftopd.decoding.generate import Decoded, Decoder
from draftopd.decoding.rules import Rules
from draftopd.decoding.sampling import Sampling
from draftopd.decoding.verify import Verification
from draftopd.drafters.base import Chooser, Draft, Drafter
from draftopd.drafters.config import DrafterConfig
from draftopd.drafters.load import load_drafter
from draftopd.errors import DrafterError, PromptError
from draftopd.io.hub import resolve
from draftopd.targets.load import load_target, load_tokenizer, stop_tokens
from draftopd.targets.shape import TargetShape
from draftopd.targets.target import Target

NEW_TOKENS = 24


class Rows:
    """Which prompts are still decoded."""

    def __init__(self) -> None:
        self.rows: Tensor | None = None

    def select(self, rows: Tensor) -> None:
        assert self.rows is not None
        self.rows = self.rows[rows]


class Prophet(Drafter):
    """A test double that knows how each row of a batch goes on, and lies at some positions.

    ``texts[row]`` are prompt and response; at positions in ``lies[row]`` another token is proposed.
    """

    def __init__(self, texts: Sequence[list[int]], block_size: int, lies: Sequence[set[int]] | None = None) -> None:
        super().__init__(DrafterConfig(TargetShape(32, 64, 4), block_size, (0,)))
        self.texts = texts
        self.lies = lies or [set() for _ in texts]

    def start(self, capacity: int) -> list[Rows]:
        return [Rows()]

    def select(self, state: list[Rows], rows: Tensor) -> None:
        state[0].select(rows)

    def observe(self, target: Target, state: list[Rows], features: Tensor, ids: Tensor, positions: Tensor) -> None:
        if state[0].rows is None:
            state[0].rows = torch.arange(len(positions))

    def draft(
        self,
        target: Target,
        state: list[Rows],
        anchors: Tensor,
        anchor_tokens: Tensor,
        visible: int,
        choose: Chooser,
    ) -> Draft:
        assert state[0].rows is not None
        tokens = torch.zeros(len(anchors), self.num_proposals, dtype=torch.long)
        for i, (row, anchor) in enumerate(zip(state[0].rows.tolist(), anchors.tolist(), strict=True)):
            assert self.texts[row][anchor] == anchor_tokens[i]
            for k in range(self.num_proposals):
                position = anchor + 1 + k
                known = self.texts[row][position] if position < len(self.texts[row]) else 0
                tokens[i, k] = (known + (position in self.lies[row])) % target.vocab_size
        return Draft(torch.zeros(*tokens.shape, 1), tokens[:, None])

    def replay(self, *_: object) -> Draft:
        raise NotImplementedError


def random_prompts(count: int, vocabulary: int = 64, seed: int = 0) -> list[list[int]]:
    """Prompts of 1 to 12 tokens."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 13, (count,), generator=generator).tolist()
    return [torch.randint(vocabulary, (n,), generator=generator).tolist() for n in lengths]


def decode_all(decoder: Decoder, prompts: list[list[int]], batch_size: int, seed: int = 0) -> list[Decoded]:
    return [result for batch in decoder.decode(prompts, batch_size, seed) for result in batch]


@torch.no_grad()
def greedy_reference(target: Target, prompt: list[int], new_tokens: int, stop: frozenset[int]) -> list[int]:
    """Plain greedy decoding that computes the whole sequence anew for every token."""
    tokens = list(prompt)
    while len(tokens) < len(prompt) + new_tokens:
        tokens.append(int(target.model(torch.tensor([tokens])).logits[0, -1].argmax()))
        if tokens[-1] in stop:
            break
    return tokens[len(prompt) :]


def check_books(result: Decoded, block_size: int, max_new_tokens: int, stop: frozenset[int]) -> None:
    """Anchors, accepted lengths, emitted tokens and proposals of one result tell one story."""
    blocks = len(result.anchors)
    assert blocks == len(result.accepted) == len(result.emitted) == len(result.proposals)
    assert len(result.response) == 1 + sum(result.emitted) <= max_new_tokens
    assert result.tokens == result.prompt + result.response
    position = len(result.prompt)
    for i in range(blocks):
        accepted, emitted = result.accepted[i], result.emitted[i]
        assert result.anchors[i] == position
        assert len(result.proposals[i]) == block_size - 1
        assert result.proposals[i][:accepted] == result.tokens[position + 1 : position + 1 + accepted]
        if i < blocks - 1:
            assert emitted == accepted + 1
            assert result.anchors[i + 1] == position + accepted + 1
        else:
            assert accepted <= emitted <= accepted + 1
        if emitted == accepted + 1 and accepted < block_size - 1:
            assert result.proposals[i][accepted] != result.tokens[position + 1 + accepted]
        position += emitted
    assert position == len(result.tokens) - 1
    assert not stop & set(result.response[:-1])
    if result.finish == "stop":
        assert result.response[-1] in stop
    else:
        assert result.finish == "length" and len(result.response) == max_new_tokens
        assert result.response[-1] not in stop


def until_stop(response: list[int], stop: frozenset[int], limit: int = NEW_TOKENS) -> list[int]:
    """The response up to its first stop token, and no longer than the limit."""
    first = next((i for i, token in enumerate(response) if token in stop), limit)
    return response[: min(first + 1, limit)]


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    return random_prompts(12)


@pytest.fixture(scope="module")
def continued(make_target: MakeTarget, prompts: list[list[int]]) -> list[list[int]]:
    """Each prompt's greedy continuation, beyond the response limit."""
    target = make_target("qwen3")
    return [greedy_reference(target, prompt, NEW_TOKENS + 8, frozenset()) for prompt in prompts]


@pytest.fixture(scope="module")
def text(make_target: MakeTarget) -> tuple[list[int], list[int]]:
    """A prompt and its greedy continuation, whose first six tokens differ."""
    target = make_target("qwen3")
    for prompt in random_prompts(200, seed=3):
        if len(set(greedy_reference(target, prompt, 6, frozenset()))) == 6:
            return prompt, greedy_reference(target, prompt, 20, frozenset())
    raise AssertionError("no prompt has a varied continuation")


class TestGreedy:
    @pytest.mark.parametrize("batch_size", [1, 3, 8])
    @pytest.mark.parametrize("stop", [frozenset(), frozenset(range(0, 64, 9))])
    def test_random_drafters_change_nothing(
        self,
        target: Target,
        make_any: MakeDrafter,
        prompts: list[list[int]],
        continued: list[list[int]],
        batch_size: int,
        stop: frozenset[int],
    ) -> None:
        expected = [until_stop(response, stop) for response in continued]
        drafters = [None, *(make_any(drafts, target) for drafts in DRAFTERS)]
        drafters.append(make_any("dflash", target, num_layers=1, block_size=7, target_layer_ids=(1,), seed=1))
        for drafter in drafters:
            decoder = Decoder(target, drafter, Rules(stop=stop, max_new_tokens=NEW_TOKENS))
            results = decode_all(decoder, prompts, batch_size)
            assert [r.prompt for r in results] == prompts
            assert [r.response for r in results] == expected
            for result in results:
                check_books(result, drafter.block_size if drafter else 1, NEW_TOKENS, stop)
        if stop:
            assert len({len(response) for response in expected}) > 3

    @pytest.mark.parametrize("batch_size", [1, 3, 8])
    @pytest.mark.parametrize("stop", [frozenset(), frozenset(range(0, 64, 9))])
    def test_a_half_right_drafter_changes_nothing(
        self,
        target: Target,
        prompts: list[list[int]],
        continued: list[list[int]],
        batch_size: int,
        stop: frozenset[int],
    ) -> None:
        """Accepted lengths of every size, rows that part ways and end at different steps."""
        expected = [until_stop(response, stop) for response in continued]
        generator = torch.Generator().manual_seed(0)
        accepted = set()
        for start in range(0, len(prompts), batch_size):
            batch = prompts[start : start + batch_size]
            texts = [p + c for p, c in zip(batch, continued[start:], strict=False)]
            lies = [set((torch.rand(60, generator=generator) < 0.3).nonzero()[:, 0].tolist()) for _ in batch]
            prophet = Prophet(texts, block_size=5, lies=lies)
            results = Decoder(target, prophet, Rules(stop=stop, max_new_tokens=NEW_TOKENS)).decode_batch(batch)
            assert [r.response for r in results] == expected[start : start + batch_size]
            for result in results:
                check_books(result, 5, NEW_TOKENS, stop)
                accepted |= set(result.accepted)
        assert accepted == {0, 1, 2, 3, 4}

    @pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "qwen3"])
    def test_other_kinds_of_target(
        self, kind: str, make_target: MakeTarget, make_any: MakeDrafter, prompts: list[list[int]]
    ) -> None:
        target = make_target(kind)
        expected = [greedy_reference(target, prompt, NEW_TOKENS, frozenset()) for prompt in prompts]
        for drafter in (None, *(make_any(drafts, target) for drafts in DRAFTERS)):
            results = decode_all(Decoder(target, drafter, Rules(max_new_tokens=NEW_TOKENS)), prompts, batch_size=5)
            assert [r.response for r in results] == expected

    def test_equals_transformers_generate(
        self, target: Target, make_drafter: MakeDrafter, prompts: list[list[int]]
    ) -> None:
        stop = frozenset(range(0, 64, 9))
        results = decode_all(
            Decoder(target, make_drafter(target), Rules(stop=stop, max_new_tokens=NEW_TOKENS)), prompts, 4
        )
        for prompt, result in zip(prompts, results, strict=True):
            ids = torch.tensor([prompt])
            output = target.model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False,
                eos_token_id=sorted(stop), pad_token_id=0,
            )  # fmt: skip
            assert result.tokens == output[0].tolist()

    @pytest.mark.parametrize("drafts", DRAFTERS)
    @pytest.mark.parametrize("sampling", [Sampling(), Sampling(1.0)], ids=["greedy", "target_only"])
    def test_the_decoders_drafts_are_the_replays(
        self, drafts: str, target: Target, make_any: MakeDrafter, prompts: list[list[int]], sampling: Sampling
    ) -> None:
        """What was proposed while decoding ragged batches is what replay proposes at the same anchors."""
        drafter = make_any(drafts, target)
        stop = frozenset(range(0, 64, 9))
        decoder = Decoder(target, drafter, Rules(sampling, "target_only", stop=stop, max_new_tokens=NEW_TOKENS))
        results = decode_all(decoder, prompts, batch_size=8)
        assert sum(len(r.anchors) for r in results) > 50
        for result in results:
            if result.anchors:
                ids, anchors = torch.tensor([result.tokens]), torch.tensor([result.anchors])
                features = target.read(ids, target.new_cache(ids.shape[1])).features
                draft = drafter.replay(target, features, ids, anchors, drafter.head(target).best_tokens)
                assert draft.tokens[0].tolist() == result.proposals


class TestEnds:
    """Where a response ends: by a stop token anywhere in a block, or by the limit."""

    def decode(
        self,
        target: Target,
        text: tuple[list[int], list[int]],
        lies: set[int] | None = None,
        stop: frozenset[int] = frozenset(),
        max_new_tokens: int = 20,
        block_size: int = 4,
    ) -> Decoded:
        """``lies`` are places in the response where the drafter errs."""
        prompt, continuation = text
        lies = {len(prompt) + i for i in lies or ()}
        prophet = Prophet([prompt + continuation], block_size, [lies])
        result = Decoder(target, prophet, Rules(stop=stop, max_new_tokens=max_new_tokens)).decode_batch([prompt])[0]
        check_books(result, block_size, max_new_tokens, stop)
        assert result.response == continuation[: len(result.response)]
        return result

    def test_first_token(self, target: Target, text: tuple[list[int], list[int]]) -> None:
        result = self.decode(target, text, stop=frozenset({text[1][0]}))
        assert (len(result.response), result.finish) == (1, "stop")
        assert result.anchors == result.accepted == result.emitted == result.proposals == []
        assert math.isnan(result.acceptance_length)

    def test_inside_an_accepted_prefix(self, target: Target, text: tuple[list[int], list[int]]) -> None:
        result = self.decode(target, text, stop=frozenset({text[1][2]}))
        assert (len(result.response), result.finish) == (3, "stop")
        assert (result.accepted, result.emitted) == ([2], [2])
        assert result.acceptance_length == 2

    def test_as_correction(self, target: Target, text: tuple[list[int], list[int]]) -> None:
        result = self.decode(target, text, lies={2}, stop=frozenset({text[1][2]}))
        assert (len(result.response), result.finish) == (3, "stop")
        assert (result.accepted, result.emitted) == ([1], [2])

    def test_as_bonus(self, target: Target, text: tuple[list[int], list[int]]) -> None:
        result = self.decode(target, text, stop=frozenset({text[1][4]}))
        assert (len(result.response), result.finish) == (5, "stop")
        assert (result.accepted, result.emitted) == ([3], [4])

    def test_a_rejected_stop_token_does_not_end(self, target: Target, text: tuple[list[int], list[int]]) -> None:
        wrong = (text[1][2] + 1) % 64
        result = self.decode(target, text, lies={2}, stop=frozenset({wrong} - set(text[1])), max_new_tokens=8)
        assert result.proposals[0][1] == wrong
        assert result.finish == "length"

    def test_the_limit_cuts_a_block(self, target: Target, text: tuple[list[int], list[int]]) -> None:
        for limit, accepted, emitted in [(6, [3, 1], [4, 1]), (5, [3], [4]), (4, [3], [3]), (1, [], [])]:
            result = self.decode(target, text, max_new_tokens=limit)
            assert (len(result.response), result.finish) == (limit, "length")
            assert (result.accepted, result.emitted) == (accepted, emitted)

    def test_stop_at_the_limit(self, target: Target, text: tuple[list[int], list[int]]) -> None:
        assert self.decode(target, text, stop=frozenset({text[1][5]}), max_new_tokens=6).finish == "stop"
        assert self.decode(target, text, stop=frozenset({text[1][5]}), max_new_tokens=5).finish == "length"

    @pytest.mark.parametrize("block_size", [2, 5, 9])
    def test_a_perfect_drafter(self, target: Target, text: tuple[list[int], list[int]], block_size: int) -> None:
        limit = 1 + 2 * block_size
        result = self.decode(target, text, max_new_tokens=limit, block_size=block_size)
        assert result.accepted == [block_size - 1] * 2
        assert result.acceptance_length == block_size

    def test_a_drafter_that_always_errs(self, target: Target, text: tuple[list[int], list[int]]) -> None:
        result = self.decode(target, text, lies=set(range(30)), max_new_tokens=9)
        assert result.accepted == [0] * 8
        assert result.acceptance_length == 1

    def test_plain_decoding(self, target: Target, text: tuple[list[int], list[int]]) -> None:
        result = Decoder(target, None, Rules(max_new_tokens=9)).decode_batch([text[0]])[0]
        assert result.acceptance_length == 1
        assert result.anchors == list(range(len(text[0]), len(text[0]) + 8))


class TestSampled:
    """Above temperature 0, over six tokens, against the target's own law written out in full."""

    #: The first block, bonus included, fits in.
    LENGTH, BLOCK = 4, 3
    ROWS, BATCHES = 4096, 3
    PROMPTS = ([2, 5, 1], [4])

    @pytest.fixture
    def target(self, small_vocabulary_target: Target) -> Target:
        return small_vocabulary_target

    @torch.no_grad()
    def law(self, target: Target, prompt: list[int], sampling: Sampling) -> Tensor:
        """``[6] * LENGTH``: the law of the response's tokens under plain sampling."""
        law = torch.ones(1)
        prefixes = torch.tensor([prompt])
        for _ in range(self.LENGTH):
            probs = sampling.probabilities(target.model(prefixes).logits[:, -1])
            law = (law[:, None] * probs).flatten()
            extended = prefixes.repeat_interleave(6, 0)
            prefixes = torch.cat([extended, torch.arange(6).repeat(len(prefixes))[:, None]], 1)
        return law

    def p_values(
        self,
        target: Target,
        drafter: Drafter | None,
        sampling: Sampling,
        verification: Verification,
        chi_square: Callable[[Tensor, Tensor], float],
    ) -> list[float]:
        """For each prompt, decoded in mixed batches, the chi-square test against its law."""
        decoder = Decoder(target, drafter, Rules(sampling, verification, max_new_tokens=self.LENGTH))
        prompts = list(self.PROMPTS) * (self.ROWS * self.BATCHES // 2)
        results = decode_all(decoder, prompts, self.ROWS, seed=1)
        if drafter is not None:
            assert {n for r in results for n in r.accepted} == {0, 1, 2}
        found = []
        for prompt in self.PROMPTS:
            responses = torch.tensor([r.response for r in results if r.prompt == prompt])
            outcomes = (responses * 6 ** torch.arange(self.LENGTH - 1, -1, -1)).sum(1)
            found.append(chi_square(outcomes, self.law(target, prompt, sampling)))
        return found

    @pytest.mark.parametrize(
        ("drafts", "verification"),
        [("none", "plain"), *product(("dflash", "eagle3_reduced", "mtp"), ("rejection_sampling", "target_only"))],
    )
    @pytest.mark.parametrize("sampling", [Sampling(1.0), Sampling(0.7, top_k=4, top_p=0.9)], ids=["plain", "warped"])
    def test_the_law_is_the_targets(
        self,
        target: Target,
        make_any: MakeDrafter,
        drafts: str,
        verification: str,
        sampling: Sampling,
        chi_square: Callable[[Tensor, Tensor], float],
    ) -> None:
        plain = verification == "plain"
        drafter = None if plain else make_any(drafts, target, block_size=self.BLOCK)
        rule: Verification = "rejection_sampling" if plain else verification
        assert min(self.p_values(target, drafter, sampling, rule, chi_square)) > 1e-3

    def test_a_wrong_residual_is_noticed(
        self,
        target: Target,
        make_drafter: MakeDrafter,
        chi_square: Callable[[Tensor, Tensor], float],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr(step, "verify_rejection", correction_from_target)
        drafter = make_drafter(target, block_size=self.BLOCK)
        values = self.p_values(target, drafter, Sampling(1.0), "rejection_sampling", chi_square)
        assert max(values) < 1e-9

    def test_unwarped_proposals_are_noticed(
        self,
        target: Target,
        make_drafter: MakeDrafter,
        chi_square: Callable[[Tensor, Tensor], float],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """Proposals drawn from another distribution than the one verification divides by."""
        sampling = Sampling(0.7, top_k=4)
        decoder_init = Decoder.__init__

        def init(decoder: Decoder, *args: object, **kwargs: object) -> None:
            decoder_init(decoder, *args, **kwargs)

            class Mismatched(Sampling):
                def choose(self, logits: Tensor, generator: torch.Generator | None = None) -> Tensor:
                    return Sampling(1.0).choose(logits, generator)

            class MismatchedRules(Rules):
                draft_sampling = Mismatched(0.7, top_k=4)  # type: ignore[assignment]

            decoder.rules = MismatchedRules(**vars(decoder.rules))

        monkeypatch.setattr(Decoder, "__init__", init)
        values = self.p_values(
            target, make_drafter(target, block_size=self.BLOCK), sampling, "rejection_sampling", chi_square
        )
        assert max(values) < 1e-9

    @pytest.mark.parametrize("verification", ["rejection_sampling", "target_only"])
    def test_seeds_reproduce(self, target: Target, make_drafter: MakeDrafter, verification: Verification) -> None:
        decoder = Decoder(target, make_drafter(target), Rules(Sampling(1.0), verification, max_new_tokens=20))
        prompts = random_prompts(10, vocabulary=6)
        first = decode_all(decoder, prompts, batch_size=4, seed=5)
        assert first == decode_all(decoder, prompts, batch_size=4, seed=5)
        assert first != decode_all(decoder, prompts, batch_size=4, seed=6)
        for result in first:
            assert len(result.response) == 20
        same = decode_all(decoder, [prompts[0]] * 6, batch_size=2, seed=5)
        assert len({tuple(r.response) for r in same}) == 6

    def test_stop_tokens(self, target: Target, make_drafter: MakeDrafter) -> None:
        decoder = Decoder(target, make_drafter(target), Rules(Sampling(1.0), stop=frozenset({3}), max_new_tokens=9))
        results = decode_all(decoder, random_prompts(60, vocabulary=6), batch_size=20)
        assert {r.finish for r in results} == {"stop", "length"}
        assert all(3 not in r.response[:-1] for r in results)
        assert all((r.response[-1] == 3) == (r.finish == "stop") for r in results)


class TestPrompts:
    def test_empty(self, target: Target) -> None:
        with pytest.raises(PromptError, match="Prompt 1 is empty"):
            decode_all(Decoder(target, None, Rules(max_new_tokens=4)), [[1], []], batch_size=2)

    def test_too_long(self, target: Target, make_drafter: MakeDrafter) -> None:
        decoder = Decoder(target, make_drafter(target, block_size=6), Rules(max_new_tokens=20))
        room = target.max_positions - 20 - 6
        decoder.check([1] * room)
        with pytest.raises(PromptError, match=rf"Prompt 2 has {room + 1} tokens.*max_new_tokens=20.*{room}"):
            decode_all(decoder, [[1], [2], [3] * (room + 1)], batch_size=3)

    def test_the_longest_prompt_decodes_to_the_limit(self, target: Target, make_drafter: MakeDrafter) -> None:
        room = target.max_positions - 20 - 4
        prompts = [[3, 9] * (room // 2), [5]]
        results = [
            decode_all(Decoder(target, drafter, Rules(max_new_tokens=20)), prompts, batch_size=2)
            for drafter in (None, make_drafter(target))
        ]
        assert [r.response for r in results[0]] == [r.response for r in results[1]]
        assert all(len(r.response) == 20 for r in results[1])

    def test_batches_keep_the_prompts_order(self, target: Target) -> None:
        prompts = random_prompts(7)
        batches = list(Decoder(target, None, Rules(max_new_tokens=2)).decode(prompts, batch_size=3))
        assert [len(batch) for batch in batches] == [3, 3, 1]
        assert [r.prompt for batch in batches for r in batch] == prompts

    def test_a_misfit_is_refused_before_decoding(self, target: Target, make_drafter: MakeDrafter) -> None:
        drafter = make_drafter(target)
        drafter.config = replace(drafter.config, target_layer_ids=(0, 4))
        with pytest.raises(DrafterError, match=r"\[4\].*0 to 3"):
            Decoder(target, drafter)


#: So that some responses end by themselves and others by the limit.
BUNDLED_NEW_TOKENS = 96


@pytest.fixture(scope="module")
def bundled_target() -> Target:
    for name in ("tiny_target", "tiny_dflash"):
        if not (Path(resolve(f"bundled:{name}")) / "model.safetensors").exists():
            pytest.skip(f"bundled:{name} is not built")
    return load_target("bundled:tiny_target", dtype="float32")


@pytest.fixture(scope="module")
def bundled_stop(bundled_target: Target) -> frozenset[int]:
    return stop_tokens(bundled_target, load_tokenizer("bundled:tiny_target"))


@pytest.fixture(scope="module")
def bundled_prompts(bundled_target: Target) -> list[list[int]]:
    """500 held-out problems."""
    tokenizer = load_tokenizer("bundled:tiny_target")
    chats = [[{"role": "user", "content": p.question}] for p in problems("test", 500)]
    texts = tokenizer.apply_chat_template(chats, add_generation_prompt=True, tokenize=False)
    return tokenizer(texts, add_special_tokens=False).input_ids


@pytest.fixture(scope="module")
def bundled_responses(
    bundled_target: Target, bundled_prompts: list[list[int]], bundled_stop: frozenset[int]
) -> list[list[int]]:
    """Plain greedy decoding, one token a forward."""
    decoder = Decoder(bundled_target, None, Rules(stop=bundled_stop, max_new_tokens=BUNDLED_NEW_TOKENS))
    results = decode_all(decoder, bundled_prompts, batch_size=64)
    assert {result.finish for result in results} == {"stop", "length"}
    return [result.response for result in results]


@pytest.mark.slow
def test_plain_decoding_of_the_bundled_target(
    bundled_target: Target,
    bundled_prompts: list[list[int]],
    bundled_responses: list[list[int]],
    bundled_stop: frozenset[int],
) -> None:
    for prompt, response in zip(bundled_prompts[:2], bundled_responses, strict=False):
        assert greedy_reference(bundled_target, prompt, BUNDLED_NEW_TOKENS, bundled_stop) == response


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "batch_size", "count"),
    [
        ("tiny_dflash", 64, 500),
        ("tiny_dflash", 16, 96),
        ("tiny_dflash", 1, 40),
        ("tiny_eagle3", 64, 200),
        ("tiny_eagle3", 1, 20),
        ("tiny_mtp", 64, 200),
        ("tiny_mtp", 1, 20),
    ],
)
def test_the_bundled_drafters_are_lossless(
    bundled_target: Target,
    bundled_prompts: list[list[int]],
    bundled_responses: list[list[int]],
    bundled_stop: frozenset[int],
    name: str,
    batch_size: int,
    count: int,
) -> None:
    drafter = load_drafter(f"bundled:{name}").eval()
    decoder = Decoder(bundled_target, drafter, Rules(stop=bundled_stop, max_new_tokens=BUNDLED_NEW_TOKENS))
    results = decode_all(decoder, bundled_prompts[:count], batch_size)
    assert len(results) == count
    wrong = [i for i, result in enumerate(results) if result.response != bundled_responses[i]]
    assert not wrong, f"{len(wrong)} of {count} responses differ from plain decoding: prompts {wrong[:10]}"
    for result in results:
        check_books(result, drafter.block_size, BUNDLED_NEW_TOKENS, bundled_stop)
    tau = sum(sum(r.emitted) for r in results) / sum(len(r.emitted) for r in results)
    assert tau > (2 if name == "tiny_dflash" else 5)
