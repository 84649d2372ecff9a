"""What the benchmarks share: options, the target and drafter under test, cases in processes of their own, results.

A result file holds ``date``, ``machine``, ``versions`` and ``arguments``, then what was found: ``rows`` is a list with
one object per row of the script's table, and further keys are the script's own.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedTokenizerBase

from draftopd.data.prompts import PromptEncoder, ReasoningPrompts
from draftopd.decoding.generate import Decoder
from draftopd.decoding.sampling import Sampling
from draftopd.drafters.base import Drafter
from draftopd.drafters.load import load_for
from draftopd.rollout.request import Request
from draftopd.targets.load import load_target, load_tokenizer, stop_tokens
from draftopd.targets.target import Target

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"


class Pair(NamedTuple):
    """A target, and a drafter for it in evaluation mode, whose layers the target taps."""

    target: Target
    drafter: Drafter
    tokenizer: PreTrainedTokenizerBase
    stop: frozenset[int]

    @classmethod
    def load(cls, options: argparse.Namespace) -> Pair:
        """The pair that the options of :func:`pair_parser` name."""
        torch.set_num_threads(options.threads)
        target = load_target(options.target, dtype=options.dtype, device=options.device)
        tokenizer = load_tokenizer(options.target)
        drafter = load_for(target, options.drafter).to(target.device).eval()
        target.tap(drafter.target_layer_ids)
        return cls(target, drafter, tokenizer, stop_tokens(target, tokenizer))

    def prompts(self, count: int, split: str = "validation") -> list[list[int]]:
        """The first bundled problems of a split, as token ids."""
        return PromptEncoder(self.tokenizer).take(ReasoningPrompts(split), range(count))

    def decoder(self, max_new_tokens: int, drafted: bool = True, compiled: bool = False) -> Decoder:
        """Greedy decoding, with the drafter or without."""
        drafter = self.drafter if drafted else None
        return Decoder(self.target, drafter, max_new_tokens=max_new_tokens, stop=self.stop, compiled=compiled)

    def request(self, prompts: list[list[int]], max_new_tokens: int, sampling: Sampling = Sampling()) -> Request:
        """What a refresh of the anchors asks of a rollout."""
        return Request(
            self.target, self.drafter, self.tokenizer, lambda: prompts, range(len(prompts)), self.stop, sampling,
            max_new_tokens, 512, seed=0,
        )  # fmt: skip


def parser(description: str | None, results: str | None = None) -> argparse.ArgumentParser:
    """A parser that prints a script's docstring, with ``--results`` if the script names its file."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    if results:
        made.add_argument("--results", type=Path, default=RESULTS / results, help="file that results go to")
    return made


def pair_parser(description: str | None, results: str, prompts: int) -> argparse.ArgumentParser:
    """A parser with the options of :meth:`Pair.load`, and how many prompts and response tokens to decode."""
    made = parser(description, results)
    made.add_argument("--target", default="bundled:tiny_target", help="directory in Hugging Face layout")
    made.add_argument("--drafter", default="bundled:tiny_dflash", help="directory of a drafter's checkpoint")
    made.add_argument("--dtype", default="float32", help="of the target")
    made.add_argument("--device", default=None, help="default: the GPU if there is one")
    made.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch")
    made.add_argument("--prompts", type=int, default=prompts)
    made.add_argument("--tokens", type=int, default=256, help="maximum per response")
    return made


def case(command: Sequence[str], module: str | None = None) -> Any:
    """Run a measurement in a process of its own, and read the JSON that it prints in its last line.

    Args:
        command: arguments of ``module``, or a whole command without one.

    Raises:
        SystemExit: with the end of the process's messages, if it fails.
    """
    whole = [sys.executable, "-m", module, *command] if module else list(command)
    done = subprocess.run(whole, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(whole)} failed with status {done.returncode}:\n{done.stderr[-2000:].rstrip()}")
    return json.loads(done.stdout.splitlines()[-1])


def machine() -> dict[str, Any]:
    """What this runs on."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
    }


def keep(path: Path, options: argparse.Namespace, content: Mapping[str, Any]) -> None:
    """Write results with date, machine, versions and arguments.

    Of the arguments, the paths and interpreters of this machine are left out.
    """
    local = ("case", "way", "peer", "reference", "reference_python")
    whole = {
        "date": datetime.date.today().isoformat(),
        "machine": machine(),
        "versions": {name: version(name) for name in ("draftopd", "torch", "transformers", "lightning")},
        "arguments": {n: v for n, v in vars(options).items() if n not in local and not isinstance(v, Path)},
        **content,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(whole, indent=2, default=str) + "\n")
    print(f"wrote {path}")


def read(path: Path) -> dict[str, Any]:
    """The results that were kept in a file."""
    return json.loads(path.read_text())


def show(title: str, headings: Iterable[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a table; columns of numbers stand to the right."""
    table, rows = Table(title=title, title_justify="left"), list(rows)
    for column, heading in enumerate(headings):
        numbers = all(row[column][:1] in "0123456789-x+" for row in rows)
        table.add_column(heading, justify="right" if numbers else "left")
    for row in rows:
        table.add_row(*row)
    Console(width=None if sys.stdout.isatty() else 140).print(table)


def _processor() -> str:
    information = Path("/proc/cpuinfo")
    if information.exists():
        names = [line.split(":", 1)[1].strip() for line in information.read_text().splitlines() if "model name" in line]
        if names:
            return names[0]
    return platform.processor() or platform.machine()
