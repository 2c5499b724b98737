"""``focus-ray cluster``: files of clusters, checked; Ray's own launcher, shown and run."""

from __future__ import annotations

import os
import shlex
import subprocess
import sysconfig
from collections.abc import Iterable
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from focus_ray.cli.engine_flags import errors_in_words

cluster = typer.Typer(
    help="Check files of clusters, start and stop what they describe.",
    no_args_is_help=True,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

LauncherFile = Annotated[Path, typer.Argument(help="A file of Ray's cluster launcher.")]
ServeFile = Annotated[
    Path | None, typer.Option("--serve", help="A configuration of Ray Serve to deploy on it.")
]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]


@cluster.command("list")
def list_files() -> None:
    """The files that come with the package, and what each is for."""
    for path, file in shipped_files().items():
        first = file.read_text().splitlines()[0].removeprefix("#").strip()
        typer.echo(f"{path:32}  {first}")


@cluster.command("show")
def show_file(name: Annotated[str, typer.Argument(help="As list names it.")]) -> None:
    """Print a file that comes with the package: focus-ray cluster show NAME > my.yaml."""
    with errors_in_words():
        found = shipped_files()
        if name not in found:
            raise ValueError(f"no file {name!r}; there are {', '.join(found)}")
        typer.echo(found[name].read_text(), nl=False)


@cluster.command("check")
def check(
    paths: Annotated[
        list[Path],
        typer.Argument(
            metavar="FILE...",
            help="Launcher files, configurations of Ray Serve, manifests of KubeRay, files of "
            "focus-ray serve; several are one cluster.",
        ),
    ],
    gpu: Annotated[
        str | None, typer.Option(help="Kind of GPU, where no file says it: L4, H100, ...")
    ] = None,
) -> None:
    """Check files, and whether their models fit on their GPUs. Needs no GPU and no network.

    Exits with 1 if something does not fit, is wrong, or is not set yet.
    """
    with errors_in_words():
        if not fits(paths, gpu):
            raise typer.Exit(1)


@cluster.command("up")
def up(file: LauncherFile, serve: ServeFile = None, yes: Yes = False) -> None:
    """Check the files, start the cluster with ray up, and deploy a configuration of Ray Serve."""
    with errors_in_words():
        if not fits([file] if serve is None else [file, serve], None):
            raise typer.Exit(1)
        from focus_ray.cluster.launcher_commands import up_commands

        served = None if serve is None else str(serve)
        run(up_commands(launcher_config(file), str(file), served, yes=yes))


@cluster.command("status")
def status(file: LauncherFile) -> None:
    """What the cluster has and what runs on it: ray status and serve status on its head."""
    with errors_in_words():
        from focus_ray.cluster.launcher_commands import status_commands

        run(status_commands(str(file)))


@cluster.command("down")
def down(file: LauncherFile, yes: Yes = False) -> None:
    """Stop the cluster with ray down, on all machines."""
    with errors_in_words():
        from focus_ray.cluster.launcher_commands import down_commands

        config = launcher_config(file)
        if not yes:
            typer.confirm(f"Stop the cluster {config['cluster_name']}?", abort=True)
        run(down_commands(config, str(file)))


def fits(paths: list[Path], gpu: str | None) -> bool:
    """Print what the files ask for and what is wrong with it; whether nothing is.

    Raises:
        ValueError: a file is wrong in itself, or there is no such GPU.
    """
    from focus_ray.cli.cluster_check import examine, show
    from focus_ray.cli.cluster_files import read_files
    from focus_ray.cluster.accelerators import GPUS, find_gpu

    kind = find_gpu(gpu) if gpu else None
    if gpu and kind is None:
        raise ValueError(f"--gpu {gpu}: not known; use one of {', '.join(GPUS)}")
    report = examine(read_files(paths), kind)
    show(report, Console(highlight=False))
    return not report.findings.errors


def launcher_config(file: Path) -> dict[str, Any]:
    """What a launcher file holds.

    Raises:
        ValueError: it is none, or Ray would refuse it.
    """
    from focus_ray.cluster.launcher import launcher_groups
    from focus_ray.cluster.strict_yaml import load_documents

    documents = load_documents(file)
    if len(documents) != 1 or not isinstance(documents[0], dict):
        raise ValueError(f"{file} is no launcher file: it must hold one mapping")
    config: dict[str, Any] = documents[0]
    try:
        launcher_groups(config)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    return config


def run(commands: Iterable[list[str]]) -> None:
    """Show each command and run it; the failure of one is this command's."""
    # Ray's commands of this environment, also where it is not activated.
    path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")])
    for words in commands:
        typer.secho(f"$ {shlex.join(words)}", fg="cyan")
        done = subprocess.run(words, env={**os.environ, "PATH": path})
        if done.returncode:
            raise typer.Exit(done.returncode)


def shipped_files() -> dict[str, Traversable]:
    """All of them, by their path."""
    root = files("focus_ray.cluster") / "configs"
    return dict(sorted(_walk(root, "")))


def _walk(folder: Traversable, prefix: str) -> list[tuple[str, Traversable]]:
    found: list[tuple[str, Traversable]] = []
    for entry in folder.iterdir():
        path = f"{prefix}{entry.name}"
        found += _walk(entry, f"{path}/") if entry.is_dir() else [(path, entry)]
    return found
