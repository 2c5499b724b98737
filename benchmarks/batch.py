"""How much of an engine's speed does an offline job keep?

    focus-ray bench batch --num-prompts 2000 --json FILE
    focus-ray bench batch --model DIR --max-num-seqs 256 --num-replicas 1 2
    focus-ray bench batch --step-ms 96 --num-replicas 1 2 4 8      # engines that only take time

The same requests go through the engine alone, in this process and without Ray, and through a job as
``focus-ray batch run`` does it, for every number of engines. Speeds are of the time from the first
finished request on, and of the whole with its start, for both sides: loading the model is the same
on both. The second one nears the first as jobs get longer. With ``--step-ms`` no core is spent on a
model, as when GPUs compute, so that one machine shows what a job of many engines costs.
"""

from __future__ import annotations

import argparse
import gc
import json
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from focus_ray.batch.job import BatchJob, Progress, run_job
from focus_ray.benchmarks.report_file import refuse_folder, write_json
from focus_ray.benchmarks.request_flags import (
    add_request_flags,
    complete_requests,
    require_above_zero,
    require_at_least,
)
from focus_ray.benchmarks.run_facts import run_facts
from focus_ray.benchmarks.serving_client import CHAT, COMPLETIONS
from focus_ray.benchmarks.serving_prompts import bodies_of, make_prompts
from focus_ray.benchmarks.settings import engine_config, engine_fields
from focus_ray.benchmarks.stepped_engine import SteppedEngine, stepped_factory
from focus_ray.benchmarks.workload import Prompt
from focus_ray.cluster.engine_start import start_engine
from focus_ray.cluster.local_ray import local_ray
from focus_ray.config import DEFAULT_MODEL, EngineConfig
from focus_ray.engine.engine import Engine
from focus_ray.engine.outputs import GenerationRequest
from focus_ray.errors import FocusRayError
from focus_ray.openai.text_engine import EngineFactory
from focus_ray.sampling import SamplingParams

OBJECT_STORE_BYTES = 1 << 30
MODE = "focus@0.8"


@dataclass(frozen=True)
class Run:
    """One side.

    Args:
        first_s: until the first request had ended; what the start costs.
        tokens_after: output tokens of requests that ended after it.
    """

    name: str
    requests: int
    output_tokens: int
    wall_s: float
    first_s: float
    tokens_after: int

    @property
    def tokens_per_s(self) -> float:
        """From the first end on."""
        return self.tokens_after / max(self.wall_s - self.first_s, 1e-9)

    @property
    def whole_tokens_per_s(self) -> float:
        return self.output_tokens / self.wall_s


class Watch:
    """When the first request ended, and what there was by then."""

    def __init__(self) -> None:
        self._began_s = time.perf_counter()
        self.first_s: float | None = None
        self.tokens_at_first = 0

    def tell(self, tokens: int) -> None:
        if self.first_s is None:
            self.first_s, self.tokens_at_first = time.perf_counter() - self._began_s, tokens

    def run(self, name: str, requests: int, tokens: int) -> Run:
        wall_s = time.perf_counter() - self._began_s
        first_s = wall_s if self.first_s is None else self.first_s
        return Run(name, requests, tokens, wall_s, first_s, tokens - self.tokens_at_first)


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse_arguments(arguments)
    console = Console(highlight=False)
    runs: list[Run] = []
    try:
        config = engine_config(
            model=args.model, max_num_seqs=args.max_num_seqs, **engine_fields(args.mode)
        )
        factory: EngineFactory = start_engine
        if args.step_ms is not None:
            config = config.model_copy(update={"device": "cpu"})
            factory = stepped_factory(args.step_ms / 1e3, args.tokens_per_step, args.max_num_seqs)
        prompts = make_prompts(args, args.model, None)
        console.print("the engine alone")
        runs.append(run_bare(config, prompts, args))
        with (
            tempfile.TemporaryDirectory() as folder,
            local_ray(object_store_bytes=OBJECT_STORE_BYTES, environment={}),
        ):
            source = write_lines(Path(folder) / "lines.jsonl", prompts, args)
            for number in args.num_replicas:
                console.print(f"a job with {number} engines")
                output = Path(folder) / f"job-{number}"
                runs.append(run_batch(config, factory, source, output, number, console.print))
    except (FocusRayError, OSError, ValueError) as error:
        console.print(str(error), markup=False, style="red")
        raise SystemExit(1) from None
    console.print(table_of(runs))
    if args.json is not None:
        facts = {
            "command": shlex.join(["focus-ray", "bench", "batch", *(arguments or sys.argv[1:])]),
            **run_facts(args.step_ms is None and torch.cuda.is_available()),
        }
        found = [
            {**asdict(run), "tokens_per_s": run.tokens_per_s, **against(run, runs[0])}
            for run in runs
        ]
        write_json(args.json, {**facts, "runs": found})


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=DEFAULT_MODEL, help="bundled name, directory or hub id")
    parser.add_argument("--mode", default=MODE, help="way of decoding; default: %(default)s")
    parser.add_argument("--step-ms", type=float, help="engines that only take so long per step")
    parser.add_argument("--tokens-per-step", type=float, default=3.1, help="of their sequences")
    parser.add_argument("--max-num-seqs", type=int, default=256)
    parser.add_argument("--num-prompts", type=int, default=2000)
    parser.add_argument("--num-replicas", type=int, nargs="+", default=[1], help="engines of jobs")
    parser.add_argument("--json", type=Path, metavar="FILE")
    add_request_flags(parser, output_len=256, output_len_help="most tokens of an answer")
    args = parser.parse_args(arguments)
    try:
        complete_requests(args, "bundled" if args.step_ms is None else "random")
        require_at_least(args, {"num_prompts": 2, "max_num_seqs": 1, "tokens_per_step": 1})
        if args.step_ms is not None:
            require_above_zero(args, ("step_ms",))
        refuse_folder("--json", args.json)
        if min(args.num_replicas) < 1:
            raise ValueError(f"--num-replicas must be at least 1, got {min(args.num_replicas)}")
    except ValueError as error:
        parser.error(str(error))
    return args


def run_bare(config: EngineConfig, prompts: Sequence[Prompt], args: argparse.Namespace) -> Run:
    """All at once into the engine's queue, as far as it is long."""
    watch = Watch()
    engine: Engine | SteppedEngine
    if args.step_ms is not None:
        engine = SteppedEngine(args.step_ms / 1e3, args.tokens_per_step, args.max_num_seqs)
    else:
        engine = Engine(config)
    params = SamplingParams(temperature=args.temperature, ignore_eos=args.ignore_eos)
    waiting = list(enumerate(prompts))[::-1]
    running = ended = tokens = 0
    while waiting or running:
        while waiting and running < 2 * config.max_num_seqs:
            number, prompt = waiting.pop()
            asked = params.model_copy(update={"max_tokens": prompt.max_tokens})
            engine.add(GenerationRequest(f"{number}", tuple(prompt.token_ids), asked))
            running += 1
        for delta in engine.step():
            tokens += len(delta.token_ids)
            if delta.finish_reason is not None:
                running, ended = running - 1, ended + 1
                watch.tell(tokens)
    run = watch.run("engine alone", ended, tokens)
    engine.close()
    del engine
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # the job's engine is to have the room
    return run


def run_batch(
    config: EngineConfig,
    factory: EngineFactory,
    source: Path,
    output: Path,
    num_replicas: int,
    tell: Callable[[str], None],
) -> Run:
    watch = Watch()

    def show(progress: Progress) -> None:
        watch.tell(progress.tokens_here)

    job = BatchJob((str(source),), str(output), config, config.model, num_replicas=num_replicas)
    summary = run_job(job, tell, show, factory)
    if summary["errors"]:
        raise ValueError(f"{summary['errors']} lines were refused")
    name = f"job, {num_replicas} engine{'s' * (num_replicas > 1)}"
    return watch.run(name, summary["requests"], summary["completion_tokens"])


def write_lines(path: Path, prompts: Sequence[Prompt], args: argparse.Namespace) -> Path:
    route = CHAT if prompts[0].messages else COMPLETIONS
    shared = {"temperature": args.temperature, "ignore_eos": args.ignore_eos}
    bodies = bodies_of(prompts, route, shared)
    path.write_text("".join(f"{json.dumps(body)}\n" for body in bodies))
    return path


def against(run: Run, bare: Run) -> dict[str, float]:
    """What is left of the bare engine's speed."""
    return {
        "of_engine": run.tokens_per_s / bare.tokens_per_s,
        "of_engine_with_start": run.whole_tokens_per_s / bare.whole_tokens_per_s,
    }


def table_of(runs: Sequence[Run]) -> Table:
    table = Table()
    for name in ("", "requests", "tokens", "tok/s", "of engine", "first", "wall", "with start"):
        table.add_column(name, justify="right" if name else "left")
    for run in runs:
        shares = against(run, runs[0])
        table.add_row(
            run.name,
            str(run.requests),
            str(run.output_tokens),
            f"{run.tokens_per_s:.0f}",
            f"{shares['of_engine']:.1%}",
            f"{run.first_s:.1f} s",
            f"{run.wall_s:.1f} s",
            f"{shares['of_engine_with_start']:.1%}",
        )
    return table


if __name__ == "__main__":
    main()
