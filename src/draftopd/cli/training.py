"""One training run: build the parts that a configuration names, fit, report."""

from __future__ import annotations

import dataclasses
import logging
import os
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from lightning.pytorch.callbacks import LearningRateMonitor, RichProgressBar
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.utilities.exceptions import SIGTERMException
from omegaconf import DictConfig, OmegaConf

from draftopd.cli.compatibility import ANY_DRAFTER, advise, check_rollout, check_sharding, check_values
from draftopd.cli.parts import rules_of
from draftopd.cli.quiet import quiet
from draftopd.cli.record import composed, write_record
from draftopd.cli.report import FORMAT, TESTED_FORMAT, TrainingReport, print_report
from draftopd.cli.runs import settings
from draftopd.decoding.rules import Rules
from draftopd.distributed.sharding import whole_tensors
from draftopd.distributed.watch import watched
from draftopd.drafters.base import Drafter
from draftopd.drafters.checkpoint import save_drafter
from draftopd.errors import ConfigError, FileError
from draftopd.io.files import read_json, write_json
from draftopd.metrics.acceptance_length import acceptance_length
from draftopd.replay.fresh import FreshAnchors
from draftopd.rollout.request import Request
from draftopd.rollout.rollouts import FreshRollout, Rollout
from draftopd.rollout.trajectories import InProcessTrajectories
from draftopd.targets.load import load_tokenizer, stop_tokens
from draftopd.targets.target import Target
from draftopd.training.checkpoints import CheckpointFiles, LastCheckpoint, newest_whole
from draftopd.training.datamodule import ReplayDataModule
from draftopd.training.module import DraftModule
from draftopd.training.progress import rollout_progress
from draftopd.training.refresh import RefreshAnchors

log = logging.getLogger(__name__)


def run(config: DictConfig) -> TrainingReport:
    """Train as configured; checkpoints, logs, buffer and record go to Hydra's run directory.

    Raises:
        DraftOPDError: if the user can mend it.
    """
    began = time.perf_counter()
    check_values(config)
    quiet()
    directory = Path(HydraConfig.get().runtime.output_dir)
    earlier = finished(directory, config)
    if earlier is not None:
        print("This run has ended already: nothing is left to do.")
        print_report(earlier)
        return earlier
    L.seed_everything(config.seed, verbose=False)
    rollout: Rollout = instantiate(config.rollout)
    check_rollout(config, rollout)
    check_sharding(config)
    target: Target = instantiate(config.target)
    tokenizer = load_tokenizer(config.target.path, config.target.trust_remote_code)
    rules = rules_of(config, stop_tokens(target, tokenizer))
    data: ReplayDataModule = instantiate(config.data)
    data.attach(tokenizer, directory / "anchors")
    texts = partial(_first_texts, data, rollout, target, rules, directory, config)
    drafter: Drafter = instantiate(config.drafter, target=target, tokenizer=tokenizer, texts=texts)
    data.slots = drafter.num_proposals
    advise(config)
    fresh = None
    if isinstance(rollout, FreshRollout) and rollout.anchors == "step":
        fresh = FreshAnchors(rollout.walker(rules), data.policy)
    module = DraftModule(
        target, drafter, instantiate(config.loss), rules,
        optimizer=instantiate(config.optimizer), schedule=instantiate(config.schedule), fresh=fresh, seed=config.seed,
        compiled=config.compiled, **instantiate(config.module, _convert_="all"),
    )  # fmt: skip
    refresh = RefreshAnchors(rollout, directory / "anchors", **config.refresh, seed=config.seed)
    trainer = _trainer(config, directory, refresh)
    with watched(trainer, config.ranks.lost_after):
        _fit(config, trainer, module, data, directory)
        if data.test_count:
            trainer.test(module, datamodule=data, verbose=False)
        tensors = whole_tensors(drafter)
    if trainer.is_global_zero:
        save_drafter(drafter, directory / "drafter", tensors=tensors)
    report = TrainingReport(
        tau_before=module.run.tau_before,
        tau_after=module.run.tau_after,
        steps=trainer.global_step,
        tokens=module.run.tokens,
        seconds=module.clock.seconds,
        total_seconds=time.perf_counter() - began + module.run.earlier_seconds,
        directory=str(directory),
        flops=module.run.flops(),
        test_tau=acceptance_length(list(module.held_out.tested.values()))[0],
    )
    if trainer.is_global_zero:
        if data.test_count:
            emitted = {str(index): tokens for index, tokens in sorted(module.held_out.tested.items())}
            write_json(directory / "test.json", {"emitted": emitted}, TESTED_FORMAT)
        write_json(directory / "report.json", dataclasses.asdict(report), FORMAT)
        print_report(report)
    return report


def _fit(config: DictConfig, trainer: L.Trainer, module: DraftModule, data: ReplayDataModule, directory: Path) -> None:
    """Train from the newest whole checkpoint, or from the beginning.

    Raises:
        ConfigError: if the checkpoint has more epochs than ``trainer.max_epochs``.
        KeyboardInterrupt: if Ctrl-C stopped it.
    """
    resume = newest_whole(directory / "checkpoints")
    if resume is not None:
        _compare(directory, config)
        begun = torch.load(resume, map_location="cpu", weights_only=True, mmap=True)["epoch"] + 1
        if 0 <= (trainer.max_epochs or -1) < begun:
            raise ConfigError(
                f"{resume} is of epoch {begun}, and trainer.max_epochs={trainer.max_epochs}: give as many or more "
                "epochs to continue, or another directory to start again (hydra.run.dir=DIR)."
            )
    if trainer.is_global_zero:
        # Results of an earlier run here are not this one's.
        for name in ("report.json", "test.json"):
            (directory / name).unlink(missing_ok=True)
        write_record(directory, config)

    if resume is not None:
        if trainer.is_global_zero:
            print(f"Continuing from {resume}")
    elif config.validate_first:
        module.run.tau_before = trainer.validate(module, datamodule=data, verbose=False)[0]["val/tau"]
    try:
        trainer.fit(module, datamodule=data, ckpt_path=resume and str(resume), weights_only=True)
    except SIGTERMException:
        raise
    except SystemExit as error:
        # Lightning ends a fit in this way when Ctrl-C stops it.
        raise KeyboardInterrupt from error


def _compare(directory: Path, config: DictConfig) -> None:
    """Warn of settings that differ from those of the run that is continued.

    Raises:
        ConfigError: if they change the drafter.
    """
    try:
        before = settings(OmegaConf.load(directory / "config.yaml"))
    except Exception:  # absent or damaged
        return
    now = settings(config)
    other = sorted(key for key in before | now if before.get(key) != now.get(key))
    same = ("drafter.checkpoint", *ANY_DRAFTER)
    shape = [key for key in other if key.startswith("drafter.") and key not in same]
    if shape:
        raise ConfigError(
            f"{directory} holds a run of another drafter ({', '.join(shape[:3])} differ): give its values, or another "
            "directory (hydra.run.dir=DIR)."
        )
    changed = [key for key in other if not key.startswith(("trainer.", "checkpoint.", "ranks.", "drafter."))]
    if changed:
        log.warning(
            "This run continues with other settings than it started with: %s. Its results depend on both.",
            ", ".join(changed[:5]) + (", ..." if len(changed) > 5 else ""),
        )  # fmt: skip


def finished(directory: Path, config: DictConfig) -> TrainingReport | None:
    """The report of a run that ended in this directory with this configuration, or None."""
    try:
        same = (directory / "config.yaml").read_text(encoding="utf-8") == composed(config)
        return TrainingReport(**read_json(directory / "report.json", FORMAT)) if same else None
    except (OSError, FileError):
        return None


def _first_texts(
    data: ReplayDataModule, rollout: Rollout, target: Target, rules: Rules, directory: Path, config: DictConfig
) -> Iterator[list[int]]:
    """The target's responses to the first refresh's prompts, for a drafter that is made from them.

    They come from the run's own trajectories, where the first refresh finds them again. There is no trainer yet, so the
    target is moved to its device here.
    """
    anywhere = config.trainer.get("accelerator", "auto") in ("auto", "gpu", "cuda")
    if torch.cuda.is_available() and target.device.type == "cpu" and anywhere:
        target.to(f"cuda:{os.environ.get('LOCAL_RANK', '0')}")
    assert data.encoder is not None
    source = rollout.trajectories or InProcessTrajectories(str(directory / "trajectories"), drafted=False)
    indices = data.stretch(0)
    with rollout_progress(len(indices), label="Texts of the target") as progress:
        request = Request(
            target, None, data.encoder.tokenizer, lambda: data.prompts(indices), indices,
            dataclasses.replace(rules, max_new_tokens=config.refresh.max_new_tokens), data.max_prompt_tokens,
            config.seed, progress,
        )  # fmt: skip
        for batch in source.collect(request):
            yield from (text.response for text in batch)


def _trainer(config: DictConfig, directory: Path, *callbacks: L.Callback) -> L.Trainer:
    last = LastCheckpoint(directory / "checkpoints" / "last.ckpt", config.checkpoint.every_n_steps)
    plugins: list[Any] = [CheckpointFiles()]
    if SLURMEnvironment.detect():
        # Lightning's own requeueing would save a checkpoint in the middle of a step.
        plugins.append(SLURMEnvironment(auto_requeue=False))
    named = [instantiate(node) for node in (config.get("callbacks") or {}).values() if node is not None]
    # Lightning refuses this callback without a logger.
    chosen = [c for c in named if config.get("logger") or not isinstance(c, LearningRateMonitor)]
    options: dict[str, Any] = {
        "callbacks": [last, *callbacks, *chosen], "plugins": plugins, "default_root_dir": str(directory)
    }  # fmt: skip
    if config.get("logger"):
        options["logger"] = instantiate(config.logger)
    if config.trainer.get("enable_progress_bar", True):
        options["callbacks"].append(RichProgressBar())
    return instantiate(config.trainer, **options, _convert_="partial")
