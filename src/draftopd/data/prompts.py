"""Prompts: where they come from and how they become token ids."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from transformers import PreTrainedTokenizerBase

from draftopd.bundled.problems import Split, problem
from draftopd.data.order import RoundOrder
from draftopd.errors import PromptError
from draftopd.io.datasets import load_dataset
from draftopd.io.json_text import MAX_LINE, is_text, listed, parse_json, shown

#: One conversation in the chat template's form.
Messages = list[dict[str, str]]


@runtime_checkable
class PromptSource(Protocol):
    """Conversations by index; sources without an end serve any index, others start over."""

    def messages(self, index: int) -> Messages: ...


class ReasoningPrompts:
    """The bundled reasoning problems.

    Args:
        count: only the first so many, in an order shuffled anew each round; None never repeats one.
    """

    def __init__(self, split: Split = "train", seed: int = 0, count: int | None = None) -> None:
        self.split: Split = split
        self.seed = seed
        if count is not None and count < 1:
            raise PromptError(f"The count of reasoning prompts must be 1 or more, or null, found {count}.")
        self.order = None if count is None else RoundOrder(count, "reasoning", seed)

    def messages(self, index: int) -> Messages:
        place = index if self.order is None else self.order[index]
        return [{"role": "user", "content": problem(self.split, place, self.seed).question}]


class ListedPrompts:
    """A finite list of conversations, served in an order shuffled anew each round.

    Raises:
        PromptError: if the list is empty.
    """

    def __init__(self, conversations: Sequence[Messages], seed: int = 0, name: str = "the prompt list") -> None:
        if not conversations:
            raise PromptError(f"{name} holds no prompts: give at least one.")
        self.conversations = conversations
        self.order = RoundOrder(len(conversations), "prompts", seed)

    def __len__(self) -> int:
        return len(self.conversations)

    def messages(self, index: int) -> Messages:
        return self.conversations[self.order[index]]


class JsonlPrompts(ListedPrompts):
    """Prompts of a JSON-lines file, one object a line with ``messages`` (chat form) or a text field.

    Args:
        path: the file, UTF-8.
        field: the text field, taken as the user's turn where there are no ``messages``.
        limit: read at most this many.

    Raises:
        PromptError: naming file, line and what is wrong with it.
    """

    def __init__(self, path: str, field: str = "prompt", limit: int | None = None, seed: int = 0) -> None:
        super().__init__(read_jsonl(Path(path), field, limit), seed, name=path)


class HubPrompts(ListedPrompts):
    """A mixture of hub datasets; needs ``pip install datasets``.

    Args:
        sources: each ``{path, name, split, field, count, where}``: of the rows whose fields equal those in
            ``where`` (optional), ``count`` are drawn by the seed, and ``field`` is the user's turn.

    Raises:
        PromptError: if ``datasets`` is not installed, a dataset cannot be had, or a field is missing.
    """

    def __init__(self, sources: Sequence[dict[str, Any]], seed: int = 0) -> None:
        conversations = [m for source in sources for m in _from_hub(source, seed)]
        super().__init__(conversations, seed, name="the dataset mixture")


def read_jsonl(path: Path, field: str, limit: int | None = None, group: str = "data.train_prompts") -> list[Messages]:
    """See :class:`JsonlPrompts`; ``group`` is the configuration group that errors point to."""
    return [_messages(row, field, where, group) for where, row in islice(read_rows(path, group), limit)]


def read_rows(path: Path, group: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects of a JSON-lines file, each with where it stands; ``group`` is the configuration group of the path.

    Raises:
        PromptError: naming file, line and what is wrong with it.
    """
    for number, line in enumerate(_lines(path, group), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        if len(line) > MAX_LINE:
            raise PromptError(f"{where} is longer than {MAX_LINE} bytes: write one object a line, one prompt each.")
        try:
            row = parse_json(line)
        except UnicodeDecodeError as error:
            raise PromptError(f"{where} is no UTF-8 text ({error.reason}): save the file as UTF-8.") from error
        except ValueError as error:
            raise PromptError(
                f"{where} is not JSON ({getattr(error, 'msg', error)}): write one object a line."
            ) from error
        if not isinstance(row, dict):
            raise PromptError(f"{where} holds a {type(row).__name__}, expected an object: write one object a line.")
        yield where, row


def _lines(path: Path, group: str) -> Iterator[bytes]:
    """The file's lines, none of them read further than a line may be long."""
    try:
        with path.open("rb") as file:
            while line := file.readline(MAX_LINE + 1):
                yield line
    except FileNotFoundError as error:
        raise PromptError(f"No prompt file {path}: name a JSON-lines file ({group}.path=FILE).") from error
    except (OSError, ValueError) as error:
        raise PromptError(
            f"The prompt file {shown(str(path))} cannot be read ({error}): name a JSON-lines file ({group}.path=FILE)."
        ) from error


def _messages(row: dict[str, Any], field: str, where: str, group: str) -> Messages:
    if "messages" in row:
        messages = row["messages"]
        good = (
            isinstance(messages, list)
            and messages
            and all(isinstance(m, dict) and is_text(m.get("role")) and is_text(m.get("content")) for m in messages)
        )
        if not good:
            raise PromptError(f"{where}: 'messages' must be a list of objects with text 'role' and 'content'.")
        return [{"role": m["role"], "content": m["content"]} for m in messages]
    text = row.get(field)
    if not isinstance(text, str) or not text.strip() or not is_text(text):
        raise PromptError(f"{where} has no text under {field!r} (found {listed(row)}): set {group}.field.")
    return [{"role": "user", "content": text}]


def _from_hub(source: dict[str, Any], seed: int) -> list[Messages]:
    path, field = source["path"], source["field"]
    instead = "Use data=jsonl data.train_prompts.path=FILE for a local copy."
    rows = load_dataset(path, source.get("name"), source.get("split", "train"), instead=instead)
    if field not in rows.column_names:
        raise PromptError(f"The dataset {path} has no field {field!r}, only {', '.join(rows.column_names)}.")
    wanted = source.get("where") or {}
    if wanted:
        rows = rows.filter(lambda row: all(row[key] == value for key, value in wanted.items()))
    rows = rows.shuffle(seed=seed)
    count = min(int(source.get("count", len(rows))), len(rows))
    return [[{"role": "user", "content": str(row[field])}] for row in rows.select(range(count))]


class PromptEncoder:
    """Conversations to token ids through the tokenizer's chat template.

    Args:
        thinking: the template's ``enable_thinking``.
        max_tokens: longest prompt kept.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, thinking: bool = True, max_tokens: int = 512) -> None:
        if tokenizer.chat_template is None:
            raise PromptError(
                f"The tokenizer of {tokenizer.name_or_path} has no chat template: use an instruction-tuned target."
            )
        self.tokenizer, self.thinking, self.max_tokens = tokenizer, thinking, max_tokens

    def encode(self, messages: Messages) -> list[int]:
        """Token ids up to and including the assistant's opening.

        Raises:
            PromptError: if the template refuses the conversation.
        """
        try:
            encoded = self.tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, enable_thinking=self.thinking, return_dict=True
            )
        except Exception as error:  # the template is the target's own program
            raise PromptError(
                f"The chat template of {self.tokenizer.name_or_path} fails ({shown(str(error))}) on a conversation "
                f"that begins {shown(messages[0]['content'], 60)!r}: mend the roles of its messages, or the template."
            ) from error
        return list(encoded["input_ids"])

    def take(self, source: PromptSource, places: range) -> list[list[int]]:
        """The prompts at these places, those longer than ``max_tokens`` left out.

        Raises:
            PromptError: if none is short enough.
        """
        prompts = [self.encode(source.messages(index)) for index in places]
        kept = [p for p in prompts if len(p) <= self.max_tokens]
        if not kept:
            raise PromptError(
                f"All {len(prompts)} prompts are longer than data.max_prompt_tokens={self.max_tokens} "
                f"(the shortest has {min(map(len, prompts))}): raise it or use other prompts."
            )
        return kept
