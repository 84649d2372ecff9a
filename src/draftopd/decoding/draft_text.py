"""Decoded text as HTML or Markdown that marks accepted proposals, the target's own tokens and rejected proposals."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from draftopd.decoding.generate import Decoded

#: Style sheet of the HTML; it sets text and background colours, so that light and dark themes both work.
STYLE = """
.draft { white-space: pre-wrap; font: 13px/1.9 ui-monospace, monospace; padding: 0.8rem; }
.draft { color: #1a1a1a; background: #fafafa; }
.draft .block { border-left: 1px solid #bbb; padding-left: 1px; }
.draft .accepted { background: #cfe8d5; } .draft .emitted { background: #fde2b8; }
.draft .rejected { color: #a33; text-decoration: line-through; font-size: 0.85em; }
"""

#: Explanation of the colours, as HTML.
LEGEND = (
    '<p class="draft"><span class="accepted">accepted proposals</span> <span class="emitted">the target\'s own token: '
    'correction or bonus</span> <s class="rejected">rejected proposals</s>; a bar begins each block.</p>'
)


class DraftedBlock(NamedTuple):
    """Texts of one block: accepted proposals, the target's own token, rejected proposals."""

    accepted: str
    emitted: str
    rejected: str


def blocks_of(decoded: Decoded, tokenizer: PreTrainedTokenizerBase) -> list[DraftedBlock]:
    """The blocks of a decoded text, after a first block that has only the token of the prefill."""

    def text(tokens: Sequence[int]) -> str:
        return str(tokenizer.decode(list(tokens)))

    blocks = [DraftedBlock("", text(decoded.response[:1]), "")]
    start = 1
    for n, emitted, proposals in zip(decoded.accepted, decoded.emitted, decoded.proposals, strict=True):
        kept = decoded.response[start : start + emitted]
        # If the text ended among the accepted proposals, the remaining ones were not rejected.
        rejected = proposals[n:] if emitted > n else []
        blocks.append(DraftedBlock(text(kept[:n]), text(kept[n:]), text(rejected)))
        start += emitted
    return blocks


def as_markdown(blocks: Sequence[DraftedBlock]) -> str:
    """A table of the drafted blocks: accepted proposals in bold, rejected ones in italics, the target's token plain."""

    def show(text: str, mark: str) -> str:
        if not text:
            return ""
        text = re.sub(r"([\\`*_{}\[\]()#+\-.!>])", r"\\\1", text)
        for plain, marked in (("&", "&amp;"), ("<", "&lt;"), ("|", "&#124;"), ("\n", "⏎")):
            text = text.replace(plain, marked)
        return f"{mark}{text.strip() or '␣' * len(text)}{mark}"

    lines = ["| block | accepted | correction or bonus | rejected |", "|---|---|---|---|"]
    for number, block in enumerate(blocks[1:], start=1):
        lines.append(
            f"| {number} | {show(block.accepted, '**')} | {show(block.emitted, '')} | {show(block.rejected, '*')} |"
        )
    return "\n".join(lines)


def as_html(blocks: Sequence[DraftedBlock]) -> str:
    """HTML for use with :data:`STYLE` and :data:`LEGEND`; rejected text is struck through even without it."""
    spans = []
    for block in blocks:
        parts = (
            f'<{tag} class="{kind}">{html.escape(text)}</{tag}>'
            for tag, kind, text in zip(("span", "span", "s"), block._fields, block, strict=True)
            if text
        )
        spans.append(f'<span class="block">{"".join(parts)}</span>')
    return f'<div class="draft">{"".join(spans)}</div>'


def viewer(decoded: Decoded, tokenizer: PreTrainedTokenizerBase) -> str:
    """A complete HTML fragment, for notebooks: ``IPython.display.HTML(viewer(decoded, tokenizer))``."""
    return f"<style>{STYLE}</style>{LEGEND}{as_html(blocks_of(decoded, tokenizer))}"
