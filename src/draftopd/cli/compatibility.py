"""Parts of a run that do not go together: refused before anything is loaded, or warned of."""

from __future__ import annotations

import logging
from typing import Annotated, Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from pydantic import Field, PositiveInt

from draftopd.cli.check import check, check_value
from draftopd.cli.parts import rules_of
from draftopd.decoding.sampling import Sampling
from draftopd.decoding.verify import Verification
from draftopd.errors import ConfigError
from draftopd.rollout.anchors import depends_on_drafter
from draftopd.rollout.rollouts import Rollout
from draftopd.training.module import DraftModule

log = logging.getLogger(__name__)

#: Options of a drafter that a checkpoint does not decide.
ANY_DRAFTER = ("drafter.attention", "drafter.activation_checkpointing")


def check_values(config: DictConfig) -> None:
    """Names, types and ranges of the values that Hydra makes no part of.

    Raises:
        ConfigError: naming the one that does not fit.
    """
    module: Any = OmegaConf.to_container(config.module, resolve=True)
    check({"_target_": _name(DraftModule), **module}, "module")
    sampling = {name: config[name] for name in ("temperature", "top_k", "top_p")}
    check({"_target_": _name(Sampling), **sampling})
    rules_of(config)
    check_value(config.verification, Verification, "verification")
    for name in ("max_new_tokens", "refresh.max_new_tokens"):
        check_value(OmegaConf.select(config, name), PositiveInt, name)
    check_value(config.seed, Annotated[int, Field(ge=0, lt=2**32)], "seed")
    for name in ("validate_first", "compiled"):
        check_value(config[name], bool, name)
    for name, least in {"max_epochs": 0, "accumulate_grad_batches": 1, "check_val_every_n_epoch": 1}.items():
        if config.trainer.get(name) is not None:
            check_value(config.trainer[name], Annotated[int, Field(ge=least)], f"trainer.{name}")
    for name, value, least in (
        ("refresh.every_n_epochs", config.refresh.every_n_epochs, 0),
        ("checkpoint.every_n_steps", config.checkpoint.every_n_steps, 1),
    ):
        if type(value) is not int or value < least:
            raise ConfigError(f"{name} must be a whole number, {least} or more, found {value!r}.")


def check_rollout(config: DictConfig, rollout: Rollout) -> None:
    """Refuse a rollout, texts and anchors that do not go together.

    Raises:
        ConfigError: saying what would have no effect, and what to choose instead.
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
    """Refuse what a target in shards cannot do.

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


def advise(config: DictConfig) -> None:
    """Warn of options without effect, of on-policy training from random weights, and of a loss for other sampling."""
    overrides = {o.split("=")[0].lstrip("+"): o for o in HydraConfig.get().overrides.task}
    if config.loss.get("rejected_weight") == 0 and config.loss.get("accepted_gamma") is not None:
        for name in ("loss.gamma", "loss.accept_until_fail"):
            if name in overrides:
                log.warning("%s has no effect: it is of the rejected stream, and loss.rejected_weight is 0.", name)
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
    """Warn of a loss whose distribution is not the one that drafting and verification have above temperature 0."""
    sharpened = config.loss.get("target_temperature", 1.0)
    if sharpened != 1:
        log.warning(
            "temperature=%s verifies with target and drafter at that temperature, but loss.target_temperature=%s draws "
            "the drafter to a target at another: use loss.target_temperature=1.",
            config.temperature, sharpened,
        )  # fmt: skip
    if config.loss["_target_"].endswith(".SampledKL") and config.loss.get("include_correction"):
        log.warning(
            "Above temperature 0 the recorded token at the correction slot follows other proposals than those that "
            "replay draws: leave loss.include_correction=true out."
        )


def _name(part: type) -> str:
    return f"{part.__module__}.{part.__qualname__}"
