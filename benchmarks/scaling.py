"""How many times faster do several GPUs answer than one? Everything through HTTP.

    focus-ray bench scaling --shape sdar-8b --json FILE --plot FILE        # all that fits here
    focus-ray bench scaling --shape sdar-8b --layout 1x1 1x2 1x4           # one engine, more ranks
    focus-ray bench scaling --shape sdar-8b --layout 1x1 8x1 --concurrency 256
    focus-ray bench scaling --step-ms 24 --layout 1x1 8x1                  # only the way over HTTP

A layout is written as 4x2: four engines, each with the whole model divided between two GPUs.
Layouts for which there is room stand side by side and are measured in turns, so that engines start
together. So many requests are in flight for each engine; those of all engines of a layout come
through one endpoint and its router.

The figures are of a steady stretch, which begins when as many requests have ended as are in flight.
Every answer is compared with the first one to the same prompt: layouts must not differ in what they
say. ``--budget-s`` leaves out what would not end in time.
"""

from __future__ import annotations

import argparse
import datetime
import shlex
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from focus_ray import __version__
from focus_ray.benchmarks.report_file import write_text
from focus_ray.benchmarks.run_facts import device_name
from focus_ray.benchmarks.scaling_flags import parse_arguments
from focus_ray.benchmarks.scaling_layouts import ONE, Layout, in_turns
from focus_ray.benchmarks.scaling_load import Clients
from focus_ray.benchmarks.scaling_report import draw, print_rows, write_report
from focus_ray.benchmarks.scaling_rows import Answers, Row, compare, row_of
from focus_ray.benchmarks.scaling_server import expanded, read_steps, server_of
from focus_ray.benchmarks.serving_client import CHAT, COMPLETIONS
from focus_ray.benchmarks.serving_prompts import bodies_of, make_prompts
from focus_ray.benchmarks.workload import Prompt
from focus_ray.errors import FocusRayError

INTERRUPTED = 130
"""Exit status after Ctrl-C, as shells have it."""


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse_arguments(arguments, __doc__)
    console = Console(width=None if sys.stdout.isatty() else 170, highlight=False)
    command = sys.argv[1:] if arguments is None else list(arguments)
    scaling = Scaling(args, console, shlex.join(["focus-ray", "bench", "scaling", *command]))
    status = 0
    try:
        scaling.run()
    except (FocusRayError, OSError, ValueError) as error:
        console.print(str(error), markup=False, style="red")
        status = 1
    except KeyboardInterrupt:  # what was measured so far is worth showing
        console.print("interrupted")
        status = INTERRUPTED
    print_rows(console, scaling.rows)
    for name in scaling.skipped:
        console.print(f"[yellow]not measured, for it would not end in --budget-s:[/] {name}")
    for path in (args.json, args.plot):
        if path is not None and path.exists():
            console.print(f"written to {path}")
    raise SystemExit(status)


class Scaling:
    """One run of the command, and all that it found so far."""

    def __init__(self, args: argparse.Namespace, console: Console, command: str) -> None:
        self.rows: list[Row] = []
        self.skipped: list[str] = []
        self._args, self._console = args, console
        self._began_s = time.perf_counter()
        self._around_s = self._run_s = 0.0  # the longest yet: what is around runs, and a run
        self._running_s = 0.0  # all runs
        self._prompts: list[Prompt] = []
        self._facts: dict[str, Any] = {
            "command": command,
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "version": __version__,
            "devices": args.gpu_names or [device_name(on_gpu=False)],
            "model": args.model,
            "mode": args.mode,
            "router": args.router,
            "window_s": args.window_s,
            "num_ingress_replicas": args.num_ingress_replicas,
            "num_clients": args.num_clients,
            "num_prompts": args.num_prompts,
            "starts": [],
        }

    def run(self) -> None:
        """All turns of all models; rows, files and what is skipped are there as soon as known.

        Raises:
            FocusRayError: a server did not start.
            OSError, ValueError: a model or a request failed.
        """
        args = self._args
        with tempfile.TemporaryDirectory() as folder, Clients(args.num_clients) as clients:
            self._prompts = make_prompts(args, args.model, None)
            for shape in args.shapes or (None,):
                known = Answers()
                for turn in in_turns(args.layouts, args.num_devices):
                    title = f"{shape or args.model}, {', '.join(map(str, turn))}"
                    if self._is_late(self._around_s + self._run_s):
                        self.skipped.append(title)
                        continue
                    began_s = time.perf_counter() - self._running_s
                    model = args.model
                    if shape is not None:
                        self._tell(f"{shape} as a checkpoint")
                        model = str(expanded(args, shape, args.checkpoints or Path(folder)))
                    self._turn(model, shape or args.model, turn, known, clients)
                    ended_s = time.perf_counter() - self._running_s
                    self._around_s = max(self._around_s, ended_s - began_s)
        self._write()

    def _turn(
        self, model: str, name: str, turn: Sequence[Layout], known: Answers, clients: Clients
    ) -> None:
        """Layouts that stand side by side."""
        began_s = time.perf_counter()
        with server_of(self._args, model, turn, self._tell) as server:
            start_s = time.perf_counter() - began_s
            started = {"model": name, "layouts": [str(each) for each in turn], "start_s": start_s}
            self._facts["starts"].append(started)
            for layout in turn:
                for concurrency in self._concurrencies(layout):
                    title = f"{name}, {layout}, {concurrency} requests for each engine"
                    if self._is_late(self._run_s):
                        self.skipped.append(title)
                        continue
                    row = self._measure(server.url, name, layout, concurrency, known, clients)
                    self.rows.append(row)
                    comparison = compare(row, self.rows)
                    speed = "" if comparison is None else f", {comparison.speed:.2f} times one"
                    self._tell(f"{title}: {row.tokens_per_s:.0f} output tok/s{speed}")
                    self._write()

    def _measure(
        self,
        url: str,
        name: str,
        layout: Layout,
        concurrency: int,
        known: Answers,
        clients: Clients,
    ) -> Row:
        args, began_s = self._args, time.perf_counter()
        route = CHAT if self._prompts[0].messages else COMPLETIONS
        shared = {
            "model": str(layout),
            "temperature": args.temperature,
            "seed": args.seed,
            "ignore_eos": args.ignore_eos,
        }
        load = clients.run(
            url + route,
            bodies_of(self._prompts, route, shared),
            concurrency * layout.num_replicas,
            args.window_s,
            lambda: read_steps(url, str(layout)),
        )
        run_s = time.perf_counter() - began_s
        self._run_s, self._running_s = max(self._run_s, run_s), self._running_s + run_s
        tasks = [None if args.ignore_eos else prompt.task for prompt in self._prompts]
        return row_of(name, layout, concurrency, load, tasks, known)

    def _concurrencies(self, layout: Layout) -> list[int]:
        """Several engines are asked how far they go, one of each kind about small loads, too."""
        concurrencies: list[int] = self._args.concurrencies
        return concurrencies if layout.num_replicas == 1 else concurrencies[-1:]

    def _is_late(self, more_s: float) -> bool:
        """Whether what takes so long would end too late."""
        left_s: float = self._args.budget_s - (time.perf_counter() - self._began_s)
        window_s: float = self._args.window_s
        return left_s < (more_s or window_s)

    def _write(self) -> None:
        args = self._args
        if args.json is not None:
            write_report(args.json, self._facts, self.rows, self.skipped)
        others = [row for row in self.rows if row.layout != ONE]
        if args.plot is not None and any(compare(row, self.rows) for row in others):
            title = f"{args.model} on {self._facts['devices'][0]}"
            write_text(args.plot, draw(self.rows, title))

    def _tell(self, words: str) -> None:
        self._console.print(f"[dim]{time.perf_counter() - self._began_s:5.0f} s[/] {words}")


if __name__ == "__main__":
    main()
