"""One training run: build the parts a configuration names, fit, report."""

from __future__ import annotations

import dataclasses
import logging
import os
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import lightning as L
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint, RichProgressBar
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.utilities.exceptions import SIGTERMException
from omegaconf import DictConfig, OmegaConf
from pydantic import Field
from transformers import PreTrainedTokenizerBase

from draftopd.cli.app import quiet
from draftopd.cli.check import check, check_value
from draftopd.cli.record import composed, write_record
from draftopd.cli.report import FORMAT, TESTED_FORMAT, TrainingReport, print_report
from draftopd.cli.runs import settings
from draftopd.distributed.sharding import whole_tensors
from draftopd.distributed.watch import watched
from draftopd.drafters.base import Drafter
from draftopd.drafters.checkpoint import save_drafter
from draftopd.errors import ConfigError, FileError
from draftopd.io.files import read_json, write_json
from draftopd.metrics.acceptance_length import acceptance_length
from draftopd.replay.fresh import FreshAnchors
from draftopd.rollout.anchors import depends_on_drafter
from draftopd.rollout.request import Request
from draftopd.rollout.rollouts import DecodeFreeRollout, Rollout
from draftopd.rollout.trajectories import InProcessTrajectories
from draftopd.targets.load import load_tokenizer, stop_tokens
from draftopd.targets.target import Target
from draftopd.training.checkpoints import CheckpointFiles, LastCheckpoint, newest_whole
from draftopd.training.datamodule import ReplayDataModule
from draftopd.training.module import DraftModule
from draftopd.training.progress import rollout_progress
from draftopd.training.refresh import RefreshAnchors
from draftopd.training.viewer import DraftViewer

log = logging.getLogger(__name__)

#: Keys that say how a drafter computes, and nothing of the drafter itself.
ANY_DRAFTER = ("drafter.attention", "drafter.activation_checkpointing")


def run(config: DictConfig) -> TrainingReport:
    """Train as configured and leave checkpoint, logs, buffer and record in Hydra's run directory.

    Raises:
        DraftOPDError: with one clear message, for anything the user can mend.
    """
    began = time.perf_counter()
    check_values(config)
    quiet()
    directory = Path(HydraConfig.get().runtime.output_dir)
    earlier = finished(directory, config)
    if earlier is not None:
        print("This run has ended before: nothing is left to do.")
        print_report(earlier)
        return earlier
    L.seed_everything(config.seed, verbose=False)
    rollout: Rollout = instantiate(config.rollout)
    check_refresh(config, rollout)
    check_sharding(config)
    target: Target = instantiate(config.target)
    tokenizer = load_tokenizer(config.target.path, config.target.trust_remote_code)
    data: ReplayDataModule = instantiate(config.data)
    data.attach(tokenizer, directory / "anchors")
    texts_of_the_target = partial(
        first_texts, data, rollout, target, tokenizer, directory, config.seed, config.trainer.get("accelerator", "auto")
    )
    drafter: Drafter = instantiate(config.drafter, target=target, tokenizer=tokenizer, texts=texts_of_the_target)
    data.slots = drafter.num_proposals
    _advise(config)
    _advise_on_temperature(config, rollout)
    schedule, fresh = config.refresh, None
    texts, every_n_steps = rollout, schedule.every_n_steps
    if every_n_steps == 1 and isinstance(rollout, DecodeFreeRollout):
        # Every step finds its anchors itself, so a refresh only brings texts.
        fresh = FreshAnchors(rollout.walker, data.policy)
        texts, every_n_steps = rollout.texts_only(), None
    module = DraftModule(
        target, drafter, instantiate(config.loss), rollout.sampling, stop_tokens(target, tokenizer),
        max_new_tokens=config.max_new_tokens, verification=rollout.verification, seed=config.seed,
        compiled=config.compiled, fresh=fresh,
        **instantiate(config.module, _convert_="all"),
    )  # fmt: skip
    refresh = RefreshAnchors(texts, directory / "anchors", schedule.every_n_epochs, every_n_steps, config.seed)
    trainer = _trainer(config, directory, refresh, DraftViewer(tokenizer))
    with watched(trainer, config.ranks.lost_after):
        _fit(config, trainer, module, data, directory)
        if data.test_count:
            trainer.test(module, datamodule=data, verbose=False)
        tensors = whole_tensors(drafter)
    if trainer.is_global_zero:
        save_drafter(drafter, directory / "drafter", tensors=tensors)
    report = TrainingReport(
        tau_before=module.tau_before,
        tau_after=module.tau_after,
        steps=trainer.global_step,
        tokens=module.tokens_seen,
        seconds=dict(module.clock.seconds),
        total_seconds=time.perf_counter() - began + module.earlier_seconds,
        directory=str(directory),
        flops=module.flops(),
        test_tau=acceptance_length(list(module.tested.values()))[0],
    )
    if trainer.is_global_zero:
        if data.test_count:
            emitted = {str(place): module.tested[place] for place in sorted(module.tested)}
            write_json(directory / "test.json", {"emitted": emitted}, TESTED_FORMAT)
        write_json(directory / "report.json", dataclasses.asdict(report), FORMAT)
        print_report(report)
    return report


def _fit(config: DictConfig, trainer: L.Trainer, module: DraftModule, data: ReplayDataModule, directory: Path) -> None:
    """Train from the newest whole checkpoint on, or from the beginning.

    Raises:
        ConfigError: if it has more epochs behind it than are asked for.
        KeyboardInterrupt: where Ctrl-C stopped it.
    """
    resume = newest_whole(directory / "checkpoints")
    if resume is not None:
        _compare(directory, config)
        begun = torch.load(resume, map_location="cpu", weights_only=True, mmap=True)["epoch"] + 1
        if 0 <= (trainer.max_epochs or -1) < begun:
            raise ConfigError(
                f"{resume} is of epoch {begun}, and trainer.max_epochs={trainer.max_epochs}: give as many or "
                "more to go on, or another directory to begin anew (hydra.run.dir=DIR)."
            )
    if trainer.is_global_zero:
        # What an earlier run came to here with other settings is not what this one will come to.
        for name in ("report.json", "test.json"):
            (directory / name).unlink(missing_ok=True)
        write_record(directory, config)

    if resume is not None:
        if trainer.is_global_zero:
            print(f"Continuing from {resume}")
    elif config.validate_first:
        module.tau_before = trainer.validate(module, datamodule=data, verbose=False)[0]["val/tau"]
    try:
        trainer.fit(module, datamodule=data, ckpt_path=resume and str(resume), weights_only=True)
    except SIGTERMException:
        raise
    except SystemExit as error:
        # So Lightning ends a fit that Ctrl-C stopped.
        raise KeyboardInterrupt from error


def _compare(directory: Path, config: DictConfig) -> None:
    """Warn of settings that a run goes on with and has not begun with.

    Raises:
        ConfigError: if they make another drafter.
    """
    try:
        before = settings(OmegaConf.load(directory / "config.yaml"))
    except Exception:  # a record that is absent or damaged says nothing
        return
    now = settings(config)
    other = sorted(key for key in before | now if before.get(key) != now.get(key))
    same = ("drafter.checkpoint", *ANY_DRAFTER)
    shape = [key for key in other if key.startswith("drafter.") and key not in same]
    if shape:
        raise ConfigError(
            f"{directory} holds a run of another drafter ({', '.join(shape[:3])} differ): give what it began with, or "
            "another directory (hydra.run.dir=DIR)."
        )
    changed = [key for key in other if not key.startswith(("trainer.", "checkpoint.", "ranks.", "drafter."))]
    if changed:
        log.warning(
            "This run goes on with other settings than it had: %s. What it comes to will be of both.",
            ", ".join(changed[:5]) + (", ..." if len(changed) > 5 else ""),
        )  # fmt: skip


def finished(directory: Path, config: DictConfig) -> TrainingReport | None:
    """The report of a run that came to its end in this directory with this configuration, or None."""
    try:
        same = (directory / "config.yaml").read_text(encoding="utf-8") == composed(config)
        return TrainingReport(**read_json(directory / "report.json", FORMAT)) if same else None
    except (OSError, FileError):
        return None


def check_values(config: DictConfig) -> None:
    """Names, types and ranges of the values that no part is made with by Hydra.

    Raises:
        ConfigError: naming the one that does not fit.
    """
    target = f"{DraftModule.__module__}.{DraftModule.__qualname__}"
    values: Any = OmegaConf.to_container(config.module, resolve=True)
    check({"_target_": target, **values}, "module")
    check_value(config.seed, Annotated[int, Field(ge=0, lt=2**32)], "seed")
    for name in ("validate_first", "compiled"):
        check_value(config[name], bool, name)
    for name, least in {"max_epochs": 0, "accumulate_grad_batches": 1, "check_val_every_n_epoch": 1}.items():
        if config.trainer.get(name) is not None:
            check_value(config.trainer[name], Annotated[int, Field(ge=least)], f"trainer.{name}")


def first_texts(
    data: ReplayDataModule,
    rollout: Rollout,
    target: Target,
    tokenizer: PreTrainedTokenizerBase,
    directory: Path,
    seed: int,
    accelerator: str = "auto",
) -> Iterator[list[int]]:
    """The target's responses to the first refresh's prompts, for a drafter that is made from them.

    They come from the run's own trajectories, so that the first refresh finds them there. There is no trainer yet to
    place the target.
    """
    if torch.cuda.is_available() and target.device.type == "cpu" and accelerator in ("auto", "gpu", "cuda"):
        target.to(f"cuda:{os.environ.get('LOCAL_RANK', '0')}")
    source = rollout.trajectories or InProcessTrajectories(str(directory / "trajectories"), drafted=False)
    places = data.stretch(0)
    with rollout_progress(len(places), label="Texts of the target") as progress:
        request = Request(
            target, None, tokenizer, lambda: data.prompts(places), places, stop_tokens(target, tokenizer),
            rollout.sampling, rollout.max_new_tokens, data.max_prompt_tokens, seed, progress,
        )  # fmt: skip
        for batch in source.collect(request):
            yield from (text.response for text in batch)


def _advise(config: DictConfig) -> None:
    """Warn of options without effect, and of on-policy training that begins with random weights."""
    overrides = HydraConfig.get().overrides.task
    if config.loss.get("rejected_weight") == 0 and config.loss.get("accepted_gamma") is not None:
        for name in ("loss.gamma", "loss.accept_until_fail"):
            if any(given.split("=")[0].lstrip("+") == name for given in overrides):
                log.warning("%s has no effect: it is of the rejected stream, and loss.rejected_weight is 0.", name)
    checkpoint = config.drafter.get("checkpoint")
    if checkpoint is None:
        if depends_on_drafter(config.data.anchors):
            log.warning("The drafter is fresh. Train it first (experiment=sft), or name one: drafter.checkpoint=DIR.")
        return
    for given in overrides:
        name = given.split("=")[0].lstrip("+")
        if name.startswith("drafter.") and name not in ("drafter.checkpoint", "drafter.block_size", *ANY_DRAFTER):
            log.warning("%s has no effect: %s was loaded. Start fresh: drafter.checkpoint=null.", given, checkpoint)


def _advise_on_temperature(config: DictConfig, rollout: Rollout) -> None:
    """Warn of a loss whose law is not the one that drafting and verification have above temperature 0."""
    if rollout.sampling.greedy:
        return
    sharpened = config.loss.get("target_temperature", 1.0)
    if sharpened != 1:
        log.warning(
            "rollout.temperature=%s verifies with target and drafter at that temperature, but "
            "loss.target_temperature=%s draws the drafter to a target at another: use loss.target_temperature=1.",
            rollout.sampling.temperature, sharpened,
        )  # fmt: skip
    if config.loss["_target_"].endswith(".SampledKL") and config.loss.get("include_correction"):
        log.warning(
            "Above temperature 0 the recorded token at the correction slot follows other proposals than those that "
            "replay draws: leave loss.include_correction=true out."
        )


def check_refresh(config: DictConfig, rollout: Rollout) -> None:
    """Refuse a rollout, texts, anchors and a schedule that do not go together, and numbers out of range.

    Raises:
        ConfigError: saying what would have no effect, and what to choose instead.
    """
    anchors, schedule = config.data.anchors, config.refresh
    if depends_on_drafter(anchors) and not rollout.records_anchors:
        raise ConfigError(
            f"This rollout records no anchors, so data.anchors={anchors} finds none: use data.anchors=random or all, "
            "or rollout=speculative or decode_free."
        )
    given = [o for o in HydraConfig.get().overrides.task if o.startswith("trajectories")]
    if rollout.trajectories is None and given:
        raise ConfigError(
            f"rollout=speculative decodes its texts itself, so {given[0]} would have no effect: "
            "use rollout=decode_free, or rollout=target for SFT."
        )
    numbers = {
        "refresh.every_n_epochs": (schedule.every_n_epochs, 0),
        "refresh.every_n_steps": (1 if schedule.every_n_steps is None else schedule.every_n_steps, 1),
        "checkpoint.every_n_steps": (config.checkpoint.every_n_steps, 1),
    }
    for name, (value, least) in numbers.items():
        if type(value) is not int or value < least:
            raise ConfigError(f"{name} must be a whole number, {least} or more, found {value!r}.")
    if schedule.every_n_steps is None:
        return
    if rollout.walker is None:
        raise ConfigError(
            "Only rollout=decode_free can renew anchors within an epoch (refresh.every_n_steps). With another rollout "
            "make the epoch shorter: data.batches_per_epoch=N."
        )
    if not depends_on_drafter(anchors):
        raise ConfigError(
            f"data.anchors={anchors} does not depend on the drafter, so refresh.every_n_steps would have no effect: "
            "leave it out, or use data.anchors=visited or error."
        )


def check_sharding(config: DictConfig) -> None:
    """Refuse what a target in shares cannot do.

    Raises:
        ConfigError: saying what to leave out.
    """
    strategy = config.trainer.get("strategy")
    if not (isinstance(strategy, DictConfig) and strategy.get("_target_", "").endswith("ModelParallelStrategy")):
        return
    if any(part.get("compiled") for part in (config, config.rollout, config.get("trajectories") or {})):
        raise ConfigError("trainer=fsdp gathers layers between the steps of a pass: leave compiled=true out.")
    for name in ("device", "device_map"):
        if config.target.get(name) is not None:
            raise ConfigError(f"trainer=fsdp places the target itself: leave target.{name}={config.target[name]} out.")
    if config.trainer.get("inference_mode", True):
        raise ConfigError(
            "trainer=fsdp needs trainer.inference_mode=false: weights gathered to decode must train later."
        )


def _trainer(config: DictConfig, directory: Path, *callbacks: L.Callback) -> L.Trainer:
    where = directory / "checkpoints"
    best = ModelCheckpoint(dirpath=where, filename="best", monitor="val/tau", mode="max", enable_version_counter=False)
    last = LastCheckpoint(where / "last.ckpt", config.checkpoint.every_n_steps)
    plugins: list[Any] = [CheckpointFiles()]
    if SLURMEnvironment.detect():
        # Lightning's own requeueing keeps a checkpoint in the middle of a step.
        plugins.append(SLURMEnvironment(auto_requeue=False))
    options: dict[str, Any] = {
        "callbacks": [best, last, *callbacks], "plugins": plugins, "default_root_dir": str(directory)
    }  # fmt: skip
    if config.get("logger"):
        options["logger"] = instantiate(config.logger)
        options["callbacks"].append(LearningRateMonitor("step"))
    if config.trainer.get("enable_progress_bar", True):
        options["callbacks"].append(RichProgressBar())
    return instantiate(config.trainer, **options, _convert_="partial")
