"""Conversations of public data sets, from a file or the hub, as the FOCUS protocol takes them.

Of a conversation, the prompt is its system turns and the first user turn that is followed by an
assistant turn (arXiv 2601.23278); the reference answer itself is not used.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

ROLE_OF_SPEAKER = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bard": "assistant"}
CONVERSATION_FIELDS = ("messages", "conversations", "conversation")
PROMPT_FIELDS = ("prompt", "question", "problem")

Conversation = list[dict[str, str]]


def read_file(path: Path) -> list[Conversation]:
    """A JSON list or JSON lines; ShareGPT's layout, ``{"messages"}`` or ``{"prompt"}``.

    Raises:
        ValueError: the file is neither, or a row is of another kind; names the row.
        OSError: the file cannot be read.
    """
    try:
        text = path.read_text(encoding="utf-8")
        rows = json.loads(text) if text.lstrip().startswith("[") else _json_lines(text)
    except ValueError as error:
        raise ValueError(f"{path} is neither a JSON list nor JSON lines: {error}") from None
    return _prompts_of(rows, str(path))


def read_hub(name: str, subset: str | None, split: str) -> list[Conversation]:
    """A data set of the Hugging Face hub; needs a network and the ``datasets`` library.

    Raises:
        ValueError: the library is missing, or a row is of an unknown kind.
    """
    try:
        from datasets import load_dataset  # type: ignore[import-not-found, unused-ignore]
    except ImportError:
        raise ValueError(
            f"the hub's {name} is read with the library datasets: pip install datasets, or "
            "download a JSON file of it and name that with --dataset-path"
        ) from None
    return _prompts_of(load_dataset(name, subset, split=split), name)


def _json_lines(text: str) -> list[Any]:
    """The value of each line that is not blank; only a newline ends one, as JSON may hold others.

    Raises:
        ValueError: names the line, counted from 1.
    """
    values = []
    for number, line in enumerate(text.split("\n"), 1):
        try:
            values += [json.loads(line)] if line.strip() else []
        except json.JSONDecodeError as error:
            raise ValueError(f"line {number}, column {error.colno}: {error.msg}") from None
    return values


def _prompts_of(rows: Iterable[Any], source: str) -> list[Conversation]:
    found = []
    for index, row in enumerate(rows):
        try:
            prompt = prompt_of(row)
        except ValueError as error:
            raise ValueError(f"{source}, row {index}: {error}") from None
        if prompt is not None:
            found.append(prompt)
    if not found:
        raise ValueError(
            f"{source} holds no prompt, and no user turn that is followed by an answer"
        )
    return found


def prompt_of(row: object) -> Conversation | None:
    """The messages to answer; None where a conversation has no answered user turn.

    Raises:
        ValueError: the row has none of the known fields.
    """
    if not isinstance(row, Mapping):
        raise ValueError(f"expected an object, got {type(row).__name__}")
    for name in CONVERSATION_FIELDS:
        if isinstance(turns := row.get(name), list):
            # Of messages without any answer, the last turn is the question.
            has_answer = any(role == "assistant" for role, _ in _turns(turns))
            return _answered(turns) if has_answer else _as_messages(turns)
    for name in PROMPT_FIELDS:
        if isinstance(text := row.get(name), str):
            return [{"role": "user", "content": text}] if text.strip() else None
    known = ", ".join((*CONVERSATION_FIELDS, *PROMPT_FIELDS))
    raise ValueError(f"none of the fields {known} in {sorted(map(str, row))}")


def _answered(turns: list[Any]) -> Conversation | None:
    spoken = list(_turns(turns))
    system = [{"role": role, "content": text} for role, text in spoken if role == "system"]
    for (role, text), (next_role, _) in pairwise(spoken):
        if role == "user" and next_role == "assistant" and text.strip():
            return [*system, {"role": "user", "content": text}]
    return None


def _as_messages(turns: list[Any]) -> Conversation | None:
    messages = [{"role": role, "content": text} for role, text in _turns(turns)]
    return messages if messages and messages[-1]["role"] == "user" else None


def _turns(turns: list[Any]) -> Iterator[tuple[str, str]]:
    """Role and text of each turn, in whichever of the two spellings."""
    for turn in turns:
        if not isinstance(turn, Mapping):
            raise ValueError(f"a turn is a {type(turn).__name__}, not an object")
        role, text = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
        if not isinstance(role, str) or not isinstance(text, str):
            raise ValueError("a turn has neither role and content nor from and value")
        yield ROLE_OF_SPEAKER.get(role, role), text
