"""``focus-ray generate``: one prompt, one answer."""

from __future__ import annotations

import json
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from focus_ray.cli.backends import Backend, Conversation, Piece
from focus_ray.cli.chat import KeyOption, ModelOption, SystemOption, UrlOption, opened, spent
from focus_ray.cli.engine_flags import (
    CommandSampling,
    errors_in_words,
    light_engine_flags,
    sampling_flags,
)
from focus_ray.config import EngineConfig

# Raw text has no end of its own that a model would see.
RAW_MAX_TOKENS = 256

PromptArgument = Annotated[
    list[str] | None, typer.Argument(help="The prompt; absent or '-': standard input.")
]
FileOption = Annotated[
    Path | None, typer.Option(exists=True, dir_okay=False, help="Read the prompt from here.")
]
RawOption = Annotated[
    bool, typer.Option("--raw", help="Continue the text as it is, without a chat template.")
]


@light_engine_flags
@sampling_flags
def generate(
    engine: EngineConfig,
    sampling: CommandSampling,
    prompt: PromptArgument = None,
    file: FileOption = None,
    raw: RawOption = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object when the answer is complete.")
    ] = False,
    model: ModelOption = None,
    url: UrlOption = None,
    api_key: KeyOption = None,
    system: SystemOption = None,
) -> None:
    """Answer one prompt and exit."""
    notes = Console(stderr=True, highlight=False)
    with errors_in_words():
        text = read_prompt(prompt, file)
        if raw and system:
            raise ValueError("--system needs a chat template; leave out --raw or --system")
        if raw and sampling.max_tokens is None:
            sampling = sampling.model_copy(update={"max_tokens": RAW_MAX_TOKENS})
        asked = text if raw else conversation(text, system)
        with opened(notes, engine, model, url, api_key) as backend:
            started = time.monotonic()
            last, answer = write_answer(backend, asked, sampling, quiet=as_json)
    if as_json:
        typer.echo(json.dumps(summary(text, answer, last), ensure_ascii=False))
    elif sys.stdout.isatty():
        notes.print(spent(last, time.monotonic() - started), style="dim")


def read_prompt(words: list[str] | None, file: Path | None) -> str:
    """The prompt from the one place that was given."""
    given = [] if words in (None, ["-"]) else words
    if given and file:
        raise ValueError("give the prompt as an argument or with --file, not both")
    if given:
        text = " ".join(given)
    elif file:
        text = file.read_text(encoding="utf-8")
    elif sys.stdin.isatty() and words is None:
        raise ValueError("no prompt: give one as an argument, with --file, or on standard input")
    else:
        text = sys.stdin.read().removesuffix("\n")
    if not text.strip():
        raise ValueError("the prompt is empty")
    return text


def conversation(text: str, system: str | None) -> Conversation:
    head = [{"role": "system", "content": system}] if system else []
    return [*head, {"role": "user", "content": text}]


def write_answer(
    backend: Backend, asked: str | Conversation, sampling: CommandSampling, quiet: bool
) -> tuple[Piece, str]:
    """Write the answer to standard output as it comes; return its last piece and its text."""
    text, last = "", Piece("")
    with closing(backend.answer(asked, sampling)) as pieces:
        for piece in pieces:
            text += piece.text
            last = piece
            if not quiet:
                typer.echo(piece.text, nl=False)
    if not quiet:
        typer.echo()
    return last, text


def summary(prompt: str, answer: str, last: Piece) -> dict[str, Any]:
    """What ``--json`` prints."""
    return {
        "prompt": prompt,
        "text": answer,
        "finish_reason": last.finish_reason,
        "usage": last.usage,
    }
