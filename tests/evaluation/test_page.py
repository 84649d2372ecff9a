"""The page that needs nothing beside it, drafts as text, and TensorBoard."""

from __future__ import annotations

import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugin_util import markdown_to_safe_html
from tests.support.evaluation import Pair
from transformers import PreTrainedTokenizerBase

from draftopd.decoding.draft_text import DraftedBlock, as_html, as_markdown, blocks_of, viewer
from draftopd.decoding.generate import Decoded, Decoder
from draftopd.decoding.rules import Rules
from draftopd.drafters.base import Drafter
from draftopd.evaluation.cost import Prediction
from draftopd.evaluation.lossless import Mismatch
from draftopd.evaluation.page import write_page
from draftopd.evaluation.report import HEADINGS, Expected, Report, notes
from draftopd.evaluation.results import Evaluation, PromptResult
from draftopd.evaluation.settings import Settings
from draftopd.evaluation.tensorboard import write_tensorboard

Make = Callable[..., PromptResult]
HARD = "<b>a & b</b>"


class Page(HTMLParser):
    """Elements with their attributes and the text in each; every element is closed in its turn."""

    VOID = frozenset({"meta", "link", "img", "br", "hr", "input"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[tuple[str, list[str]]] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append((tag, []))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        opened, parts = self.open.pop()
        assert opened == tag
        self.texts.append((tag, "".join(parts)))

    def handle_data(self, data: str) -> None:
        for _, parts in self.open:
            parts.append(data)

    def all(self, tag: str) -> list[str]:
        return [text for name, text in self.texts if name == tag]

    def of_class(self, kind: str) -> int:
        return sum(attributes.get("class") == kind for _, attributes in self.elements)


@pytest.fixture
def report(make_result: Make) -> Report:
    """Two drafters, two benchmarks; names, questions and texts with all that HTML takes for its own."""
    drafts = [DraftedBlock("", "Mia", ""), DraftedBlock(" has <i>", " 3&", ' "four"')]
    results = [
        Evaluation(
            benchmark, 4, Settings(),
            [make_result(i, drafts=drafts if i < 2 else [], question=HARD, turn=0) for i in range(4)]
            + [make_result(0, drafts=drafts, question="and then?", turn=1, emitted=[], accepted=[])],
            drafter,
        )
        for benchmark in ("maths", HARD) for drafter in ("sft", "o<p>d")
    ]  # fmt: skip
    results[-1].prompts[3] = make_result(3, mismatch=Mismatch(4, 17, 23, 0.25))
    predictions = [Prediction(2, 1.6, 0.2, 1.0), Prediction(4, 2.4, 0.5, 1.1)]
    return Report(f"target {HARD}", results, [Expected(d, predictions, predictions) for d in ("sft", "o<p>d")])


def test_page(report: Report, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    write_page(report, path)
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    rows = page.all("tr")
    assert len(rows) == 1 + 4 and len(page.all("th")) == len(HEADINGS)
    assert [row.startswith(("maths", HARD)) for row in rows] == [False, True, True, True, True]
    # Benchmarks side by side, each benchmark, expected speedups.
    assert len(page.all("svg")) == 1 + 2 + 1
    assert page.all("li") == notes(report)
    assert page.all("title") == [f"Evaluation of target {HARD}"]
    assert not {"b", "i"} & {tag for tag, _ in page.elements}
    assert len(page.all("details")) == 4 * 3
    assert page.all("summary")[:3] == [
        "maths, test-0: sft, tau 2.50", "maths, test-1: sft, tau 2.50", "maths, test-0, turn 2: sft, no block",
    ]  # fmt: skip
    assert page.of_class("accepted") == page.of_class("emitted") - 12 == 12 + 1 and HARD in page.all("details")[0]
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


def test_the_page_needs_nothing_beside_it(report: Report, tmp_path: Path) -> None:
    write_page(report, tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert not {"script", "link", "img", "iframe", "object"} & {tag for tag, _ in page.elements}
    for tag, attributes in page.elements:
        for name, value in attributes.items():
            if name in ("src", "href", "xlink:href"):
                assert value is not None and value.startswith("#"), (tag, name, value)
    assert not re.search(r"@import|url\((?!['\"]?#)", text)
    identifiers = re.findall(r'\bid="([^"]+)"', text)
    assert identifiers and "DOCTYPE svg" not in text


def test_the_figures_do_not_share_their_parts(report: Report, tmp_path: Path) -> None:
    """A figure that refers to another's shapes by an id of both would be drawn wrong."""
    write_page(report, tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    figures = re.findall(r"<svg.*?</svg>", text, re.S)
    clips = [set(re.findall(r'<clipPath id="([^"]+)"', figure)) for figure in figures]
    assert sum(map(len, clips)) == len(set().union(*clips)) > 0
    for number, figure in enumerate(figures):
        assert set(re.findall(r"url\(#([^)]+)\)", figure)) <= clips[number]
        shapes = set(re.findall(r'<(?:path|g|use) id="([^"]+)"', figure))
        assert set(re.findall(r'xlink:href="#([^"]+)"', figure)) <= shapes


def test_a_report_of_little(make_result: Make, tmp_path: Path) -> None:
    """No block, no speedup, no drafts, no expectation."""
    wrong = make_result(accepted=[], emitted=[], mismatch=Mismatch(0, 1, 2, 5.0))
    write_page(Report("t", [Evaluation("x", 4, Settings(), [wrong])], []), tmp_path / "report.html")
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert len(page.all("svg")) == 2 and page.all("details") == []
    assert "nan" not in " ".join(page.all("td"))


# Drafts as text.


def decoded(tokenizer: PreTrainedTokenizerBase) -> Decoded:
    """Three blocks: a rejection, a full block, and one that the text's end cut among accepted proposals."""
    words = tokenizer.encode("Mia has 3 apples and 4 pears, and then 5 more.", add_special_tokens=False)
    a, b, c, d, e, f, g, h, i, j = words[:10]
    return Decoded(
        [1], [a, b, c, d, e, f, g, h], anchors=[1, 3, 7], accepted=[1, 3, 1], emitted=[2, 4, 1],
        proposals=[[b, i, j], [d, e, f], [h, i, j]], finish="length",
    )  # fmt: skip


def test_blocks(bundled_tokenizer: PreTrainedTokenizerBase) -> None:
    found = decoded(bundled_tokenizer)

    def text(*tokens: int) -> str:
        return bundled_tokenizer.decode(list(tokens))

    a, b, c, d, e, f, g, h = found.response
    i, j = found.proposals[0][1:]
    assert blocks_of(found, bundled_tokenizer) == [
        DraftedBlock("", text(a), ""),
        DraftedBlock(text(b), text(c), text(i, j)),
        DraftedBlock(text(d, e, f), text(g), ""),
        # The text ended before the others were tested.
        DraftedBlock(text(h), "", ""),
    ]
    ended = Decoded([1], [a], finish="stop")
    assert blocks_of(ended, bundled_tokenizer) == [DraftedBlock("", text(a), "")]


def test_blocks_of_a_real_decode(
    bundled_pair: Pair, bundled_drafters: dict[str, Drafter], bundled_tokenizer: PreTrainedTokenizerBase
) -> None:
    target, _, prompts, stop = bundled_pair
    found = Decoder(target, bundled_drafters["opd"], Rules(stop=stop, max_new_tokens=80)).decode_batch(prompts[:3])
    for one in found:
        blocks = blocks_of(one, bundled_tokenizer)
        assert "".join(b.accepted + b.emitted for b in blocks) == bundled_tokenizer.decode(one.response)
        assert [bool(b.accepted) for b in blocks[1:]] == [n > 0 for n in one.accepted]
        assert any(b.rejected for b in blocks)


def test_html_of_blocks() -> None:
    text = as_html([DraftedBlock("", HARD, ""), DraftedBlock("a", "", ""), DraftedBlock("x", "y\n", "<i>")])
    page = Page(text)
    assert page.of_class("block") == 3 and page.of_class("draft") == 1
    assert (page.of_class("accepted"), page.of_class("emitted"), page.of_class("rejected")) == (2, 2, 1)
    assert page.all("div") == [f"{HARD}axy\n<i>"] and not {"b", "i"} & {tag for tag, _ in page.elements}


def test_viewer_stands_by_itself(bundled_tokenizer: PreTrainedTokenizerBase) -> None:
    text = viewer(decoded(bundled_tokenizer), bundled_tokenizer)
    page = Page(text)
    legend = 1
    assert (page.of_class("accepted"), page.of_class("rejected")) == (3 + legend, 1 + legend)
    for kind in ("accepted", "emitted", "rejected"):
        assert f".draft .{kind}" in page.all("style")[0]
    assert "correction or bonus" in text and "http" not in text
    # Readable in a dark notebook, and without the style sheet.
    assert re.search(r"\.draft \{ color: #1a1a1a; background: #fafafa; \}", text)
    assert {tag for tag, attributes in page.elements if attributes.get("class") == "rejected"} == {"s"}


def test_markdown_of_blocks() -> None:
    lines = as_markdown(
        [DraftedBlock("", "first", ""), DraftedBlock(" a*b_c|", " x\n", "d<e>"), DraftedBlock("  ", "", "")]
    )
    head, rule, first, second = lines.splitlines()
    assert {line.count("|") for line in (head, rule, first, second)} == {5}
    assert first == "| 1 | **a\\*b\\_c&#124;** | x⏎ | *d&lt;e\\>* |"
    assert second == "| 2 | **␣␣** |  |  |"


@pytest.mark.parametrize("text", ["<i>", "a*b*", "_a_", "~~a~~", "a|b", "\\n", "`", "[a](b)"])
def test_markdown_shows_every_text_as_it_is(text: str) -> None:
    """As TensorBoard draws it."""
    drawn = Page(markdown_to_safe_html(as_markdown([DraftedBlock("", "", ""), DraftedBlock(text, text, text)])))
    assert drawn.all("td")[1:] == [text] * 3


def test_markdown_of_nothing() -> None:
    assert len(as_markdown([DraftedBlock("", "first", "")]).splitlines()) == 2


# TensorBoard.


def test_tensorboard(report: Report, tmp_path: Path) -> None:
    report.results[2].prompts[:] = report.results[0].prompts[:1]
    results = [r for r in report.results if r.benchmark == "maths"]
    named = [Evaluation(r.benchmark, 4, r.settings, r.prompts, d) for r, d in zip(results, ("sft", "opd"), strict=True)]
    write_tensorboard(Report("t", named, report.expected), tmp_path)
    assert {p.name for p in tmp_path.iterdir() if p.is_dir()} == {"sft", "opd"}
    for result in named:
        board = EventAccumulator(str(tmp_path / result.drafter)).Reload()
        assert set(board.Tags()["scalars"]) == {
            f"eval/maths/{name}" for name in ("tau", "speedup", "acceptance_by_position", "tau_by_length")
        }
        assert board.Scalars("eval/maths/tau")[0].value == pytest.approx(result.tau[0])
        assert board.Scalars("eval/maths/speedup")[0].value == pytest.approx(3.0)
        rates = {e.step: e.value for e in board.Scalars("eval/maths/acceptance_by_position")}
        assert rates == pytest.approx(dict(enumerate(result.acceptance_by_position(), start=1)))
        texts = [tag for tag in board.Tags()["tensors"] if "/drafts/" in tag]
        assert {t.split("/text_summary")[0] for t in texts} == {
            f"eval/maths/drafts/{name}" for name in ("test-0_0", "test-1_0", "test-0_1")
        }
    board = EventAccumulator(str(tmp_path)).Reload()
    assert set(board.Tags()["images"]) == {"eval/overview", "eval/maths", "eval/expected_speedup"}


def test_a_withheld_speedup_is_not_in_tensorboard(make_result: Make, tmp_path: Path) -> None:
    wrong = Evaluation("x", 4, Settings(), [make_result(mismatch=Mismatch(0, 1, 2, 5.0))], "d")
    write_tensorboard(Report("t", [wrong], []), tmp_path)
    assert "eval/x/speedup" not in EventAccumulator(str(tmp_path / "d")).Reload().Tags()["scalars"]
    assert set(EventAccumulator(str(tmp_path)).Reload().Tags()["images"]) == {"eval/overview", "eval/x"}
