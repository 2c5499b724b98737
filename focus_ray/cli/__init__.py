"""The ``focus-ray`` command. Each subcommand loads what it needs when it runs, not before."""

from __future__ import annotations

from typing import Annotated

import typer

from focus_ray import __version__
from focus_ray.cli import (
    batch,
    bench,
    chat,
    cluster,
    doctor,
    generate,
    serve,
    status,
    trace,
)

app = typer.Typer(
    help="Serve block-diffusion language models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
    rich_markup_mode=None,  # its tables cut long flags short in 80 columns
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (
    serve.serve,
    status.status,
    chat.chat,
    generate.generate,
    trace.trace,
    doctor.doctor,
):
    app.command()(command)
app.add_typer(batch.batch, name="batch")
app.add_typer(bench.bench, name="bench")
app.add_typer(cluster.cluster, name="cluster")


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Version.")
    ] = False,
) -> None:
    """Serve block-diffusion language models."""
