"""One evaluation: build the parts that a configuration names, decode, report."""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import transformers
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from pydantic import PositiveInt

from draftopd.cli.check import check_call, check_value
from draftopd.cli.record import describe
from draftopd.data.prompts import PromptEncoder
from draftopd.drafters.base import Drafter
from draftopd.drafters.load import load_for
from draftopd.errors import ConfigError, DrafterError
from draftopd.evaluation.benchmark import Benchmark, Example
from draftopd.evaluation.cost import measure, predict, predict_bandwidth
from draftopd.evaluation.page import write_page
from draftopd.evaluation.report import Expected, Report, print_report, write_json, write_tables
from draftopd.evaluation.results import Evaluation
from draftopd.evaluation.runner import evaluate
from draftopd.evaluation.served import Asking, Served, ServerEngine, print_served, write_served
from draftopd.evaluation.settings import Settings
from draftopd.evaluation.store import ResultStore
from draftopd.evaluation.tensorboard import write_tensorboard
from draftopd.io.hub import resolve
from draftopd.targets.load import load_tokenizer, stop_tokens
from draftopd.targets.target import Target
from draftopd.training.progress import rollout_progress


def run(config: DictConfig) -> Report | list[Served]:
    """Evaluate as configured; results go to Hydra's run directory.

    Raises:
        DraftOPDError: if the user can mend it; for settings, benchmarks and checkpoints before the target is loaded.
    """
    transformers.utils.logging.disable_progress_bar()
    settings = read_settings(config)
    if "_target_" in config.engine:
        return run_served(config, settings)
    checkpoints = name_checkpoints(config.checkpoint)
    check_value(config.block_size, PositiveInt | None, "block_size")
    suites = read_benchmarks(config, settings.limit)
    target: Target = instantiate(config.target)
    tokenizer = load_tokenizer(config.target.path, config.target.trust_remote_code)
    drafters = {name: load_for(target, path, config.block_size) for name, path in checkpoints.items()}
    for drafter in drafters.values():
        drafter.to(target.device).eval()
        # Engines serve weights in the target's precision; buffers, such as rotary frequencies, keep theirs.
        for parameter in drafter.parameters():
            parameter.data = parameter.data.to(target.dtype)
    directory = Path(HydraConfig.get().runtime.output_dir)
    report_only = ("tie_tolerance", "shown")
    identity = {
        "target": target.fingerprint(),
        "settings": {name: value for name, value in asdict(settings).items() if name not in report_only},
        "drafters": {name: _weights(drafter) for name, drafter in drafters.items()},
        "examples": {name: _digest(examples) for name, examples in suites.items()},
    }
    store = ResultStore(directory, identity)
    stop = stop_tokens(target, tokenizer)
    with rollout_progress(sum(map(len, suites.values())), label="Evaluating") as advance:
        for name, examples in suites.items():
            left = [example for example in examples if (name, example.id) not in store.done]
            advance(len(examples) - len(left), 0)
            waiting = iter(left)
            shown = {example.id for example in examples[: settings.shown]}
            run_ = evaluate(target, drafters, tokenizer, name, left, stop, settings, advance, shown) if left else ()
            for batch in run_:
                for results in batch:
                    store.add(name, next(waiting).id, results)
    report = assemble(config, target, drafters, store, suites, settings)
    print_report(report)
    write_json(report, directory / "results.json", describe(config))
    write_tables(report, directory)
    write_page(report, directory / "report.html")
    write_tensorboard(report, directory / "tensorboard")
    print(f"Report with plots: {directory / 'report.html'}; tables, every prompt's figures, TensorBoard beside it.")
    return report


def run_served(config: DictConfig, settings: Settings) -> list[Served]:
    """Evaluate a running server; only the target's tokenizer is loaded here.

    Raises:
        DraftOPDError: if the user can mend it.
    """
    logging.getLogger("httpx2").setLevel(logging.WARNING)  # it logs one line per request
    unused = ("checkpoint", "block_size", "verification", "batch_size", "tie_tolerance", "shown")
    given = [o for o in HydraConfig.get().overrides.task if o.split("=")[0].lstrip("+") in unused]
    if given:
        raise ConfigError(f"With engine=server {given[0]} would have no effect: the server decides how it drafts.")
    engine: ServerEngine = instantiate(config.engine, _convert_="all")
    suites = read_benchmarks(config, settings.limit)
    tokenizer = load_tokenizer(config.target.path, config.target.trust_remote_code)
    encoder = PromptEncoder(tokenizer, settings.thinking)
    stop = frozenset() if tokenizer.eos_token_id is None else frozenset({int(tokenizer.eos_token_id)})
    asking = Asking(settings.rules(stop), settings.seed)
    found: list[Served] = []
    with rollout_progress(sum(map(len, suites.values())) * len(engine.concurrency), label="Evaluating") as advance:
        for name, examples in suites.items():
            prompts = [encoder.encode(example.messages) for example in examples]
            found += engine.evaluate(name, prompts, asking, advance)
    directory = Path(HydraConfig.get().runtime.output_dir)
    print_served(found)
    write_served(found, directory, describe(config))
    print(f"Figures: {directory / 'served.json'}, table: {directory / 'table.md'}")
    return found


def assemble(
    config: DictConfig, target: Target, drafters: Mapping[str, Drafter], store: ResultStore,
    suites: Mapping[str, list[Example]], settings: Settings,
) -> Report:  # fmt: skip
    """The report of the stored results, with the costs of a step measured now."""
    results, expected = [], []
    tolerance = settings.tolerance(target.dtype)
    for benchmark in suites:
        done = store.of(benchmark)
        for name, drafter in drafters.items():
            prompts = [turn for example in done for turn in example[name]]
            results.append(Evaluation(benchmark, drafter.block_size, settings, prompts, name, tolerance))
    for name, drafter in drafters.items():
        own = [r for r in results if r.drafter == name]
        prompts = [p for r in own for p in r.prompts]
        accepted = [n for r in own for n in r.whole_blocks().tolist()]
        if accepted:
            context = sum(p.prompt_tokens + p.response_tokens // 2 for p in prompts) // len(prompts)
            costs = measure(target, drafter, context, settings.batch_size)
            expected.append(Expected(name, predict(costs, accepted), predict_bandwidth(target, drafter, accepted)))
    return Report(str(config.target.path), results, expected)


def read_settings(config: DictConfig) -> Settings:
    """The configuration's top-level values, checked.

    Raises:
        ConfigError: naming the value that does not fit.
    """
    values = {field.name: config[field.name] for field in fields(Settings)}
    check_call(Settings, values)
    return Settings(**values)


def read_benchmarks(config: DictConfig, limit: int | None) -> dict[str, list[Example]]:
    """The examples of every chosen benchmark, by its name.

    Raises:
        ConfigError: if ``benchmark.path`` does not fit exactly one benchmark, or two have one name.
    """
    chosen = {str(key): node for key, node in config.benchmark.items() if key != "path"}
    readers = [name for name, node in chosen.items() if "path" in node]
    if config.benchmark.path is not None and len(readers) != 1:
        several = f"were chosen: name each one's, benchmark.{readers[0]}.path=FILE." if readers else ""
        advice = several or "reads none: choose a suite or benchmark=jsonl."
        raise ConfigError(f"benchmark.path names one file, but {' and '.join(chosen)} {advice}")
    benchmarks: list[Benchmark] = [instantiate(node) for node in chosen.values()]
    names = [benchmark.name for benchmark in benchmarks]
    if len(set(names)) < len(names):
        raise ConfigError(f"Two benchmarks are called {max(names, key=names.count)}: set benchmark.jsonl.name=NAME.")
    return {benchmark.name: _told_apart(benchmark.examples(limit)) for benchmark in benchmarks}


def _told_apart(examples: list[Example]) -> list[Example]:
    """The examples, with a number added to an id that occurs again."""
    seen: Counter[str] = Counter()
    found = []
    for example in examples:
        seen[example.id] += 1
        number = seen[example.id]
        found.append(example if number == 1 else replace(example, id=f"{example.id}#{number}"))
    return found


def _weights(drafter: Drafter) -> str:
    """A digest of a drafter's config and weights."""
    digest = hashlib.blake2b(f"{drafter.config.to_json()} {drafter.block_size}".encode(), digest_size=8)
    for tensor in drafter.state_dict().values():
        digest.update(tensor.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()


def _digest(examples: list[Example]) -> str:
    """A digest of a list of examples."""
    return hashlib.blake2b(repr(examples).encode(), digest_size=8).hexdigest()


def name_checkpoints(given: Any) -> dict[str, str]:
    """The drafters to evaluate, by name: one directory, a list of them, or names with directories.

    Raises:
        ConfigError: for anything else.
        DrafterError: if none is given, or a directory holds no drafter.
    """
    given = OmegaConf.to_container(given) if OmegaConf.is_config(given) else given
    if isinstance(given, dict):
        named = {str(name): path for name, path in given.items()}
    else:
        named = {}
        for path in given if isinstance(given, list) else [given] if given is not None else []:
            named[_name(str(path), named)] = path
    if not named:
        raise DrafterError("There is no drafter to evaluate: name one with checkpoint=DIR.")
    for path in named.values():
        if not isinstance(path, str):
            raise ConfigError(f"checkpoint={given!r} does not fit: write DIR, [DIR,DIR] or {{name: DIR}}.")
        _require(path)
    return named


def _name(path: str, taken: Mapping[str, str]) -> str:
    """A short name: the directory's own, or that of its run."""
    parts = [part for part in path.removeprefix("bundled:").split("/") if part not in ("", ".", "drafter")]
    name = parts[-1] if parts else path
    number = 2
    while name in taken:
        name, number = f"{parts[-1] if parts else path}_{number}", number + 1
    return name


def _require(checkpoint: str) -> None:
    directory = Path(resolve(checkpoint))
    if (directory / "config.json").is_file():
        return
    found = "config.json is missing" if directory.is_dir() else "there is no such directory"
    if (directory / "drafter" / "config.json").is_file():
        advice = f"It is a training run: use checkpoint={directory / 'drafter'}."
    else:
        advice = "Name a directory with config.json and model.safetensors."
    raise DrafterError(f"No drafter in {checkpoint}: {found}. {advice}")
