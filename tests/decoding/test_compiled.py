"""Steps through torch.compile give the texts and blocks of plain steps."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._guards import TracingContext

from draftopd.data.prompts import PromptEncoder, ReasoningPrompts
from draftopd.decoding.generate import Decoder
from draftopd.decoding.sampling import Sampling
from draftopd.decoding.step import Rules, decoding_step
from draftopd.drafters.load import load_for
from draftopd.targets.load import load_target, load_tokenizer, stop_tokens


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler on a CPU")
def test_growing_texts_and_shrinking_batches() -> None:
    target, tokenizer = load_target("bundled:tiny_target", dtype="float32"), load_tokenizer("bundled:tiny_target")
    drafter = load_for(target, "bundled:tiny_dflash").eval()
    prompts = PromptEncoder(tokenizer).take(ReasoningPrompts("validation"), range(2))
    stop = stop_tokens(target, tokenizer)
    plain, compiled = (
        Decoder(target, drafter, Rules(stop=stop, max_new_tokens=96), compiled=compiled) for compiled in (False, True)
    )
    assert list(compiled.decode(prompts, 2)) == list(plain.decode(prompts, 2))


@torch.no_grad()
def test_a_step_can_become_a_cuda_graph() -> None:
    """It is one graph, of which nothing but the anchors and their tokens moves; weights and memory stay."""
    target = load_target("bundled:tiny_target", dtype="float32")
    drafter = load_for(target, "bundled:tiny_dflash").eval()
    target.tap(drafter.target_layer_ids)
    found = []

    def look(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        facts = TracingContext.get().fw_metadata
        stays, written = set(facts.static_input_indices), set(facts.mutated_inp_runtime_indices)
        found.append((written - stays, [tuple(t.shape) for i, t in enumerate(inputs) if i not in stays]))
        return make_boxed_func(graph.forward)

    ids, capacity = torch.arange(3, 15).view(2, 6), 40
    cache, positions = target.new_cache(capacity), torch.arange(6).expand(2, -1)
    reading, state = target.read(ids, cache), drafter.start(capacity)
    drafter.observe(target, state, reading.features, ids, positions)
    for store in (*cache.stores, *drafter.stores(state)):
        store.stay()
    step = torch.compile(decoding_step, dynamic=False, fullgraph=True, backend=aot_autograd(fw_compiler=look))
    rules = Rules(Sampling(), Sampling(), False)
    step(target, drafter, rules, cache, state, torch.tensor([6, 6]), torch.tensor([3, 4]), 24, None)
    assert found == [(set(), [(2,), (2,)])]
