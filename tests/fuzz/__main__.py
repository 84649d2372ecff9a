"""Fuzz for the given time, and keep the counts.

    python -m tests.fuzz --seconds 600

Subjects take turns. A finding is kept with its input, and ends the command with exit status 1.
"""

from __future__ import annotations

import logging
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch
from transformers.utils.logging import disable_progress_bar

from benchmarks.common import keep, parser
from tests.fuzz.mutations import mutate
from tests.fuzz.running import outcome
from tests.fuzz.subjects import subjects

SHOWN = 20


def main() -> None:
    made = parser(__doc__, "fuzz.json")
    made.add_argument("--seconds", type=float, default=600.0)
    made.add_argument("--seed", type=int, default=0)
    options = made.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)  # a warning a mutation says nothing
    disable_progress_bar()
    counts: dict[str, Counter[str]] = {}
    findings: list[dict[str, str]] = []
    with tempfile.TemporaryDirectory() as root:
        every = subjects(Path(root))
        began, round_ = time.monotonic(), 0
        while time.monotonic() - began < options.seconds and len(findings) < SHOWN:
            for name, subject in every.items():
                data = mutate(random.Random(f"{options.seed} {round_} {name}"), subject.seeds)
                try:
                    found = outcome(subject, data)
                except KeyboardInterrupt:
                    raise
                except BaseException as error:
                    found = "finding"
                    said = f"{type(error).__name__}: {error}"[:300]
                    findings.append({"subject": name, "round": str(round_), "error": said, "input": repr(data[:2000])})
                counts.setdefault(name, Counter())[found] += 1
            round_ += 1
        seconds = time.monotonic() - began
    total = sum(sum(count.values()) for count in counts.values())
    report = {
        "seconds": round(seconds, 1),
        "executions": total,
        "findings": findings,
        "subjects": {name: dict(count) for name, count in counts.items()},
    }
    keep(options.results, options, report)
    for name, count in counts.items():
        print(f"{name}: {count['read']} read, {count['refused']} refused, {count['finding']} findings")
    for finding in findings:
        print(f"FINDING in {finding['subject']}: {finding['error']}")
    print(f"{total} executions in {seconds:.0f} s, {len(findings)} findings")
    sys.exit(bool(findings))


if __name__ == "__main__":
    main()
