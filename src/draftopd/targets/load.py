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
        attn_implementation: transformers' name of it; None takes SDPA, or eager for models without it (gpt-oss).

    Raises:
        TargetError: if it cannot be had, with what to do instead.
    """
    path = resolve(path)
    options = {
        "revision": revision,
        "trust_remote_code": trust_remote_code,
        "local_files_only": local_only(path),
    }
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
    except Exception as error:  # whatever transformers stumbles over in files from elsewhere
        raise TargetError(unavailable(path, error)) from error
    if report["missing_keys"]:
        # transformers only warns, and goes on with random weights.
        raise TargetError(
            f"The target {path} lacks the tensors {sorted(report['missing_keys'])[:4]}: copy or download it again."
        )
    target = Target(model)
    try:
        return target.to(device) if device else target
    except (RuntimeError, AssertionError) as error:
        raise TargetError(f"target.device={device} cannot be used: {str(error).splitlines()[0]}") from error


def load_tokenizer(path: str, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer beside a target.

    Raises:
        TargetError: if it cannot be had.
    """
    path = resolve(path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            path, trust_remote_code=trust_remote_code, local_files_only=local_only(path)
        )
    except Exception as error:  # the tokenizers library knows no other
        raise TargetError(unavailable(path, error)) from error
    if tokenizer.vocab_size < 2:  # transformers makes one of nothing
        raise TargetError(f"The target {path} has no tokenizer.json, or an empty one: copy or download it again.")
    return tokenizer


def stop_tokens(target: Target, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """The token ids that end a response: the generation config's, and the tokenizer's own.

    Raises:
        TargetError: if the generation config names something else.
    """
    found = getattr(target.model.generation_config, "eos_token_id", None)
    named = found if isinstance(found, list) else [] if found is None else [found]
    if not all(type(i) is int for i in named):
        raise TargetError(f"The target's generation_config.json names eos_token_id {named}: write token ids there.")
    ids = set(named)
    if tokenizer.eos_token_id is not None:
        ids.add(int(tokenizer.eos_token_id))
    return frozenset(ids)


def _parameters(config: PreTrainedConfig, trust_remote_code: bool) -> int:
    """How many numbers a config's model has; it is made without memory. 0 where it cannot be made so.

    A model that reads its own weights while it is made cannot; the loader has ways around that, and says what is wrong
    with any other.
    """
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                deepcopy(config), attn_implementation="eager", trust_remote_code=trust_remote_code
            )
    except Exception:
        return 0
    return sum(parameter.numel() for parameter in model.parameters())
