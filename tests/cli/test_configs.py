"""The configuration files name every argument, and only arguments that exist."""

from __future__ import annotations

import pytest
import yaml
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import OmegaConf
from tests.support.losses import LOSSES, loss_config
from tests.support.paths import ROOT

from draftopd.cli.check import _locate, _parameters, check
from draftopd.cli.training import check_sharding
from draftopd.errors import ConfigError
from draftopd.losses.base import Loss


@pytest.mark.parametrize("name", LOSSES)
def test_losses(name: str) -> None:
    config = OmegaConf.to_container(loss_config(name))
    check(config, "loss")
    names, _, open_ended = _parameters(_locate(config["_target_"], "loss"))
    assert set(config) - {"_target_"} == names and not open_ended
    assert isinstance(instantiate(config), Loss)


@pytest.mark.parametrize("group", ["rollout", "trajectories"])
def test_rollouts_and_texts(group: str) -> None:
    for path in (ROOT / "configs" / group).glob("*.yaml"):
        if path.stem == "plain":
            continue  # in_process with another value
        config = yaml.safe_load(path.read_text())
        names, _, open_ended = _parameters(_locate(config["_target_"], group))
        assert set(config) - {"_target_"} == names and not open_ended, path.name


def test_sft_takes_texts_from_every_source() -> None:
    for source in ("plain", "server", "jsonl", "dataset"):
        with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
            config = compose("train", ["experiment=sft", f"trajectories={source}"])
        given = {"url": "x", "path": "x", "seed": 0, "store": "x", "compiled": False}
        check(
            {key: given.get(key, value) for key, value in config.trajectories.items_ex(resolve=False)}, "trajectories"
        )
        assert config.trajectories.get("drafted", False) is False


@pytest.mark.parametrize(
    "change, message",
    [
        ({"gama": 1.0}, "did you mean 'gamma'"),
        ({"gamma": "x"}, "loss.gamma='x' does not fit"),
        ({"flor": 1}, "'floor'"),
    ],
)
def test_arguments_of_the_base_class_are_checked_too(change: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check({"_target_": "draftopd.losses.sampled_kl.SampledKL", **change}, "loss")


@pytest.mark.parametrize(
    "override, message",
    [
        ("compiled=true", "leave compiled=true out"),
        ("rollout.compiled=true", "leave compiled=true out"),
        ("target.device_map=auto", "leave target.device_map=auto out"),
        ("trainer.inference_mode=true", "needs trainer.inference_mode=false"),
    ],
)
def test_options_that_a_sharded_target_lacks_are_refused(override: str, message: str) -> None:
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        check_sharding(compose("train", ["trainer=ddp", f"++{override}"]))
        check_sharding(compose("train", ["trainer=fsdp"]))
        with pytest.raises(ConfigError, match=message):
            check_sharding(compose("train", ["trainer=fsdp", override]))
