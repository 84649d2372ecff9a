"""One evaluation: build what a configuration names, decode, report."""

from __future__ import annotations

from pathlib import Path

import transformers
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig

from draftopd.callbacks.progress import rollout_progress
from draftopd.cli.record import describe
from draftopd.decoding.sampling import Sampling
from draftopd.drafters.base import Drafter
from draftopd.evaluation.benchmark import Benchmark
from draftopd.evaluation.report import print_evaluation, write_evaluation
from draftopd.evaluation.runner import Evaluation, evaluate
from draftopd.targets.target import Target, load_tokenizer, stop_tokens


def run(config: DictConfig) -> Evaluation:
    """Evaluate as configured; ``results.json`` goes to Hydra's run directory.

    Raises:
        DraftOPDError: with one clear message, for anything the user can mend.
    """
    transformers.utils.logging.disable_progress_bar()
    benchmark: Benchmark = instantiate(config.benchmark)
    target: Target = instantiate(config.target)
    tokenizer = load_tokenizer(config.target.path, config.target.trust_remote_code)
    drafter: Drafter = instantiate(config.drafter, target=target, tokenizer=tokenizer)
    drafter.to(target.device).eval()
    count = len(benchmark.examples(config.limit))
    with rollout_progress(count, label=f"Evaluating {benchmark.name}") as advance:
        result = evaluate(
            target,
            drafter,
            tokenizer,
            benchmark,
            stop_tokens(target, tokenizer),
            Sampling(config.temperature, config.top_k, config.top_p),
            config.verification,
            config.max_new_tokens,
            config.batch_size,
            config.limit,
            config.thinking,
            config.seed,
            advance,
        )
    print_evaluation(result)
    path = Path(HydraConfig.get().runtime.output_dir) / "results.json"
    write_evaluation(result, path, describe(config))
    print(f"Every prompt's figures: {path}")
    return result
