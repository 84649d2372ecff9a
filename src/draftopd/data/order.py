"""An endless order over a finite list."""

from __future__ import annotations

import random


class RoundOrder:
    """Goes through ``count`` rows again and again, shuffled anew each round by the seed.

    Args:
        count: number of rows.
        name: tells apart what is ordered with the same seed.
    """

    def __init__(self, count: int, name: str, seed: int) -> None:
        self.count, self.name, self.seed = count, name, seed
        self._round = -1
        self._rows: list[int] = []

    def __getitem__(self, place: int) -> int:
        """The row served at a place of the endless order."""
        round_, index = divmod(place, self.count)
        if round_ != self._round:
            self._round, self._rows = round_, list(range(self.count))
            random.Random(f"draftopd/{self.name}/{self.seed}/{round_}").shuffle(self._rows)
        return self._rows[index]
