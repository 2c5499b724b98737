"""``focus-ray batch``: files of requests in, files of results out."""

from __future__ import annotations

import contextlib
import logging
import os
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Self

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from focus_ray.cli.engine_flags import (
    CommandSampling,
    errors_in_words,
    light_engine_flags,
    located,
    sampling_flags,
)
from focus_ray.cli.signals import until_stopped
from focus_ray.config import EngineConfig

if TYPE_CHECKING:
    from focus_ray.batch.job import Progress as JobProgress

OBJECT_STORE_BYTES = 1 << 30
LINE_EVERY_S = 5.0
INTERRUPTED = 130

batch = typer.Typer(
    help="Run files of requests as a job, each line once, however often it is interrupted.",
    no_args_is_help=True,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@batch.callback()
def _group() -> None:
    """Keeps ``run`` a name of its own."""


@batch.command()
@light_engine_flags
@sampling_flags
def run(
    engine: EngineConfig,
    sampling: CommandSampling,
    input: Annotated[
        list[str],
        typer.Option(help="JSON lines or Parquet: path, folder, pattern or URL; may be repeated."),
    ],
    output: Annotated[str, typer.Option(help="Folder or URL; one that a job left is continued.")],
    model: Annotated[
        str | None,
        typer.Option(help="Bundled name, local directory in Hugging Face layout, or hub id."),
    ] = None,
    served_model_name: Annotated[
        list[str] | None,
        typer.Option(help="Name by which lines may call the model; may be repeated."),
    ] = None,
    output_format: Annotated[
        str, typer.Option(help="jsonl or parquet, of results; errors are always jsonl.")
    ] = "jsonl",
    num_replicas: Annotated[
        str, typer.Option(help="Engines, each with the whole model; auto: all GPUs of the cluster.")
    ] = "auto",
    longest_first: Annotated[
        bool, typer.Option("--longest-first", help="Begin with the longest lines: a shorter end.")
    ] = False,
    max_errors: Annotated[
        int | None, typer.Option(min=0, help="Stop when more lines than these have errors.")
    ] = None,
    ray_address: Annotated[
        str | None,
        typer.Option(
            envvar="RAY_ADDRESS",
            help="Cluster to run in, as inside of 'ray job submit'; absent: this machine alone.",
        ),
    ] = None,
) -> None:
    """Answer every line of the input. Sampling flags are for lines that say nothing."""
    console = Console(highlight=False)
    finished = False
    with errors_in_words(), Display(console) as display, until_stopped():
        from focus_ray.batch.job import BatchJob, run_job

        job = BatchJob(
            inputs=tuple(map(_anywhere, input)),
            output=_anywhere(output),
            engine=located(engine, model),
            model=model or engine.model,
            served_names=tuple(served_model_name or ()),
            defaults=sampling.model_dump(mode="json", exclude_unset=True),
            output_format=one_of("--output-format", output_format, ("jsonl", "parquet")),
            num_replicas=count_of(num_replicas),
            longest_first=longest_first,
            max_errors=max_errors,
        )
        display.tell("starting Ray" if ray_address is None else "connecting to Ray")
        with connected(ray_address):
            summary = run_job(job, display.tell, display.show)
        finished = True
    if not finished:
        console.print(f"stopped; the same command continues, {output} holds what is done")
        raise typer.Exit(INTERRUPTED)
    console.print(table_of(summary))
    console.print(f"written to {output}", soft_wrap=True)


@contextlib.contextmanager
def connected(address: str | None) -> Any:
    """Run a block in a cluster, or in a Ray of its own."""
    from focus_ray.cluster.local_ray import StartFailed, away_from_the_checkout, local_ray

    if address is None:
        with local_ray(object_store_bytes=OBJECT_STORE_BYTES, environment={}):
            yield
        return
    import ray

    with tempfile.TemporaryDirectory() as folder, away_from_the_checkout(Path(folder)):
        try:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        except Exception as error:  # whatever keeps Ray away, its words are all there is
            raise StartFailed(f"no Ray at {address}: {error}") from error
    try:
        yield
    finally:
        ray.shutdown()


class Display:
    """How far the job is: a bar in a terminal, a line every few seconds elsewhere."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._started_s = self._told_s = time.monotonic()
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            TextColumn("{task.fields[news]}"),
            TimeElapsedColumn(),
            console=console,
            transient=True,
        )
        self._task = self._bar.add_task("", total=1, visible=False, news="")

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def tell(self, stage: str) -> None:
        elapsed_s = time.monotonic() - self._started_s
        self._console.print(f"[{elapsed_s:5.1f} s] {stage}", markup=False, soft_wrap=True)

    def show(self, progress: JobProgress) -> None:
        news = news_of(progress)
        total, done = progress.num_lines, progress.num_done
        self._bar.update(
            self._task, description="lines", total=total, completed=done, visible=True, news=news
        )
        now_s = time.monotonic()
        if not self._console.is_terminal and now_s - self._told_s >= LINE_EVERY_S:
            self._told_s = now_s
            self.tell(f"{done}/{total} lines, {news}")


def news_of(progress: JobProgress) -> str:
    """Speed of this start, and what that promises."""
    seconds = max(progress.elapsed_s, 1e-9)
    parts = [f"{progress.tokens_here / seconds:.0f} tokens/s"]
    if progress.num_errors:
        parts.append(f"{progress.num_errors} errors")
    if progress.num_done_here:
        left_s = (progress.num_lines - progress.num_done) * seconds / progress.num_done_here
        parts.append(f"{spelled(left_s)} left")
    return ", ".join(parts)


def spelled(seconds: float) -> str:
    """A duration as people say it."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def table_of(summary: dict[str, Any]) -> Table:
    """The summary, a line each."""
    table = Table.grid(padding=(0, 2))
    for name, value in summary.items():
        shown = "-" if value is None else f"{value:.2f}" if isinstance(value, float) else str(value)
        table.add_row(name.replace("_", " "), shown)
    return table


def count_of(text: str) -> int | None:
    """The value of ``--num-replicas``."""
    if text == "auto":
        return None
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise ValueError(f"--num-replicas: must be auto or a number from 1 on, got {text!r}")
    return int(text)


def one_of(flag: str, value: str, choices: tuple[str, ...]) -> str:
    if value not in choices:
        raise ValueError(f"{flag}: must be {' or '.join(choices)}, got {value!r}")
    return value


def _anywhere(path: str) -> str:
    """A local path that means the same in every folder."""
    return path if "://" in path else os.path.abspath(os.path.expanduser(path))
