"""Refuses, before anything is loaded, parts of a run that do not fit together, or warns of them."""

from __future__ import annotations

import logging
from typing import Annotated, Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from pydantic import Field, PositiveInt

from draftopd.cli.check import check_call, check_value
from draftopd.cli.parts import rules_of
from draftopd.decoding.sampling import Sampling
from draftopd.decoding.verify import Verification
from draftopd.errors import ConfigError
from draftopd.rollout.anchors import depends_on_drafter
from draftopd.rollout.rollouts import Rollout
from draftopd.training.module import DraftModule

log = logging.getLogger(__name__)

#: Options of a drafter that a checkpoint does not fix.
ANY_DRAFTER = ("drafter.attention", "drafter.activation_checkpointing")


def check_values(config: DictConfig) -> None:
    """Check names, types and ranges of the values that belong to no ``_target_``.

    Raises:
        ConfigError: naming the value that does not fit.
    """
    module: Any = OmegaConf.to_container(config.module, resolve=True)
    check_call(DraftModule, module, "module")
    check_call(Sampling, {name: config[name] for name in ("temperature", "top_k", "top_p")})
    rules_of(config)
    check_value(config.verification, Verification, "verification")
    for name in ("max_new_tokens", "refresh.max_new_tokens"):
        check_value(OmegaConf.select(config, name), PositiveInt, name)
    check_value(config.seed, Annotated[int, Field(ge=0, lt=2**32)], "seed")
    for name in ("validate_first", "compiled"):
        check_value(config[name], bool, name)
    for name, minimum in {"max_epochs": 0, "accumulate_grad_batches": 1, "check_val_every_n_epoch": 1}.items():
        if config.trainer.get(name) is not None:
            check_value(config.trainer[name], Annotated[int, Field(ge=minimum)], f"trainer.{name}")
    for name, minimum in {"refresh.every_n_epochs": 0, "checkpoint.every_n_steps": 1}.items():
        value = OmegaConf.select(config, name)
        if type(value) is not int or value < minimum:
            raise ConfigError(f"{name} must be a whole number, {minimum} or more, found {value!r}.")


def check_rollout(config: DictConfig, rollout: Rollout) -> None:
    """Refuse a rollout, texts and anchors that do not fit together.

    Raises:
        ConfigError: naming the option without effect, and what to choose instead.
    """
    anchors = config.data.anchors
    if depends_on_drafter(anchors) and rollout.anchors == "none":
        raise ConfigError(
            f"This rollout records no anchors, so data.anchors={anchors} finds none: use data.anchors=random or all, "
            "or rollout=speculative, decode_free or fresh."
        )
    if not depends_on_drafter(anchors) and rollout.anchors == "step":
        raise ConfigError(
            f"data.anchors={anchors} does not depend on the drafter, so the anchors that rollout=fresh finds would "
            "have no effect: use rollout=target, or data.anchors=visited or error."
        )
    given = [o for o in HydraConfig.get().overrides.task if o.startswith("trajectories")]
    if rollout.trajectories is None and given:
        raise ConfigError(
            f"rollout=speculative decodes its texts itself, so {given[0]} would have no effect: "
            "use rollout=decode_free or fresh, or rollout=target for SFT."
        )


def check_sharding(config: DictConfig) -> None:
    """Refuse options that a sharded target cannot have.

    Raises:
        ConfigError: naming the option to leave out.
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
            "trainer=fsdp needs trainer.inference_mode=false: weights gathered in inference mode cannot be trained."
        )


def advise(config: DictConfig) -> None:
    """Warn of options without effect, on-policy training from random weights, and a loss for another temperature."""
    overrides = {o.split("=")[0].lstrip("+"): o for o in HydraConfig.get().overrides.task}
    if config.loss.get("rejected_weight") == 0 and config.loss.get("accepted_gamma") is not None:
        for name in ("loss.gamma", "loss.accept_until_fail"):
            if name in overrides:
                log.warning("%s has no effect: it belongs to the rejected stream, and loss.rejected_weight is 0.", name)
    checkpoint = config.drafter.get("checkpoint")
    if checkpoint is None and depends_on_drafter(config.data.anchors):
        log.warning("The drafter is fresh. Train it first (experiment=sft), or name one: drafter.checkpoint=DIR.")
    kept = ("drafter.checkpoint", "drafter.block_size", *ANY_DRAFTER)
    for name, given in overrides.items():
        if checkpoint is not None and name.startswith("drafter.") and name not in kept:
            log.warning("%s has no effect: %s was loaded. Start fresh: drafter.checkpoint=null.", given, checkpoint)
    if not rules_of(config).sampling.greedy:
        _advise_on_temperature(config)


def _advise_on_temperature(config: DictConfig) -> None:
    """Warn of a loss whose distributions are not those of drafting and verification above temperature 0."""
    sharpened = config.loss.get("target_temperature", 1.0)
    if sharpened != 1:
        log.warning(
            "temperature=%s verifies at that temperature, but loss.target_temperature=%s trains for another one: use "
            "loss.target_temperature=1.",
            config.temperature, sharpened,
        )  # fmt: skip
    if config.loss["_target_"].endswith(".SampledKL") and config.loss.get("include_correction"):
        log.warning(
            "Above temperature 0 the recorded token at the correction slot follows other proposals than those of the "
            "replay: leave loss.include_correction=true out."
        )
