"""What a scaling run asks: the layouts of one turn behind one server, and models made for it."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from urllib.request import urlopen

from focus_ray.benchmarks.scaling_layouts import Layout
from focus_ray.benchmarks.scaling_rows import Steps
from focus_ray.benchmarks.settings import engine_config, engine_fields
from focus_ray.benchmarks.stepped_engine import stepped_factory
from focus_ray.serve.args import ServeArgs
from focus_ray.serve.local import LocalServer
from focus_ray.serve.model_args import ModelArgs

# An engine has more places than requests in flight for it: how evenly a router deals is then seen
# in the length of steps and not in requests that wait.
PLACES = 1.25
SCRAPE_S = 10.0


def expanded(args: argparse.Namespace, shape: str, folder: Path) -> Path:
    """The model in that shape as a checkpoint, made if it is not there.

    Ranks read their parts of a checkpoint, and engines of one rank read it as fast as they could
    expand the model themselves. It is made by a process of its own, which leaves the GPU empty.

    Raises:
        ValueError: it cannot be made; the reason has been printed.
    """
    path = folder / shape
    if path.exists():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = folder / f"{shape}-{os.getpid()}"
    command = [sys.executable, "-P", "-m", "focus_ray.benchmarks.expand"]
    flags = ["--shape", shape, "--small", args.model, "--output", str(unfinished)]
    if subprocess.run([*command, *flags, "--seed", str(args.seed)], check=False).returncode:
        raise ValueError(f"{shape} was not made; what went wrong stands above")
    return unfinished.rename(path)


def server_of(
    args: argparse.Namespace, model: str, turn: Sequence[Layout], tell: Callable[[str], None]
) -> LocalServer:
    """A server in which every layout of a turn is a model of its own, called by its name."""
    places = round(PLACES * max(args.concurrencies))
    fields: dict[str, Any] = {
        "model": model,
        "max_num_seqs": places,
        "enable_prefix_caching": False,  # prompts come again
        "seed": args.seed,
        **engine_fields(args.mode),
    }
    factory, num_cpus = None, None if args.gpu_names else 1.0
    if args.step_ms is not None:
        factory = stepped_factory(args.step_ms / 1e3, args.tokens_per_step, places)
        fields["device"] = "cpu"
        num_engines = sum(layout.num_replicas for layout in turn)
        num_cpus = 0.9 * (os.cpu_count() or 1) / num_engines
    models = tuple(
        ModelArgs(
            engine=engine_config(**fields, tensor_parallel_size=layout.num_ranks),
            served_model_name=(str(layout),),
            num_replicas=layout.num_replicas,
            num_cpus=num_cpus,
            router=args.router,
            max_start_attempts=1,
        )
        for layout in turn
    )
    served = ServeArgs(
        models=models, num_ingress_replicas=args.num_ingress_replicas, batch_storage=None
    )
    return LocalServer(served, "127.0.0.1", args.port, tell=tell, engine_factory=factory)


def read_steps(url: str, model_name: str) -> Steps:
    """Steps that the engines of a model have taken by now.

    Raises:
        OSError: the server does not answer.
        ValueError: it does not know them.
    """
    asked_s = time.perf_counter()
    with urlopen(f"{url}/metrics", timeout=SCRAPE_S) as reply:
        text = reply.read().decode()
    return Steps.read(text, model_name, (asked_s + time.perf_counter()) / 2)
