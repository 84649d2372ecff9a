"""Decode with the public DFlash model code, for `decoding.py`, which runs this with an interpreter that can import it.

    PYTHON benchmarks/speed/dflash_reference.py model.py TARGET DRAFTER prompts.json MAX_NEW_TOKENS

It reads prompts as token ids, decodes the first prompt once to warm up and each prompt once timed, and prints texts and
seconds as JSON.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM


def main() -> None:
    code, target_dir, drafter_dir, prompts_file, limit = sys.argv[1:]
    spec = importlib.util.spec_from_file_location("dflash_model", code)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    content = json.loads(Path(prompts_file).read_text())
    target = AutoModelForCausalLM.from_pretrained(target_dir, dtype=torch.float32).eval()
    drafter = module.DFlashDraftModel.from_pretrained(drafter_dir, dtype=torch.float32).eval()
    texts, seconds = [], []
    for prompt in content["prompts"]:
        ids = torch.tensor([prompt])
        for measured in (False, True):
            if not measured and texts:
                continue
            began = time.perf_counter()
            output = module.dflash_generate(drafter, target, ids, int(limit), content["stop"], 0.0)
            elapsed = time.perf_counter() - began
        texts.append(output[0, len(prompt) :].tolist())
        seconds.append(elapsed)
    print(json.dumps({"texts": texts, "seconds": seconds, "threads": torch.get_num_threads()}))


if __name__ == "__main__":
    main()
