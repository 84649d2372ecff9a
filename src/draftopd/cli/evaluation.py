"""One evaluation: build what a configuration names, decode, report."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import transformers
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig
from pydantic import PositiveInt

from draftopd.callbacks.progress import rollout_progress
from draftopd.cli.check import check, check_value
from draftopd.cli.record import describe
from draftopd.drafters.load import load_for
from draftopd.errors import DrafterError
from draftopd.evaluation.benchmark import Benchmark
from draftopd.evaluation.report import print_evaluation, write_evaluation
from draftopd.evaluation.runner import Evaluation, evaluate
from draftopd.evaluation.settings import Settings
from draftopd.targets.hub import resolve
from draftopd.targets.target import Target, load_tokenizer, stop_tokens


def run(config: DictConfig) -> Evaluation:
    """Evaluate as configured; ``results.json`` goes to Hydra's run directory.

    Raises:
        DraftOPDError: with one clear message, for anything the user can mend; for settings, benchmark
            and a missing checkpoint before the target is loaded.
    """
    transformers.utils.logging.disable_progress_bar()
    settings = read_settings(config)
    require_checkpoint(config.checkpoint)
    check_value(config.block_size, PositiveInt | None, "block_size")
    benchmark: Benchmark = instantiate(config.benchmark)
    examples = benchmark.examples(settings.limit)
    target: Target = instantiate(config.target)
    tokenizer = load_tokenizer(config.target.path, config.target.trust_remote_code)
    drafter = load_for(target, config.checkpoint, config.block_size)
    drafter.to(target.device).eval()
    with rollout_progress(len(examples), label=f"Evaluating {benchmark.name}") as advance:
        result = evaluate(
            target, drafter, tokenizer, benchmark.name, examples, stop_tokens(target, tokenizer), settings, advance
        )
    print_evaluation(result)
    path = Path(HydraConfig.get().runtime.output_dir) / "results.json"
    write_evaluation(result, path, describe(config))
    print(f"Every prompt's figures: {path}")
    return result


def read_settings(config: DictConfig) -> Settings:
    """The configuration's top-level values, names and types checked.

    Raises:
        ConfigError: naming the value that does not fit.
    """
    values = {field.name: config[field.name] for field in fields(Settings)}
    check({"_target_": f"{Settings.__module__}.{Settings.__qualname__}", **values})
    return Settings(**values)


def require_checkpoint(checkpoint: str | None) -> None:
    """Refuse to go on without a drafter's directory: a fresh drafter has nothing to evaluate.

    Raises:
        DrafterError: saying what to name instead.
    """
    if checkpoint is None:
        raise DrafterError("There is no drafter to evaluate: name one with checkpoint=DIR.")
    directory = Path(resolve(checkpoint))
    if (directory / "config.json").is_file():
        return
    found = "config.json is missing" if directory.is_dir() else "there is no such directory"
    if (directory / "drafter" / "config.json").is_file():
        advice = f"It is a training run: use checkpoint={directory / 'drafter'}."
    else:
        advice = "Name a directory with config.json and model.safetensors."
    raise DrafterError(f"No drafter in {checkpoint}: {found}. {advice}")
