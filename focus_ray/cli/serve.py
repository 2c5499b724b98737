"""``focus-ray serve``: Ray, Ray Serve and the engine on this machine, until told to stop."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Self

import typer
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from focus_ray.cli.engine_flags import engine_flags, errors_in_words, located
from focus_ray.cli.options import flag_of
from focus_ray.cli.signals import until_stopped
from focus_ray.config import DEFAULT_MODEL, EngineConfig

if TYPE_CHECKING:
    from focus_ray.serve.args import ServeArgs
    from focus_ray.serve.local import LocalServer
    from focus_ray.serve.model_args import ModelArgs

WATCH_PERIOD_S = 3.0


@engine_flags
def serve(
    engine: EngineConfig,
    model: Annotated[
        str | None,
        typer.Argument(
            help="Bundled name, local directory in Hugging Face layout, or hub id.",
            show_default=DEFAULT_MODEL,
        ),
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 8000,
    served_model_name: Annotated[
        list[str] | None, typer.Option(help="Name in the API; may be repeated.")
    ] = None,
    num_replicas: Annotated[
        int | None,
        typer.Option(min=1, help="Engines, each with the whole model.", show_default="1"),
    ] = None,
    router: Annotated[
        str | None,
        typer.Option(
            help="How a request finds its engine: occupancy or power_of_two.",
            show_default="power_of_two",
        ),
    ] = None,
    batch_storage: Annotated[
        str | None,
        typer.Option(
            help="Folder or URL for files and batches of the Batch API.",
            show_default="~/.local/share/focus-ray/batches/PORT",
        ),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(help="YAML file that says what is served: several models, autoscaling."),
    ] = None,
    api_key: Annotated[
        list[str] | None,
        typer.Option(
            help="Ask clients for this bearer token; may be repeated. Also FOCUS_RAY_API_KEY, or "
            "SHA-256 hashes in FOCUS_RAY_API_KEY_HASHES, in the environment."
        ),
    ] = None,
    ray_dashboard: Annotated[
        bool, typer.Option("--ray-dashboard", help="Start Ray's dashboard too.")
    ] = False,
    ray_temp_dir: Annotated[
        Path | None,
        typer.Option(help="Keep Ray's logs here; default: a folder that is deleted at the end."),
    ] = None,
) -> None:
    """Serve models over HTTP, in the shape of the OpenAI API."""
    console = Console(highlight=False)
    stages = Stages(console)
    with errors_in_words(), until_stopped(), stages:
        from focus_ray.serve.local import LocalServer

        stages.tell("looking for the model")
        fields = {
            "served_model_name": served_model_name,
            "num_replicas": num_replicas,
            "router": router,
            "batch_storage": batch_storage,
        }
        given = {name: value for name, value in fields.items() if value}
        if config is None:
            args = one_model(engine, model, given, api_key or [])
        else:
            refuse_beside_config(engine, model, given)
            args = from_file(config, api_key or [])
        with LocalServer(
            args, host, port, dashboard=ray_dashboard, temp_dir=ray_temp_dir, tell=stages.tell
        ) as server:
            stages.stop()
            names = ", ".join(each.names[0] for each in args.served)
            console.print(
                f"[bold green]serving[/] {names} at {server.url} "
                f"after {stages.elapsed_s:.0f} s; Ctrl-C stops\n"
                f"docs {server.url}/docs, metrics {server.url}/metrics\n\ntry:",
                soft_wrap=True,
            )
            console.print(example(server, args), markup=False, soft_wrap=True)
            watch(console, server)
    console.print("stopped")


def one_model(
    engine: EngineConfig, model: str | None, given: dict[str, Any], api_keys: list[str]
) -> ServeArgs:
    """What flags describe: those of the engine and ``given`` ones, fields of ``ServeArgs``."""
    from focus_ray.serve.args import ServeArgs

    config = located(engine, model)
    return ServeArgs.model_validate(
        {
            "engine": config,
            "served_model_name": [model or config.model],
            "api_keys": api_keys,
            "max_start_attempts": 1,
            **given,
        }
    )


def from_file(path: Path, api_keys: list[str]) -> ServeArgs:
    """What a file describes, with models found as ``located`` finds them.

    Raises:
        ValueError: the file is not as it should be.
    """
    from focus_ray.serve.args import ServeArgs
    from focus_ray.serve.config_file import load_args

    args = load_args(path)

    def found(model: ModelArgs) -> dict[str, object]:
        attempts = model.max_start_attempts if "max_start_attempts" in model.model_fields_set else 1
        return {
            "engine": located(model.engine, None),
            "served_model_name": model.names,
            "max_start_attempts": attempts,
        }

    if args.models:
        models = [each.model_copy(update=found(each)) for each in args.models]
        args = args.model_copy(update={"models": tuple(models)})
    else:
        args = args.model_copy(update=found(args))
    keys = ServeArgs.model_validate({"api_keys": api_keys}).api_keys
    return args.model_copy(update={"api_keys": (*args.api_keys, *keys)})


def refuse_beside_config(engine: EngineConfig, model: str | None, given: dict[str, Any]) -> None:
    """Refuse what a file would silently overrule."""
    flags = ["MODEL"] if model else []
    flags += map(flag_of, [*given, *sorted(engine.model_fields_set)])
    if flags:
        raise ValueError(
            f"{', '.join(flags)} does not go with --config, which says what is served; put it into "
            "the file"
        )


class Stages:
    """Shows what is being waited for: a spinner in a terminal, a line per stage elsewhere."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._started = time.monotonic()
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            TimeElapsedColumn(),
            console=console,
            transient=True,
        )
        self._task = self._progress.add_task("starting", total=None)

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def tell(self, stage: str) -> None:
        self._progress.update(self._task, description=stage)
        if not self._progress.live.is_started:
            self._console.print(f"[{self.elapsed_s:5.1f} s] {stage}", markup=False)

    def stop(self) -> None:
        if self._progress.live.is_started:
            self._progress.stop()

    @property
    def elapsed_s(self) -> float:
        return time.monotonic() - self._started


def example(server: LocalServer, args: ServeArgs) -> str:
    """A command that works against this server as it stands."""
    info = server.describe()
    path, body = "completions", '{"prompt": [1, 2, 3], "return_token_ids": true}'
    if info.has_chat_template:
        path = "chat/completions"
        body = '{"messages": [{"role": "user", "content": "What is 17 + 25?"}]}'
    elif info.has_tokenizer:
        body = '{"prompt": "17 + 25 =", "max_tokens": 32}'
    if args.models:
        body = f'{{"model": {json.dumps(args.served[0].names[0])}, {body[1:]}'
    with_key = bool(args.settings(os.environ).api_key_hashes)
    key = ' -H "Authorization: Bearer $FOCUS_RAY_API_KEY"' if with_key else ""
    json_type = "-H 'Content-Type: application/json'"
    return f"  curl {server.url}/v1/{path} {json_type}{key} -d '{body}'"


def watch(console: Console, server: LocalServer) -> None:
    """Report when the engine stops serving and when it serves again; a signal ends it."""
    last: str | None = None
    while True:
        time.sleep(WATCH_PERIOD_S)
        trouble = server.trouble()
        if trouble and trouble != last:
            console.print("[red]not serving:[/]", end=" ")
            console.print(trouble, markup=False, soft_wrap=True)
        elif last and not trouble:
            console.print("[green]serving again[/]")
        last = trouble
