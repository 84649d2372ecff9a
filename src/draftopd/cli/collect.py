"""Collect training runs into one tidy table: ``python -m draftopd.cli.collect runs/ablation > ablation.csv``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from draftopd.cli.runs import find, rows, write_csv
from draftopd.errors import DraftOPDError


def main(arguments: list[str] | None = None) -> None:
    """Print a row for every run that has ended."""
    parser = argparse.ArgumentParser(prog="python -m draftopd.cli.collect", description=__doc__)
    parser.add_argument("directories", nargs="+", type=Path, help="sweeps or single runs, searched below")
    options = parser.parse_args(arguments)
    try:
        write_csv(rows(find(options.directories)), sys.stdout)
    except DraftOPDError as error:
        sys.exit(f"Error: {error}")


if __name__ == "__main__":
    main()
