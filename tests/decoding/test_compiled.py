"""Steps through torch.compile give the texts and blocks of plain steps."""

from __future__ import annotations

import shutil

import pytest

from draftopd.data.prompts import PromptEncoder, ReasoningPrompts
from draftopd.decoding.generate import Decoder
from draftopd.drafters.load import load_for
from draftopd.targets.target import Target, load_tokenizer, stop_tokens

pytestmark = pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler on a CPU")


def test_growing_texts_and_shrinking_batches() -> None:
    target, tokenizer = Target.load("bundled:tiny_target", dtype="float32"), load_tokenizer("bundled:tiny_target")
    drafter = load_for(target, "bundled:tiny_dflash").eval()
    prompts = PromptEncoder(tokenizer).take(ReasoningPrompts("validation"), range(3))
    stop = stop_tokens(target, tokenizer)
    plain, compiled = (
        Decoder(target, drafter, max_new_tokens=96, stop=stop, compiled=compiled) for compiled in (False, True)
    )
    assert list(compiled.decode(prompts, 3)) == list(plain.decode(prompts, 3))
