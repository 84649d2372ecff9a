"""The table, the sentences, and the files."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from draftopd.evaluation.cost import Prediction
from draftopd.evaluation.lossless import Mismatch
from draftopd.evaluation.report import (
    HEADINGS,
    MISMATCHES_SHOWN,
    Expected,
    Report,
    notes,
    print_report,
    rows,
    summary,
    verdict,
    write_json,
    write_tables,
)
from draftopd.evaluation.results import Evaluation, PromptResult
from draftopd.evaluation.settings import Settings

Make = Callable[..., PromptResult]
WRONG = Mismatch(position=4, plain_token=17, speculative_token=23, logit_gap=0.25)
TIE = Mismatch(position=4, plain_token=17, speculative_token=23, logit_gap=-2e-4)


def report(*results: Evaluation, expected: list[Expected] | None = None) -> Report:
    return Report("bundled:tiny_target", list(results), expected or [])


def shown(found: Report, width: int = 80) -> str:
    console = Console(file=io.StringIO(), width=width)
    print_report(found, console)
    return console.file.getvalue()


def strictly(text: str) -> dict:
    """JSON as the standard has it, which knows no NaN."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


@pytest.fixture
def two(make_result: Make) -> Report:
    """Two drafters on two benchmarks; the second drafter is better on both."""
    slow = [make_result(i, accepted=[1, 2], emitted=[2, 3]) for i in range(6)]
    fast = [make_result(i, accepted=[3, 2], emitted=[4, 3], speculative_seconds=0.5) for i in range(6)]
    pairs = [("sft", slow), ("opd", fast)]
    settings = Settings(batch_size=16)
    return report(*(Evaluation(b, 4, settings, prompts, name) for b in ("maths", "code") for name, prompts in pairs))


def test_cells(two: Report) -> None:
    cells = rows(two)
    assert [row[:3] for row in cells] == [
        ["maths", "sft", "6"], ["maths", "opd", "6"], ["code", "sft", "6"], ["code", "opd", "6"],
    ]  # fmt: skip
    assert all(len(row) == len(HEADINGS) for row in cells)
    assert cells[0][3:] == ["2.50 [2.50, 2.50]", "2.50", "3.00 [3.00, 3.00]x", "6 (2 plain)", "6 of 6 equal"]
    assert cells[1][3:6] == ["3.50 [3.50, 3.50]", "3.50", "6.00 [6.00, 6.00]x"]


def test_order_of_benchmarks_and_drafters(two: Report) -> None:
    assert two.benchmarks == ["maths", "code"] and two.drafters == ["sft", "opd"]
    assert [r.drafter for r in two.of("code")] == ["sft", "opd"]


def test_printed(two: Report) -> None:
    text = shown(two)
    for words in ("bundled:tiny_target: batch 16", "temperature 0", "256 tokens", "3.50 [3.50, 3.50]", "6 of 6 equal"):
        assert words in text
    assert "…" not in text and max(map(len, text.splitlines())) <= 80
    assert "100.0% of the answers are correct" in text and text.count("are correct") == 2


def test_differences_are_of_neighbours_on_the_same_examples(two: Report, make_result: Make) -> None:
    assert two.differences() == [
        f"{name}: {line}"
        for name in ("maths", "code")
        for line in (
            "tau of opd is 1.000 higher than that of sft: resolved, 95 % interval +1.000 to +1.000.",
            "speedup of opd is 3.000 higher than that of sft: resolved, 95 % interval +3.000 to +3.000.",
        )
    ]
    worse = Evaluation("maths", 4, Settings(), [make_result(i) for i in range(6)], "third")
    first = two.of("maths")
    assert [" of ".join(line.split(" of ")[:3]) for line in report(*first, worse).differences()[2:]] == [
        "maths: tau of third is 1.000 lower than that of opd: resolved, 95 % interval -1.000 to -1.000.",
        "maths: speedup of third is 3.000 lower than that of opd: resolved, 95 % interval -3.000 to -3.000.",
    ]
    assert report(worse).differences() == []


def test_no_speedup_is_compared_with_one_that_is_withheld(make_result: Make) -> None:
    right = Evaluation("x", 4, Settings(), [make_result(0), make_result(1)], "a")
    wrong = Evaluation("x", 4, Settings(), [make_result(0), make_result(1, mismatch=WRONG)], "b")
    (line,) = report(right, wrong).differences()
    assert "tau of b and of a are not resolved: difference +0.000" in line


def test_not_lossless_gives_no_speedup(make_result: Make) -> None:
    result = Evaluation("x", 4, Settings(), [make_result(0), make_result(1, mismatch=WRONG), make_result(2)], "d", 1e-3)
    found = report(result)
    text = " ".join(shown(found).split())
    assert rows(found)[0][5] == "none" and "3.00" not in text
    assert "x, d: no speedup, not lossless: 1 of 3 texts differ." in text
    assert "x, d, test-1: differs from plain decoding at response token 4: 23 instead of 17" in text
    assert "logit gap +2.50e-01" in text
    assert verdict(result) == "2 of 3 equal"
    figures = summary(result)
    assert figures["speedup"] is None and figures["speedup_withheld"].startswith("not lossless")
    assert figures["speedup_interval"] is None
    assert (figures["mismatches"], figures["ties"]) == (1, 0)


def test_a_tie_keeps_its_speedup(make_result: Make) -> None:
    prompts = [make_result(0), make_result(1, mismatch=TIE), make_result(2, mismatch=TIE)]
    result = Evaluation("x", 4, Settings(), prompts, "d", 1e-3)
    assert verdict(result) == "1 of 3 equal, 2 differ by a tie"
    assert result.speedup == 3.0 and summary(result)["ties"] == 2 and summary(result)["tie_tolerance"] == 1e-3
    text = shown(report(result), 200)
    assert "test-1: differs" in text and "logit gap -2.00e-04" in text and "no speedup" not in text
    # The same gap above the tolerance, and one wrong text beside ties.
    assert Evaluation("x", 4, Settings(), prompts, "d", 1e-4).withheld == "not lossless: 2 of 3 texts differ"
    mixed = Evaluation("x", 4, Settings(), [*prompts, make_result(3, mismatch=WRONG)], "d", 1e-3)
    assert mixed.speedup is None and mixed.withheld == "not lossless: 1 of 4 texts differ"
    assert verdict(mixed) == "1 of 4 equal, 2 differ by a tie"


def test_a_text_that_ends_elsewhere_is_not_a_tie(make_result: Make) -> None:
    ends = [Mismatch(3, 9, None, None), Mismatch(3, None, 9, None)]
    result = Evaluation("x", 4, Settings(), [make_result(mismatch=m) for m in ends], tolerance=100.0)
    text = " ".join(shown(report(result)).split())
    assert "it ends there, plain decoding goes on with token 9" in text
    assert "plain decoding ends there, it goes on with token 9" in text
    assert result.ties == [] and result.speedup is None


def test_many_mismatches(make_result: Make) -> None:
    many = [make_result(i, mismatch=WRONG) for i in range(MISMATCHES_SHOWN + 3)]
    text = shown(report(Evaluation("x", 4, Settings(), many)), 200)
    assert text.count("instead of") == MISMATCHES_SHOWN and "and 3 more" in text


def test_above_temperature_0(make_result: Make) -> None:
    hot = Settings(temperature=0.7)
    one = Evaluation("x", 4, hot, [make_result()])
    assert verdict(one) == "not tested" and one.speedup == 3.0 and "temperature 0.7" in shown(report(one))
    alike = [make_result(i, plain_features=[float(i % 3)], features=[float((i + 1) % 3)]) for i in range(30)]
    same = Evaluation("x", 4, hot, alike)
    assert same.distribution_p is not None and same.distribution_p > 0.05
    assert verdict(same) == f"same distribution, p = {same.distribution_p:.2g}" and same.speedup == 3.0
    apart = Evaluation("x", 4, hot, [make_result(i, plain_features=[0.0], features=[1.0]) for i in range(30)])
    assert verdict(apart) == "other distribution, p = 0.0001" and apart.speedup is None
    assert "not distributed as plain sampling's (p = 0.0001)" in " ".join(shown(report(apart)).split())
    assert summary(apart)["law_p"] == pytest.approx(1e-4) and summary(one)["law_p"] is None


def test_answers_are_left_out_where_none_are_known(make_result: Make) -> None:
    assert "are correct" not in shown(report(Evaluation("x", 4, Settings(), [make_result(solved=None)])))


def expectations() -> Expected:
    here = [Prediction(2, 1.6, 0.2, 1.0), Prediction(4, 2.4, 0.5, 1.1)]
    bandwidth = [Prediction(2, 1.6, 0.25, 1.0), Prediction(4, 2.4, 0.25, 1.0)]
    return Expected("sft", here, bandwidth)


def test_expected_beside_measured(two: Report) -> None:
    lines = notes(report(*two.results, expected=[expectations()]))
    assert (
        "sft: a draft step costs 0.50 and a verification of 4 tokens 1.10 plain steps, so 1.50x is expected; measured: "
        "3.00x on maths, 3.00x on code." in lines
    )
    assert (
        "sft: block size 4 is expected to be fastest here (1.50x); if a step costs only the reading of weights, 4 "
        "(1.92x)." in lines
    )


def test_nothing_measured_where_it_was_withheld(make_result: Make) -> None:
    wrong = Evaluation("x", 4, Settings(), [make_result(mismatch=WRONG)], "sft")
    assert "measured: none." in notes(report(wrong, expected=[expectations()]))[0]


def test_what_cannot_be_said_is_a_dash_and_null(make_result: Make, tmp_path: Path) -> None:
    """Responses that ended with their first token have no block."""
    result = Evaluation("x", 3, Settings(), [make_result(accepted=[], emitted=[])])
    assert math.isnan(result.tau[0])
    assert rows(report(result))[0][3:5] == ["-", "-"] and "nan" not in shown(report(result))
    write_json(report(result), tmp_path / "results.json", {})
    (figures,) = strictly((tmp_path / "results.json").read_text())["summaries"]
    assert figures["tau_micro"] is None and figures["acceptance_by_position"] == [None, None]
    assert figures["tau_interval"] == {"value": None, "low": None, "high": None}


def test_a_target_gone_wrong_does_not_lose_the_file(make_result: Make, tmp_path: Path) -> None:
    result = Evaluation("x", 4, Settings(), [make_result(mismatch=Mismatch(0, 1, 2, math.nan))], tolerance=1.0)
    assert result.speedup is None  # a gap that is no number is no tie
    write_json(report(result), tmp_path / "results.json", {})
    assert strictly((tmp_path / "results.json").read_text())["prompts"][0]["mismatch"]["logit_gap"] is None


def test_json(two: Report, tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    path.write_text("older")
    found = report(*two.results, expected=[expectations()])
    write_json(found, path, {"seed": 3})
    content = strictly(path.read_text())
    assert content["seed"] == 3 and content["target"] == "bundled:tiny_target"
    assert content["summaries"] == json.loads(json.dumps([summary(r) for r in found.results]))
    assert content["differences"] == found.differences()
    assert [(p["benchmark"], p["drafter"], p["id"]) for p in content["prompts"][5:7]] == [
        ("maths", "sft", "test-5"), ("maths", "opd", "test-0"),
    ]  # fmt: skip
    assert content["prompts"][0]["emitted"] == [2, 3] and len(content["prompts"]) == 24
    (expected,) = content["expected"]
    assert expected["drafter"] == "sft"
    assert expected["here"][1] == {"block_size": 4, "tau": 2.4, "draft": 0.5, "verify": 1.1, "speedup": 2.4 / 1.6}
    assert [p.name for p in tmp_path.iterdir()] == ["results.json"]


def test_summary(make_result: Make) -> None:
    prompts = [make_result(0, accepted=[0, 1, 3], emitted=[1, 2, 4]), make_result(1, solved=False)]
    figures = summary(Evaluation("x", 4, Settings(batch_size=2), prompts, "d"))
    assert (figures["benchmark"], figures["drafter"], figures["prompts"], figures["batch_size"]) == ("x", "d", 2, 2)
    assert figures["tau_micro"] == pytest.approx(12 / 5) and figures["tau_macro"] == pytest.approx((7 / 3 + 5 / 2) / 2)
    assert figures["tau_interval"]["low"] <= figures["tau_micro"] <= figures["tau_interval"]["high"]
    assert figures["mean_accepted"] == pytest.approx(6 / 4) and figures["solved"] == 0.5
    assert (figures["plain_tokens_per_second"], figures["speculative_tokens_per_second"]) == (2.0, 6.0)
    assert figures["speedup"] == 3.0 and figures["speedup_interval"] == {"value": 3.0, "low": 3.0, "high": 3.0}
    assert figures["rejection_positions"] == [1, 1, 1, 1]
    assert figures["tau_by_length"] == [[0, pytest.approx(12 / 5), 5]]


def test_markdown(two: Report, tmp_path: Path) -> None:
    write_tables(two, tmp_path)
    lines = (tmp_path / "table.md").read_text().splitlines()
    assert [c.strip() for c in lines[0].split("|")[1:-1]] == list(HEADINGS)
    assert set(lines[1]) == {"|", "-"} and {line.count("|") for line in lines[:6]} == {len(HEADINGS) + 1}
    assert lines[2].startswith("| maths | sft | 6 | 2.50 [2.50, 2.50] |")
    assert [line[2:] for line in lines if line.startswith("- ")] == notes(two)


def test_latex(make_result: Make, tmp_path: Path) -> None:
    write_tables(report(Evaluation("mt_bench", 4, Settings(), [make_result()], "a_b & 50% #1 $x$")), tmp_path)
    text = (tmp_path / "table.tex").read_text()
    body = text.splitlines()[5]
    assert body.startswith(r"mt\_bench & a\_b \& 50\% \#1 \$x\$ & 1 & 2.50") and body.endswith(r"\\")
    assert body.replace(r"\&", "").count("&") == len(HEADINGS) - 1
    for word in (r"\toprule", r"\midrule", r"\bottomrule", r"\begin{tabular}{llllllll}", r"\end{tabular}"):
        assert word in text


@pytest.mark.parametrize("special", ["{", "}", "~", "^", "\\"])
def test_latex_takes_no_name_for_a_command(special: str, make_result: Make, tmp_path: Path) -> None:
    write_tables(report(Evaluation("x", 4, Settings(), [make_result()], f"a{special}b")), tmp_path)
    cell = (tmp_path / "table.tex").read_text().splitlines()[5].split(" & ")[1]
    assert f"a{special}b" not in cell and cell.startswith("a\\") and cell.endswith("b")
