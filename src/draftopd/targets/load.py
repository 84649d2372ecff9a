"""Loading a target and its tokenizer from a directory or the model hub."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from draftopd.errors import TargetError
from draftopd.io.hub import check_index, check_size, check_weights, check_width, local_only, resolve, unavailable
from draftopd.targets.target import Target


def load_target(
    path: str,
    dtype: str = "auto",
    device: str | None = None,
    device_map: str | None = None,
    attn_implementation: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> Target:
    """Load a causal LM from a local directory or the model hub.

    Args:
        attn_implementation: transformers' name of the attention; None selects SDPA, or eager attention for models
            without SDPA (gpt-oss).

    Raises:
        TargetError: if the model cannot be found, loaded or moved to the device.
    """
    path = resolve(path)
    options = {"revision": revision, "trust_remote_code": trust_remote_code, "local_files_only": local_only(path)}
    check_index(path)
    try:
        config = AutoConfig.from_pretrained(path, **options)
        check_weights(path, config)
        check_width(path, config.get_text_config())
        if Path(path).is_dir():
            check_size(path, _parameters(config, trust_remote_code))
        model, report = AutoModelForCausalLM.from_pretrained(
            path, config=config, dtype=dtype, device_map=device_map,
            attn_implementation=attn_implementation, output_loading_info=True, use_safetensors=True, **options,
        )  # fmt: skip
    except TargetError:
        raise
    except Exception as error:  # transformers raises many types of errors on broken files
        raise TargetError(unavailable(path, error)) from error
    if report["missing_keys"]:
        # transformers only warns and uses random weights.
        raise TargetError(
            f"The target {path} lacks the tensors {sorted(report['missing_keys'])[:4]}: copy or download it again."
        )
    target = Target(model)
    try:
        return target.to(device) if device else target
    except (RuntimeError, AssertionError) as error:
        raise TargetError(f"target.device={device} cannot be used: {str(error).splitlines()[0]}") from error


def load_tokenizer(path: str, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a target.

    Raises:
        TargetError: if it cannot be found or loaded.
    """
    path = resolve(path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            path, trust_remote_code=trust_remote_code, local_files_only=local_only(path)
        )
    except Exception as error:  # the tokenizers library raises plain Exception
        raise TargetError(unavailable(path, error)) from error
    if tokenizer.vocab_size < 2:  # transformers creates an empty tokenizer where the files are missing
        raise TargetError(f"The target {path} has no tokenizer.json, or an empty one: copy or download it again.")
    return tokenizer


def stop_tokens(target: Target, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """The token ids that end a response: those of the generation config and the tokenizer's own.

    Raises:
        TargetError: if the generation config names something other than token ids.
    """
    configured = getattr(target.model.generation_config, "eos_token_id", None)
    named = configured if isinstance(configured, list) else [] if configured is None else [configured]
    if not all(type(i) is int for i in named):
        raise TargetError(f"The target's generation_config.json names eos_token_id {named}: write token ids there.")
    return frozenset(named if tokenizer.eos_token_id is None else [*named, int(tokenizer.eos_token_id)])


def _parameters(config: PreTrainedConfig, trust_remote_code: bool) -> int:
    """The number of parameters of a config's model, which is built on the meta device; 0 where that fails.

    It fails for models that read their own weights while they are built. The loader can load these, and reports what is
    wrong with others.
    """
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                deepcopy(config), attn_implementation="eager", trust_remote_code=trust_remote_code
            )
    except Exception:
        return 0
    return sum(parameter.numel() for parameter in model.parameters())
