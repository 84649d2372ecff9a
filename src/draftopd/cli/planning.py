"""The plan of a run: its memory and time, from the overrides of a training command."""

from __future__ import annotations

import dataclasses
import sys
from typing import Any, get_type_hints

import torch
import transformers
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from draftopd.cli.app import configs, guarded
from draftopd.cli.check import check_value
from draftopd.cli.nearest import nearest
from draftopd.cli.overrides import problem
from draftopd.cli.parts import rules_of
from draftopd.decoding.generate import CAPACITY_STEP
from draftopd.drafters.draft_vocabulary import frequent_tokens
from draftopd.errors import ConfigError
from draftopd.losses.base import Loss
from draftopd.planning.devices import Assumptions
from draftopd.planning.memory import Decoding, Sharing
from draftopd.planning.report import print_plan
from draftopd.planning.run import Run, Texts
from draftopd.planning.shapes import shape_of, target_of
from draftopd.planning.sizes import DrafterSize, Step
from draftopd.rollout.rollouts import DecodeFreeRollout, FreshRollout, Rollout, SpeculativeRollout
from draftopd.targets.target import Target

#: Bytes of a weight, and of what autocast computes in, by Lightning's names.
PRECISIONS = {
    "32": (4, 4), "32-true": (4, 4), "bf16-mixed": (4, 2), "16-mixed": (4, 2), "bf16": (4, 2), "16": (4, 2),
    "bf16-true": (2, 2), "16-true": (2, 2),
}  # fmt: skip


def plan(arguments: list[str]) -> None:
    """Print the plan of the run that ``arguments`` name: overrides of train.py, and ``plan.NAME=VALUE``."""
    mine = [a.lstrip("+") for a in arguments if a.lstrip("+").startswith("plan.")]
    others = [a for a in arguments if not a.lstrip("+").startswith("plan.")]
    found = problem(configs(), "train", others, keeps=False)
    if found:
        sys.exit(f"Error: {found}")
    try:
        with initialize_config_dir(str(configs()), version_base="1.3"):
            config = compose("train", others)
    finally:
        GlobalHydra.instance().clear()
    OmegaConf.set_struct(config, False)
    # A plan has no run directory.
    config.pop("logger", None)
    config.pop("callbacks", None)
    if "store" in config.trajectories:
        config.trajectories.store = "trajectories"
    guarded(lambda checked: _print(checked, mine), config)


def _print(config: DictConfig, given: list[str]) -> None:
    transformers.utils.logging.set_verbosity_error()
    assumptions = assumed(given)
    run, source = describe(config, assumptions)
    print_plan(run, assumptions, source)


def assumed(given: list[str]) -> Assumptions:
    """The assumptions that ``plan.NAME=VALUE`` sets.

    Raises:
        ConfigError: for a name that does not exist, or a value that does not fit.
    """
    values = OmegaConf.to_container(OmegaConf.from_dotlist([g.removeprefix("plan.") for g in given]))
    assert isinstance(values, dict)
    hints = get_type_hints(Assumptions, include_extras=True)
    for name, value in values.items():
        if name not in hints:
            raise ConfigError(f"plan.{name!s} is not an assumption of a plan: {nearest(str(name), hints)}")
        check_value(value, hints[str(name)], f"plan.{name}")
    found = Assumptions(**{str(name): value for name, value in values.items()})
    _ = found.device  # refuses an unknown name
    return found


def describe(config: DictConfig, given: Assumptions) -> tuple[Run, str]:
    """The run of a composed configuration, and the source of its target's shape.

    Raises:
        DraftOPDError: if a training run would refuse the configuration too, or a plan needs what is not known.
    """
    rollout: Rollout = instantiate(config.rollout)
    loss: Loss = instantiate(config.loss)
    node = config.target
    shape, source = shape_of(node.path, node.revision, node.trust_remote_code)
    target, t = target_of(shape, node.dtype)
    d = drafter_of(config.drafter, target)
    data, trainer = config.data, config.trainer
    precision = str(trainer.get("precision", "32-true"))
    if precision not in PRECISIONS:
        raise ConfigError(f"trainer.precision={precision} is not planned for: choose from {', '.join(PRECISIONS)}.")
    w, c = PRECISIONS[precision]
    devices, sharing = _devices(trainer, given.devices)

    response = config.max_new_tokens
    mean_prompt = given.prompt_tokens or data.max_prompt_tokens
    mean_response = min(given.response_tokens or response, response)
    max_anchors = _anchors(data, response, 1.0)
    step = Step(
        batch=data.batch_size, tokens=data.max_prompt_tokens + response, anchors=max_anchors, weight_bytes=w,
        compute_bytes=c,
        scope=loss.scope if rules_of(config).sampling.greedy or loss.scope != "until_fail" else "proposals",
        loss_copies=loss.logit_copies, gpu=True,
        checkpointing=config.drafter.activation_checkpointing, prompt=data.max_prompt_tokens,
        attention="flex" if d.kind == "dflash" and config.drafter.get("attention", "sdpa") != "sdpa" else "expanded",
    )  # fmt: skip
    mean = dataclasses.replace(
        step, tokens=mean_prompt + mean_response, anchors=_anchors(data, mean_response, given.tau)
    )
    epochs, every = trainer.get("max_epochs") or 1, config.refresh.every_n_epochs
    batches = data.batches_per_epoch or max(1, data.prompts_per_refresh // (data.batch_size * devices))
    tested = epochs // (trainer.get("check_val_every_n_epoch") or 1) + bool(config.validate_first)
    run = Run(
        target=t, drafter=d, step=step, mean=mean, sharing=sharing, devices=devices,
        texts=_texts(config, rollout, w), validation=_decoding(config, data.validation_batch_size, w, c),
        used=min(1.0, given.tau / (d.block - 1)) if step.scope == "until_fail" else 1.0,
        proposes=loss.uses_proposals, every=max(1, trainer.get("log_every_n_steps") or 1), epochs=epochs,
        batches=batches, accumulate=trainer.get("accumulate_grad_batches") or 1, prompts=data.prompts_per_refresh,
        refreshes=-(-epochs // every) if every else 1, validation_prompts=data.validation_count, validations=tested,
        mean_prompt=mean_prompt, mean_response=mean_response, compiled=config.compiled,
    )  # fmt: skip
    return run, source


def drafter_of(config: DictConfig, target: Target) -> DrafterSize:
    """The size of the drafter that a configuration names: of its checkpoint, which is read, or of a fresh one.

    Raises:
        DrafterError: if it does not fit the target.
    """
    node: dict[str, Any] = dict(OmegaConf.to_container(config, resolve=True))  # type: ignore[arg-type]
    if node.get("checkpoint") is not None:
        return DrafterSize.of(instantiate(node, target=target, tokenizer=None, texts=None))
    if node.get("mask_token_id", 0) is None:
        node["mask_token_id"] = 0  # any id has the same size, and no tokenizer is read
    rows = node.pop("draft_vocab_size", None)
    with torch.device("meta"):
        size = DrafterSize.of(instantiate(node, target=target, tokenizer=None, texts=None))
    if rows is not None and rows != target.vocab_size:
        frequent_tokens([[0]], rows, target.vocab_size)  # refuses an impossible size
        size = dataclasses.replace(size, own_head=rows, elements=size.elements - (size.own_head - rows) * size.hidden)
    return size


def _anchors(data: DictConfig, response: int, tau: float) -> int:
    """Anchors of a text whose blocks emit ``tau`` tokens each; random and all anchors do not depend on blocks."""
    found = response if data.anchors in ("random", "all") else round(response / tau)
    limit = data.anchors_per_sequence
    return max(1, found - 1 if limit is None or data.anchors == "all" else min(found - 1, limit))


def _decoding(config: DictConfig, rows: int, weight_bytes: int, compute_bytes: int) -> Decoding:
    return Decoding(
        rows, config.data.max_prompt_tokens, config.max_new_tokens, weight_bytes, compute_bytes,
        not rules_of(config).sampling.greedy,
        CAPACITY_STEP if config.compiled else 1,
    )  # fmt: skip


def _texts(config: DictConfig, rollout: Rollout, weight_bytes: int) -> Texts:
    """The source of a refresh's texts, and how anchors are found on them."""
    # Rollouts run between epochs, outside of Lightning's autocast.
    if isinstance(rollout, SpeculativeRollout):
        return Texts(_decoding(config, rollout.batch_size, weight_bytes, weight_bytes))
    source = config.trajectories
    here = str(source._target_).endswith("InProcessTrajectories")
    decoding = _decoding(config, source.batch_size, weight_bytes, weight_bytes) if here else None
    drafted = bool(here and source.drafted)
    if not isinstance(rollout, FreshRollout):
        return Texts(decoding, drafted, decoded_by="trajectories")
    rows = rollout.batch_size if isinstance(rollout, DecodeFreeRollout) else config.data.batch_size
    walk = _decoding(config, rows, weight_bytes, weight_bytes)
    return Texts(decoding, drafted, walk, rollout.blocks_at_once, rollout.anchors == "step", "trajectories")


def _devices(trainer: DictConfig, found: int) -> tuple[int, Sharing]:
    """Number of processes, and how they share memory; ``found`` devices where the trainer takes all."""
    devices, strategy = trainer.get("devices", 1), trainer.get("strategy", "auto")
    if isinstance(devices, str) and devices.isdigit():
        devices = int(devices)
    if OmegaConf.is_list(devices):
        devices = len(devices)
    if devices in ("auto", -1):
        devices = found
    if not isinstance(devices, int) or devices < 1:
        raise ConfigError(f"trainer.devices={devices} is not a number of devices: write trainer.devices=N.")
    count = devices * (trainer.get("num_nodes") or 1)
    name = str(strategy.get("_target_", "")) if OmegaConf.is_dict(strategy) else str(strategy)
    if "ModelParallel" in name or "fsdp" in name.lower():
        return count, Sharing(shards=count)
    return count, Sharing(buckets=count > 1)
