"""``focus-ray doctor``: what this machine has, what will be used, what is missing."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from focus_ray.cli.machine import Finding, examine
from focus_ray.config import DEFAULT_MODEL

MARKS = {"ok": "[green]ok[/]", "note": "[yellow]note[/]", "missing": "[bold red]missing[/]"}


def doctor(
    model: Annotated[str, typer.Option(help="Model to look for.")] = DEFAULT_MODEL,
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to look at.")] = 8000,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say what this machine has, what will be used and what is missing.

    Exits with 1 if something is missing without which nothing can be served.
    """
    findings = examine(model, port)
    ready = all(finding.status != "missing" for finding in findings)
    if as_json:
        facts = [asdict(finding) for finding in findings]
        typer.echo(json.dumps({"ready": ready, "findings": facts}, indent=2))
    else:
        show(findings, ready)
    raise typer.Exit(0 if ready else 1)


def show(findings: list[Finding], ready: bool) -> None:
    """The findings as a table, remedies below what they are for."""
    console = Console(highlight=False)
    table = Table(box=None, show_header=False, pad_edge=False)
    for finding in findings:
        value = finding.value if finding.remedy is None else f"{finding.value}\n{finding.remedy}"
        table.add_row(MARKS[finding.status], finding.name, value)
    console.print(table)
    console.print(
        "\n[green]ready:[/] focus-ray serve" if ready else "\n[bold red]not ready[/]", style="bold"
    )
