"""Evaluate drafters: ``python eval.py --help``."""

from __future__ import annotations

from draftopd.cli.app import run


def main() -> None:
    run("eval")


if __name__ == "__main__":
    main()
