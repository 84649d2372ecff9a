"""What libraries say that does not apply here, silenced."""

from __future__ import annotations

import logging
import warnings


def quiet() -> None:
    """No bars while weights are read, and no advice that does not apply: loaders read a local buffer without workers.

    In a notebook call it before other imports, which have advice too.
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
