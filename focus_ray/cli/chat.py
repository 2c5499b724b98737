"""``focus-ray chat``: a conversation in the terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Annotated

import typer
from rich.console import Console

from focus_ray.cli.backends import Backend, Conversation, EngineBackend, HttpBackend, Piece
from focus_ray.cli.engine_flags import (
    CommandSampling,
    errors_in_words,
    light_engine_flags,
    located,
    sampling_flags,
)
from focus_ray.config import DEFAULT_MODEL, EngineConfig
from focus_ray.errors import FocusRayError

HELP = "/clear starts over, /system TEXT sets the system prompt, /exit ends; Ctrl-C stops an answer"

ModelOption = Annotated[
    str | None,
    typer.Option(
        help="Bundled name, local directory, or hub id; with --url, the name in the API.",
        show_default=DEFAULT_MODEL,
    ),
]
UrlOption = Annotated[
    str | None, typer.Option(help="Ask this server instead of loading a model here.")
]
KeyOption = Annotated[
    str | None, typer.Option(envvar="FOCUS_RAY_API_KEY", help="Bearer token of the server.")
]
SystemOption = Annotated[str | None, typer.Option(help="System prompt.")]


@light_engine_flags
@sampling_flags
def chat(
    engine: EngineConfig,
    sampling: CommandSampling,
    model: ModelOption = None,
    url: UrlOption = None,
    api_key: KeyOption = None,
    system: SystemOption = None,
) -> None:
    """Chat with a model, here or on a server."""
    console = Console(highlight=False)
    with (
        errors_in_words(),
        opened(console, engine, model, url, api_key) as backend,
    ):
        console.print(HELP, style="dim")
        talk(console, backend, sampling, system)


def opened(
    console: Console, engine: EngineConfig, model: str | None, url: str | None, api_key: str | None
) -> AbstractContextManager[Backend]:
    """The server at ``url``, or else an engine in this process."""
    if url is not None:
        return nullcontext(HttpBackend(url, model, api_key))
    config = located(engine, model)
    with console.status(f"loading {config.model}"):
        return EngineBackend(config)


def talk(console: Console, backend: Backend, sampling: CommandSampling, system: str | None) -> None:
    """Turns, until the input ends."""
    turns: Conversation = []
    for line in lines(console):
        command, _, rest = line.partition(" ")
        if command in ("/exit", "/quit"):
            return
        if command in ("/clear", "/system"):
            turns.clear()
            system = rest.strip() or None if command == "/system" else system
            console.print("a new conversation", style="dim")
        elif command.startswith("/") and command[1:].isalpha():
            console.print(HELP, style="dim")
        elif line.strip():
            head = [{"role": "system", "content": system}] if system else []
            question = {"role": "user", "content": line}
            with suppress(KeyboardInterrupt):  # stops this answer and forgets the question
                text = show(console, backend.answer([*head, *turns, question], sampling))
                if text is not None:
                    turns += [question, {"role": "assistant", "content": text}]


def lines(console: Console) -> Iterator[str]:
    """What the user types; ends with the input, or with Ctrl-C at the prompt."""
    with suppress(ImportError):
        import readline  # noqa: F401 - gives input() its line editing
    while True:
        try:
            yield input("> " if sys.stdin.isatty() else "")
        except (EOFError, KeyboardInterrupt):
            console.print()
            return


def show(console: Console, pieces: Iterator[Piece]) -> str | None:
    """Print an answer as it comes; None if the request failed."""
    started = time.monotonic()
    text = ""
    try:
        for piece in pieces:
            text += piece.text
            console.print(piece.text, end="", markup=False, soft_wrap=True)
            if piece.usage is not None:
                console.print()
                console.print(spent(piece, time.monotonic() - started), style="dim")
    except FocusRayError as error:
        console.print()
        console.print(str(error), style="red", markup=False, soft_wrap=True)
        return None
    except KeyboardInterrupt:
        console.print(" [stopped]", markup=False, style="dim")
        raise
    return text


def spent(piece: Piece, seconds: float) -> str:
    """One line on what an answer took; ``piece`` is its last."""
    usage = piece.usage or {}
    tokens, steps = usage.get("completion_tokens", 0), usage.get("denoising_steps")
    per_step = f", {tokens / steps:.2f} tokens per step" if steps else ""
    cut = ", cut at max_tokens" if piece.finish_reason == "length" else ""
    return f"{tokens} tokens in {seconds:.1f} s{per_step}{cut}"
