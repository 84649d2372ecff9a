"""Train a drafter: ``python train.py --help``."""

from __future__ import annotations

from draftopd.cli.app import run


def main() -> None:
    run("train")


if __name__ == "__main__":
    main()
