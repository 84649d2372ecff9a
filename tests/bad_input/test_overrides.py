"""Configurations and overrides that are wrong, and keys that they would expose."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from tests.support.paths import ROOT
from tests.support.refusing import ADVICE, refused

from draftopd.cli.check import check
from draftopd.cli.overrides import foreseen, problem
from draftopd.cli.training import check_values
from draftopd.drafters.draft_vocabulary import frequent_tokens
from draftopd.errors import ConfigError, DrafterError
from draftopd.io.connection import Address

#: Overrides that are refused before Hydra begins, so that nothing of them is written.
OVERRIDES = {
    "group option unknown": ("target=qwen3_99b", "target=qwen3_99b does not exist: did you mean 'qwen3_"),
    "option at a place unknown": ("loss@loss.first=reach_", "loss@loss.first=reach_ does not exist: did you mean"),
    "value of a group missing": ("data=jsonl", "data.train_prompts.path must be given: data.train_prompts.path=VALUE"),
    "group unknown": ("los=asymmetric_kl", "los is not a configuration key: did you mean 'loss"),
    "group option misspelt": ("loss=asymetric_kl", "did you mean 'asymmetric_kl'"),
    "what options share": ("loss=base/distilled", "loss=base/distilled does not exist"),
    "group null": ("logger=null", "write ~logger"),
    "key misspelt": ("trainer.max_epoch=3", "trainer.max_epoch is not a configuration key: did you mean 'trainer"),
    "key of the module misspelt": ("module.count_flop=1", "did you mean 'module.count_flops'?"),
    "key of the loss misspelt": ("loss.gama=0.5", "did you mean 'loss.gamma'?"),
    "no value": ("seed", "'seed' is not an override: write KEY=VALUE"),
    "bracket left open": ("seed=[1", "'seed=[1' cannot be read"),
    "brace left open": ("data.train_prompts={a: 1", "cannot be read"),
    "quote left open": ("name='run", "cannot be read"),
    "key given twice": ("+seed=3", "Could not append to config"),
    "a key in an address": ("trajectories.url=http://me:hunter2@host:8000", "trajectories.url is an address with a"),
    "a key for its variable": ("trajectories.api_key_env=sk-hunter2", "trajectories.api_key_env names no environment"),
    "a key of its own": ("+trajectories.api_key=hunter2", "trajectories.api_key would be written into the run's"),
    "a token of the hub": ("+target.token=hunter2", "target.token would be written"),
}  # fmt: skip
SERVER = ("trajectories=server", "rollout=decode_free")


@pytest.mark.parametrize(("override", "message"), OVERRIDES.values(), ids=OVERRIDES)
def test_overrides(override: str, message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    given = [*SERVER, override] if override.lstrip("+").startswith("trajectories") else [override]
    said = problem(ROOT / "configs", "train", given) or ""
    assert message in said and "hunter2" not in said and "\n" not in said
    assert ADVICE.search(said) or "append" in said
    assert not list(tmp_path.iterdir())


FLAGGED = {
    "option of a sweep unknown": (["-m", "experiment=ablation/gama"], "did you mean 'ablation/gamma'"),
    "one of a sweep's options unknown": (["-m", "loss=reach,reah", "seed=0,1"], "loss=reah does not exist"),
    "a sweep of addresses with a password": (
        ["-m", "rollout=decode_free", "trajectories=server", "trajectories.url=http://u:hunter2@a,http://b"], "leave",
    ),
    "shown, option unknown": (["experiment=recipee", "--cfg", "job"], "did you mean 'recipe'"),
    "shown, key misspelt": (["--cfg", "job", "loss.gama=0.5"], "did you mean 'loss.gamma'"),
}  # fmt: skip


@pytest.mark.parametrize(("arguments", "message"), FLAGGED.values(), ids=FLAGGED)
def test_beside_flags(arguments: list[str], message: str) -> None:
    said = foreseen(ROOT / "configs", "train", arguments) or ""
    assert message in said and "hunter2" not in said


@pytest.mark.parametrize(
    "arguments",
    [
        ["-m", "loss=sharp_kl,forward_kl", "loss.accepted_weight=0.5,1", "seed=range(3)"],
        ["-m", "experiment=ablation/gamma"],
        ["--multirun", "drafter=glob(*)"],
        ["~logger", "--cfg", "job"],
        ["--help"],
        ["--config-dir", "elsewhere", "loss=mine"],
    ],
    ids=" ".join,
)
def test_correct_overrides_pass(arguments: list[str]) -> None:
    assert foreseen(ROOT / "configs", "train", arguments) is None


def test_a_key_in_the_environment_is_fine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SERVER_KEY", "hunter2")
    given = [*SERVER, "trajectories.api_key_env=SERVER_KEY", "trajectories.url=http://host:8000/v1/@b"]
    assert problem(ROOT / "configs", "train", given) is None


NODES: dict[str, tuple[dict[str, Any], str]] = {
    "option misspelt": ({"_target_": "draftopd.losses.distilled.Distilled", "gama": 1.0}, "did you mean 'gamma'"),
    "value of another type": (
        {"_target_": "draftopd.losses.distilled.Distilled", "gamma": "x"}, "part.gamma='x' does not fit float",
    ),
    "class misspelt": ({"_target_": "draftopd.losses.distilled.Distiled"}, "cannot be imported: check"),
    "module unknown": ({"_target_": "nowhere.Thing"}, "cannot be imported"),
    "_target_ a number": ({"_target_": 5}, "cannot be imported"),
    "_target_ a list": ({"_target_": ["os.system"]}, "cannot be imported"),
    "_target_ empty": ({"_target_": ""}, "cannot be imported"),
    "_target_ no part": ({"_target_": "draftopd.errors"}, "cannot be imported"),
    "value missing": ({"_target_": "draftopd.targets.load.load_target", "path": "???"}, "part.path must be given"),
    "choice unknown": (
        {"_target_": "draftopd.losses.distilled.Distilled", "normalization": "both"}, "normalization=both does",
    ),
    "truth value a text": (
        {"_target_": "draftopd.losses.distilled.Distilled", "gamma": True}, "gamma=True does not fit",
    ),
    "divergence missing": (
        {"_target_": "draftopd.losses.distilled.Distilled", "accepted": "???"}, "part.accepted must be given",
    ),
    "option of a divergence out of range": (
        {
            "_target_": "draftopd.losses.distilled.Distilled",
            "accepted": {"_target_": "draftopd.losses.divergence.jensen_shannon", "_partial_": True, "beta": 1.0},
        },
        "part.accepted.beta=1.0 does not fit float",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("node", "message"), NODES.values(), ids=NODES)
def test_wrong_nodes_are_refused(node: dict[str, Any], message: str, tmp_path: Path) -> None:
    refused(lambda: check({"part": node}), ConfigError, message, tmp_path)


VALUES = {
    "data.batch_size=0": "greater than 0",
    "data.batch_size=-3": "greater than 0",
    "data.batch_size=1.5": "data.batch_size=1.5 does not fit int",
    "data.batch_size=x": "data.batch_size='x' does not fit int",
    "data.batch_size=null": "data.batch_size=None does not fit int",
    "data.prompts_per_refresh=0": "greater than 0",
    "data.validation_count=0": "greater than 0",
    "data.validation_batch_size=0": "greater than 0",
    "data.batches_per_epoch=0": "greater than 0",
    "data.anchors_per_sequence=-1": "greater than 0",
    "data.max_prompt_tokens=0": "greater than 0",
    "data.anchors=visted": "did you mean 'visited'",
    "data.thinking=maybe": "data.thinking='maybe' does not fit bool",
    "max_new_tokens=0": "max_new_tokens=0 does not fit int: .*greater than 0",
    "refresh.max_new_tokens=0": "refresh.max_new_tokens=0 does not fit int: .*greater than 0",
    "temperature=-1": "temperature must be 0 .greedy. or more, found -1",
    "top_k=-1": "top_k must be",
    "top_p=0": "top_p must",
    "max_new_tokens=-5": "greater than 0",
    "rollout.batch_size=0": "rollout.batch_size=0 does not fit int",
    "temperature=hot": "temperature='hot' does not fit float",
    "verification=none": "verification=none does not exist",
    "drafter.num_layers=0": "drafter.num_layers=0 does not fit int",
    "drafter.num_heads=-2": "drafter.num_heads=-2 does not fit",
    "drafter.target_layer_ids=[a]": "drafter.target_layer_ids",
    "optimizer.lr=0": "optimizer.lr=0 does not fit",
    "optimizer.lr=-1": "greater than 0",
    "optimizer.lr=nan": "optimizer.lr=nan does not fit",
    "optimizer.lr=inf": "optimizer.lr=inf does not fit",
    "optimizer.lr=fast": "optimizer.lr='fast' does not fit",
    "optimizer.betas=[0.9]": "optimizer.betas",
    "optimizer.betas=[0.9,2]": "optimizer.betas",
    "schedule.warmup=1.5": "less than or equal to 1",
    "schedule.final=-0.5": "greater than or equal to 0",
    "optimizer.weight_decay=-1": "greater than or equal to 0",
    "+optimizer.learning_rate=1": "choose from betas, lr",
    "+module.count_flop=1": "did you mean 'count_flops'",
    "seed=-1": "seed=-1 does not fit",
    "seed=x": "seed='x' does not fit",
    "seed=99999999999": "seed=99999999999 does not fit",
    "trainer.max_epochs=abc": "trainer.max_epochs='abc' does not fit",
    "+trainer.max_epoch=3": "did you mean 'max_epochs'",
}


@pytest.mark.parametrize(("override", "message"), VALUES.items(), ids=VALUES)
def test_values(override: str, message: str, tmp_path: Path) -> None:
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        config = compose("train", [override])

    def all_checks() -> None:
        for group in ("data", "rollout", "drafter", "trainer", "loss", "optimizer", "schedule"):
            check(OmegaConf.to_container(config[group], resolve=True), group)
        check_values(config)

    refused(all_checks, ConfigError, message, tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"url": "http://me:hunter2@host"}, "trajectories.url holds a user or password"),
        ({"api_key_env": "hunter2"}, "variable that it names .trajectories.api_key_env. is not set: give the var"),
        ({"api_key_env": "NO_SUCH_KEY"}, "variable NO_SUCH_KEY"),
        ({"concurrency": 0}, "must be 1 or more"),
        ({"attempts": -1}, "must be 1 or more"),
        ({"timeout": 0.0}, "timeout above 0"),
        ({"timeout": float("nan")}, "timeout above 0"),
    ],
)
def test_addresses(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    def make() -> Address:
        try:
            return Address(**{"url": "http://host", "group": "trajectories"} | options)
        except ConfigError as error:
            assert "hunter2" not in str(error)
            raise

    refused(make, ConfigError, message, tmp_path)


@pytest.mark.parametrize(
    ("texts", "size", "message"),
    [
        ([[1]], 0, "must lie between 1 and the target's 64, found 0"),
        ([[1]], -3, "found -3"),
        ([[1]], 65, "found 65"),
        ([], 8, "there are none: leave drafter.draft_vocab_size=null"),
        ([[]], 8, "there are none"),
        ([[64]], 8, "ids from 64 to 64.*vocabulary"),
        ([[-1, 3]], 8, "ids from -1 to 3.*vocabulary"),
    ],
)
def test_draft_vocabularies(texts: list[list[int]], size: int, message: str, tmp_path: Path) -> None:
    refused(lambda: frequent_tokens(texts, size, 64), DrafterError, message, tmp_path)
