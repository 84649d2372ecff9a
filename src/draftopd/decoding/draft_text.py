"""A decode as text to look at: what was accepted of each block, what the target gave itself, what was rejected."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from draftopd.decoding.generate import Decoded

#: Style sheet of coloured texts; text and background are both set, for notebooks and pages of either theme.
STYLE = """
.draft { white-space: pre-wrap; font: 13px/1.9 ui-monospace, monospace; padding: 0.8rem; }
.draft { color: #1a1a1a; background: #fafafa; }
.draft .block { border-left: 1px solid #bbb; padding-left: 1px; }
.draft .accepted { background: #cfe8d5; } .draft .emitted { background: #fde2b8; }
.draft .rejected { color: #a33; text-decoration: line-through; font-size: 0.85em; }
"""

#: What their colours mean, as HTML.
LEGEND = (
    '<p class="draft"><span class="accepted">accepted proposals</span> <span class="emitted">the target\'s own token: '
    'correction or bonus</span> <s class="rejected">rejected proposals</s>; a bar begins each block.</p>'
)


class DraftedBlock(NamedTuple):
    """Texts of one block: accepted proposals, the token that the target gave itself, rejected proposals."""

    accepted: str
    emitted: str
    rejected: str


def blocks_of(decoded: Decoded, tokenizer: PreTrainedTokenizerBase) -> list[DraftedBlock]:
    """The blocks of a decode; before them, as a block without a draft, the token of the prefill."""

    def text(tokens: Sequence[int]) -> str:
        return str(tokenizer.decode(list(tokens)))

    blocks = [DraftedBlock("", text(decoded.response[:1]), "")]
    start = 1
    for n, emitted, proposals in zip(decoded.accepted, decoded.emitted, decoded.proposals, strict=True):
        kept = decoded.response[start : start + emitted]
        # Where the text ended among the accepted proposals, the others were not rejected.
        rejected = proposals[n:] if emitted > n else []
        blocks.append(DraftedBlock(text(kept[:n]), text(kept[n:]), text(rejected)))
        start += emitted
    return blocks


def as_markdown(blocks: Sequence[DraftedBlock]) -> str:
    """A table of the drafted blocks: accepted proposals bold, rejected ones italic, the target's own token plain."""

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
    """Coloured text; :data:`STYLE` has its colours and :data:`LEGEND` says what they mean.

    What was rejected is struck through where no style sheet is kept, too.
    """
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
    """A decode by itself, as in a notebook: ``IPython.display.HTML(viewer(decoded, tokenizer))``."""
    return f"<style>{STYLE}</style>{LEGEND}{as_html(blocks_of(decoded, tokenizer))}"
