"""What a benchmark ran on."""

from __future__ import annotations

import argparse
import datetime
import os
import platform
from importlib.metadata import version
from pathlib import Path

import torch


def describe() -> dict[str, object]:
    """Processor or GPU, cores, versions and date, as plain values."""
    return {
        "date": datetime.date.today().isoformat(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("draftopd", "torch", "transformers", "lightning")},
    }


def arguments(options: argparse.Namespace) -> dict[str, object]:
    """What was asked for, without the paths of this machine."""
    local = ("results", "case", "way", "peer", "reference", "reference_python")
    return {name: value for name, value in vars(options).items() if name not in local}


def _processor() -> str:
    information = Path("/proc/cpuinfo")
    if information.exists():
        names = [line.split(":", 1)[1].strip() for line in information.read_text().splitlines() if "model name" in line]
        if names:
            return names[0]
    return platform.processor() or platform.machine()
