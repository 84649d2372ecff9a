"""The tables and the file."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from draftopd.evaluation.lossless import Mismatch
from draftopd.evaluation.report import MISMATCHES_SHOWN, print_evaluation, summary, write_evaluation
from draftopd.evaluation.runner import Evaluation, PromptResult
from draftopd.evaluation.settings import Settings

Make = Callable[..., PromptResult]
TIE = Mismatch(position=4, plain_token=17, speculative_token=23, logit_gap=0.25)


def shown(result: Evaluation) -> str:
    console = Console(file=io.StringIO(), width=80)
    print_evaluation(result, console)
    return console.file.getvalue()  # type: ignore[attr-defined]


def row(text: str, name: str) -> str:
    """The cell beside a row's name in the headline table."""
    return next(line for line in text.splitlines() if f"│ {name} " in line).split("│")[2].strip()


def strictly(text: str) -> dict:
    """JSON as the standard has it, which knows no NaN."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


def test_headline(make_result: Make) -> None:
    prompts = [make_result(0), make_result(1, accepted=[3], emitted=[4], solved=False)]
    text = shown(Evaluation("reasoning", 4, Settings(batch_size=16), prompts))
    assert "reasoning: 2 prompts, batch 16, temperature 0" in text
    assert row(text, "tau, micro") == "3.000" and row(text, "tau, macro") == "3.250"
    assert row(text, "mean accepted") == "2.500 of 3 proposals"
    assert row(text, "plain") == "2.0 tokens/s" and row(text, "with the drafter") == "6.0 tokens/s"
    assert row(text, "speedup") == "3.00x"
    assert row(text, "answers right") == "50.0%"
    assert row(text, "lossless") == "2 of 2 equal to plain decoding"


def test_positions(make_result: Make) -> None:
    result = Evaluation("x", 4, Settings(), [make_result(0, accepted=[0, 1, 1, 3], emitted=[1, 2, 2, 4])])
    cells = [[c.strip() for c in line.split("│")[1:-1]] for line in shown(result).splitlines() if line.count("│") == 4]
    assert cells == [["1", "0.75", "1"], ["2", "0.33", "2"], ["3", "1.00", "0"], ["none", "", "1"]]


def test_not_lossless_prints_no_speedup(make_result: Make) -> None:
    result = Evaluation("x", 4, Settings(), [make_result(0), make_result(1, mismatch=TIE), make_result(2)])
    text = shown(result)
    assert row(text, "speedup") == "none, not lossless: 1 of 3 texts differ"
    assert "3.00x" not in text
    assert row(text, "lossless") == "2 of 3 equal to plain decoding"
    assert "test-1: differs from plain decoding at response token 4: 23 instead of 17" in " ".join(text.split())
    assert "logit gap +2.50e-01" in " ".join(text.split())
    figures = summary(result)
    assert figures["speedup"] is None and figures["speedup_withheld"].startswith("not lossless")
    assert figures["mismatches"] == 1


def test_texts_that_end_early_and_many_mismatches(make_result: Make) -> None:
    ends = [Mismatch(3, 9, None, None), Mismatch(3, None, 9, None)]
    text = " ".join(shown(Evaluation("x", 4, Settings(), [make_result(mismatch=m) for m in ends])).split())
    assert "it ends there, plain decoding goes on with token 9" in text
    assert "plain decoding ends there, it goes on with token 9" in text
    many = [make_result(i, mismatch=TIE) for i in range(MISMATCHES_SHOWN + 3)]
    text = shown(Evaluation("x", 4, Settings(), many))
    assert text.count("instead of") == MISMATCHES_SHOWN and "and 3 more" in text


def test_above_temperature_0(make_result: Make) -> None:
    text = shown(Evaluation("x", 4, Settings(temperature=0.7), [make_result()]))
    assert row(text, "lossless") == "token equality does not apply above temperature 0"
    assert row(text, "speedup") == "3.00x" and "temperature 0.7" in text


def test_answers_are_left_out_where_none_are_known(make_result: Make) -> None:
    assert "answers right" not in shown(Evaluation("x", 4, Settings(), [make_result(solved=None)]))


@pytest.mark.parametrize("block_size", [8, 16, 32])
def test_any_block_size_fits_the_terminal(make_result: Make, block_size: int) -> None:
    text = shown(Evaluation("x", block_size, Settings(), [make_result()]))
    assert "…" not in text and f"│ {block_size - 1:8d} │" in text


def test_what_cannot_be_said_is_a_dash_and_null(make_result: Make, tmp_path: Path) -> None:
    """Responses that ended with their first token have no block."""
    result = Evaluation("x", 3, Settings(), [make_result(accepted=[], emitted=[])])
    assert math.isnan(result.tau[0])
    text = shown(result)
    assert row(text, "tau, micro") == "-" and "nan" not in text
    write_evaluation(result, tmp_path / "results.json", {})
    figures = strictly((tmp_path / "results.json").read_text())["summary"]
    assert figures["tau_micro"] is None and figures["acceptance_by_position"] == [None, None]


def test_a_target_gone_wrong_does_not_lose_the_file(make_result: Make, tmp_path: Path) -> None:
    result = Evaluation("x", 4, Settings(), [make_result(mismatch=Mismatch(0, 1, 2, math.nan))])
    write_evaluation(result, tmp_path / "results.json", {})
    assert strictly((tmp_path / "results.json").read_text())["prompts"][0]["mismatch"]["logit_gap"] is None


def test_file(make_result: Make, tmp_path: Path) -> None:
    result = Evaluation("x", 4, Settings(), [make_result(0), make_result(1, mismatch=TIE)])
    path = tmp_path / "results.json"
    path.write_text("older")
    write_evaluation(result, path, {"seed": 3})
    content = strictly(path.read_text())
    assert content["seed"] == 3 and content["summary"] == json.loads(json.dumps(summary(result)))
    first, second = content["prompts"]
    assert first["id"] == "test-0" and first["emitted"] == [3, 2] and first["mismatch"] is None
    assert second["mismatch"] == {"position": 4, "plain_token": 17, "speculative_token": 23, "logit_gap": 0.25}
    assert [p.name for p in tmp_path.iterdir()] == ["results.json"]
