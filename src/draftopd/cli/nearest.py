"""The nearest valid name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest(name: str, choices: Iterable[str]) -> str:
    """ "Did you mean ..." with the closest of the choices, or all of them where none is close."""
    options = sorted(set(choices))
    close = difflib.get_close_matches(name, options, n=1, cutoff=0.5)
    if not close:
        # The last part of a dotted key is often nearly right.
        tails = {option.rsplit(".", 1)[-1]: option for option in options}
        close = [tails[t] for t in difflib.get_close_matches(name.rsplit(".", 1)[-1], tails, n=1, cutoff=0.6)]
    return f"did you mean {close[0]!r}?" if close else f"choose from {', '.join(options)}."
