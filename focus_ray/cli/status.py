"""``focus-ray status``: the replicas of a running server as a table that goes on by itself."""

from __future__ import annotations

import json
import time
from http.client import HTTPException
from typing import Annotated, Any
from urllib.error import HTTPError
from urllib.request import urlopen

import typer
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from focus_ray.cli.backends import ServerError
from focus_ray.cli.engine_flags import errors_in_words
from focus_ray.cli.signals import until_stopped

GIB = 2**30
TIMEOUT_S = 15.0
COLUMNS = ("replica", "occupancy", "running", "waiting", "KV", "step", "tokens/s")
GPU_COLUMNS = ("GPU", "memory", "busy", "power", "temp")
UNKNOWN = "-"


def status(
    url: Annotated[
        str, typer.Argument(help="Where the server is.", show_default=True)
    ] = "http://127.0.0.1:8000",
    once: Annotated[bool, typer.Option("--once", help="Print one table and end.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print what the server says.")] = False,
    period: Annotated[float, typer.Option(min=0.1, help="Seconds between two looks.")] = 1.0,
) -> None:
    """Show the replicas of a running server: what they process, hold and wait for."""
    console = Console(highlight=False)
    with errors_in_words(), until_stopped():
        view = look(url)
        if as_json:
            typer.echo(json.dumps(view, indent=2))
        elif once or not console.is_terminal:
            console.print(drawn(view, {}))
        else:
            watch(console, url, view, period)


def watch(console: Console, url: str, view: dict[str, Any], period_s: float) -> None:
    """Draw the view again and again; a signal ends it."""
    rates = Rates()
    rates.take(view, time.monotonic())
    with Live(drawn(view, {}), console=console, auto_refresh=False) as live:
        while True:
            time.sleep(period_s)
            try:
                view = look(url)
            except ServerError as error:
                live.update(Text(str(error), "red"), refresh=True)
                continue
            live.update(drawn(view, rates.take(view, time.monotonic())), refresh=True)


class Rates:
    """Tokens per second of each replica, between two looks."""

    def __init__(self) -> None:
        self._tokens: dict[str, int] = {}
        self._at_s = 0.0

    def take(self, view: dict[str, Any], now_s: float) -> dict[str, float]:
        """By replica; those that were not there before are left out."""
        tokens = {
            replica["replica"]: replica["generation_tokens"]
            for model in view["models"]
            for replica in model["replicas"]
        }
        elapsed_s = now_s - self._at_s
        rates = {
            name: (count - self._tokens[name]) / elapsed_s
            for name, count in tokens.items()
            if name in self._tokens
        }
        self._tokens, self._at_s = tokens, now_s
        return rates


def look(url: str) -> dict[str, Any]:
    """What ``GET /cluster`` answers.

    Raises:
        ServerError: nothing, or nothing of the kind.
    """
    address = url.rstrip("/").removesuffix("/v1") + "/cluster"
    try:
        with urlopen(address, timeout=TIMEOUT_S) as reply:
            view = json.load(reply)
    except HTTPError as error:
        error.close()  # it is the answer, too, with an open connection
        raise ServerError(f"{address}: {error.code} {error.reason}") from None
    except (OSError, HTTPException) as error:
        raise ServerError(f"cannot reach {url}: {getattr(error, 'reason', error)}") from None
    except ValueError:
        view = None
    if not isinstance(view, dict) or "models" not in view:
        raise ServerError(f"{address} is no view of a cluster; is this a focus-ray server?")
    return view


def drawn(view: dict[str, Any], rates: dict[str, float]) -> RenderableType:
    """A table for each model."""
    return Group(*(table(model, rates) for model in view["models"]))


def table(model: dict[str, Any], rates: dict[str, float]) -> Table:
    """One row per replica, and one more for each GPU beyond its first."""
    replicas = model["replicas"]
    has_gpus = any(replica["gpus"] for replica in replicas)
    states = ", ".join(f"{count} {state.lower()}" for state, count in model["states"].items())
    drawn = Table(title=f"{model['model']}: {states or 'no replica'}", title_justify="left")
    for number, name in enumerate(COLUMNS + (GPU_COLUMNS if has_gpus else ())):
        drawn.add_column(name, justify="right" if number else "left", no_wrap=True)
    for replica in replicas:
        own, gpus = engine_cells(replica, rates), [gpu_cells(gpu) for gpu in replica["gpus"]]
        drawn.add_row(*own, *(gpus[0] if gpus else ()))
        for cells in gpus[1:]:
            drawn.add_row(*([""] * len(COLUMNS)), *cells)
    return drawn


def engine_cells(replica: dict[str, Any], rates: dict[str, float]) -> list[str]:
    rate = rates.get(replica["replica"])
    return [
        replica["replica"],
        percent(replica["occupancy"]),
        str(replica["running"]),
        str(replica["waiting"]),
        percent(replica["kv_usage"]),
        f"{replica['step_seconds'] * 1e3:.1f} ms",
        UNKNOWN if rate is None else f"{rate:.0f}",
    ]


def gpu_cells(gpu: dict[str, Any]) -> list[str]:
    used, total = gpu["memory_used_bytes"], gpu["memory_total_bytes"]
    power, temperature = gpu["power_watts"], gpu["temperature_celsius"]
    return [
        gpu["name"],
        UNKNOWN if used is None or total is None else f"{used / GIB:.0f}/{total / GIB:.0f} GiB",
        percent(gpu["utilization"]),
        UNKNOWN if power is None else f"{power:.0f} W",
        UNKNOWN if temperature is None else f"{temperature:.0f} °C",
    ]


def percent(share: float | None) -> str:
    return UNKNOWN if share is None else f"{share:.0%}"
