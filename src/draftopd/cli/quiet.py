"""Silences messages of libraries that do not apply here."""

from __future__ import annotations

import logging
import warnings


def quiet() -> None:
    """Silence bars while weights are read, and advice such as more workers for loaders that read a local buffer.

    In a notebook call it before other imports, which print advice too.
    """
    warnings.filterwarnings("ignore", ".*IProgress not found.*")
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    warnings.filterwarnings("ignore", ".*Checkpoint directory .* exists and is not empty.*")
    warnings.filterwarnings("ignore", ".*module\\(s\\) in eval mode.*")  # the target, by design
    warnings.filterwarnings("ignore", ".*smaller than the logging interval.*")
    warnings.filterwarnings("ignore", ".*isinstance\\(treespec, LeafSpec\\).*")
    import transformers

    transformers.utils.logging.disable_progress_bar()
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.pytorch.accelerators.cuda"):
        logging.getLogger(name).setLevel(logging.WARNING)
