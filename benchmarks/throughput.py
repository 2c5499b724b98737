"""How fast is each way of decoding, at every number of requests in flight?

    python benchmarks/throughput.py --shape sdar-8b --json FILE --plot FILE
    python benchmarks/throughput.py --model DIR --dataset-path sharegpt.json --mode focus@0.8

A closed loop in process, after the protocol of the FOCUS paper (arXiv 2601.23278): so many requests
in flight, each replaced when it ends, answers decoded greedily to their natural end. All modes get
the same prompts. Every run has figures of the whole of it and of its steady stretch, from when as
many requests have finished as there are places to the last step with all places taken; tables and
plot show the latter (see ``closed_loop.py``). One loaded model serves all runs. If it has experts,
the report says first how many of them the tokens of a step go through.

A fixed rate of two tokens a step, for comparison with other engines at any shape:

    python benchmarks/throughput.py --shape sdar-8b --random-weights --ignore-eos \\
        --unmasking low_confidence_static --denoising-steps 16
"""

from __future__ import annotations

import argparse
import gc
import itertools
import shlex
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from focus_ray.benchmarks.closed_loop import ClosedLoop, LoopProgress
from focus_ray.benchmarks.expert_load import count_experts
from focus_ray.benchmarks.profile_step import StepProfile, profile_engine
from focus_ray.benchmarks.report_file import write_text
from focus_ray.benchmarks.scores import scores_of
from focus_ray.benchmarks.settings import engine_fields
from focus_ray.benchmarks.throughput_flags import parse_arguments, shared_fields
from focus_ray.benchmarks.throughput_plot import draw
from focus_ray.benchmarks.throughput_report import print_comparisons, print_rows, write_report
from focus_ray.benchmarks.throughput_rows import Row, Snapshot, answers_of, compare, figures_of
from focus_ray.benchmarks.throughput_setup import (
    describe,
    is_outline,
    load,
    make_prompts,
    num_prompts,
    titles,
)
from focus_ray.benchmarks.workload import Prompt
from focus_ray.config import EngineConfig
from focus_ray.engine.assembly import assemble
from focus_ray.engine.engine import Engine
from focus_ray.engine.ranked_runner import RankedRunner
from focus_ray.engine.runner import Runner
from focus_ray.errors import FocusRayError
from focus_ray.models.loading import LoadedModel
from focus_ray.sampling import RepetitionDetection, SamplingParams

SETTLING_STEPS = 40
"""Full steps before the profiled ones."""

INTERRUPTED = 130
"""Exit status after Ctrl-C, as shells have it."""


@dataclass
class Bench:
    """An engine that is ready, what counts its work, and how long it took to make."""

    engine: Engine
    runner: Runner
    start_s: float

    @classmethod
    def start(cls, config: EngineConfig, loaded: LoadedModel) -> Bench:
        started = time.perf_counter()
        parts = assemble(config, loaded if config.tensor_parallel_size == 1 else None)
        runner = parts.runner.own if isinstance(parts.runner, RankedRunner) else parts.runner
        assert isinstance(runner, Runner)
        return cls(Engine(config, parts), runner, time.perf_counter() - started)

    def snapshot(self) -> Snapshot:
        return Snapshot(self.engine.load(), copy(self.runner.work))


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse_arguments(arguments, __doc__)
    console = Console(width=None if sys.stdout.isatty() else 170)
    command = sys.argv[1:] if arguments is None else list(arguments)
    rows: list[Row] = []
    is_interrupted = False
    try:
        loaded = load(args)
        most = max(num_prompts(args, concurrency) for concurrency in args.concurrencies)
        with console.status("drawing prompts"):
            prompts = make_prompts(args, loaded, most)
        facts = {
            "command": shlex.join(["python", "benchmarks/throughput.py", *command]),
            **describe(args, loaded, prompts),
            "experts": None,
        }
        if not is_outline(loaded):
            with console.status("counting experts"):
                load_of_experts = count_experts(loaded, prompts)
            if load_of_experts is not None:
                facts["experts"] = load_of_experts.as_json()
                console.print(load_of_experts.summary())
        for row in measure_all(args, loaded, prompts, console):
            rows.append(row)
            comparisons = compare(rows, loaded.spec.num_layers)
            if args.json:
                write_report(args.json, facts, rows, comparisons)
            if args.plot:
                write_text(args.plot, draw(rows, *titles(facts)))
    except (FocusRayError, OSError, ValueError) as error:
        raise SystemExit(str(error)) from error
    except KeyboardInterrupt:  # what was measured so far is worth showing
        is_interrupted = True
    if rows:
        print_rows(console, rows)
        print_comparisons(console, comparisons)
        for path in (args.json, args.plot):
            if path:
                console.print(f"written to {path}")
    if is_interrupted:
        console.print(f"interrupted after {len(rows)} runs")
        raise SystemExit(INTERRUPTED)


def measure_all(
    args: argparse.Namespace, loaded: LoadedModel, prompts: Sequence[Prompt], console: Console
) -> Iterator[Row]:
    """Every mode at every concurrency; each row as soon as it is known."""
    runs = list(itertools.product(args.concurrencies, args.modes))
    if args.max_num_seqs is not None:  # one engine after the other
        runs = [(concurrency, mode) for mode in args.modes for concurrency in args.concurrencies]
    bench, made_for = None, None
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    rate = TextColumn("{task.fields[rate]:.0f} tok/s")
    with Progress(*columns, rate, TimeElapsedColumn(), console=console, transient=True) as bar:
        for place, (concurrency, mode) in enumerate(runs, 1):
            title = f"{place}/{len(runs)} {mode} x {concurrency}"
            number = num_prompts(args, concurrency)
            shown = bar.add_task(f"{title}: engine", total=number, rate=0.0)
            fields = {**shared_fields(args), **engine_fields(mode)}
            key = (mode, args.max_num_seqs or concurrency)
            if bench is None or made_for != key:
                if bench is not None:
                    bench.engine.close()
                bench = None
                _forget_memory()
                config = EngineConfig(**{**fields, "max_num_seqs": key[1]})
                bench, made_for = Bench.start(config, loaded), key

            def show(progress: LoopProgress, title: str = title, shown: Any = shown) -> None:
                rate = progress.num_tokens / max(progress.elapsed_s, 1e-9)
                bar.update(shown, description=title, completed=progress.num_finished, rate=rate)

            row = measure(args, bench, mode, concurrency, prompts[:number], show)
            bar.remove_task(shown)
            bar.console.print(
                f"{title}: {row.shown.output_tokens_per_s:.0f} output tok/s, "
                f"{row.shown.step_s * 1e3:.2f} ms a step"
            )
            yield row
    if bench is not None:
        bench.engine.close()


def measure(
    args: argparse.Namespace,
    bench: Bench,
    mode: str,
    concurrency: int,
    prompts: Sequence[Prompt],
    show: Callable[[LoopProgress], None],
) -> Row:
    """One run on an engine that is idle, and is left idle."""
    params = SamplingParams(
        temperature=args.temperature,
        ignore_eos=args.ignore_eos,
        seed=args.seed,
        repetition_detection=RepetitionDetection() if args.stop_repetition else None,
    )
    requests = [prompt.request(f"{i}", params) for i, prompt in enumerate(prompts)]
    warm_ups = [prompt.request(f"warm-up-{i}", params) for i, prompt in enumerate(prompts)]
    if args.num_warmups:
        warm_ups = warm_ups[: args.num_warmups]
        places = min(len(warm_ups), concurrency)
        ClosedLoop(bench.engine, warm_ups, places, lambda: None).run()
    on_gpu = torch.cuda.is_available() and bench.engine.config.device != "cpu"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    record = ClosedLoop(bench.engine, requests, concurrency, bench.snapshot).run(show)
    peak = torch.cuda.max_memory_allocated() if on_gpu else None
    tasks = [None if args.ignore_eos else prompt.task for prompt in prompts]
    return Row(
        mode=mode,
        concurrency=concurrency,
        fields={**shared_fields(args), **engine_fields(mode)},
        finish_reasons=dict(Counter(str(r.finish_reason) for r in record.requests)),
        whole=figures_of(record, record.whole),
        steady=None if record.steady is None else figures_of(record, record.steady),
        exact_match=scores_of(answers_of(record.requests, tasks)),
        profile=profile_full(args, bench.engine, concurrency, prompts, params) if on_gpu else None,
        peak_memory_bytes=peak,
        start_s=bench.start_s,
    )


def profile_full(
    args: argparse.Namespace,
    engine: Engine,
    concurrency: int,
    prompts: Sequence[Prompt],
    params: SamplingParams,
) -> StepProfile | None:
    """A few steps of a full engine under the profiler; the engine is idle before and after."""
    if args.profile < 2:
        return None
    numbered = enumerate(itertools.cycle(prompts))

    def keep_full() -> None:
        while len(engine.running_requests) < concurrency:
            number, prompt = next(numbered)
            engine.add(prompt.request(f"profile-{number}", params))

    for _ in range(SETTLING_STEPS):
        keep_full()
        engine.step()
    profile = profile_engine(engine, keep_full, args.profile)
    for request_id in list(engine.running_requests):
        engine.abort(request_id)
    while engine.has_unfinished():
        engine.step()
    return profile


def _forget_memory() -> None:
    """Return the memory of an engine that nobody holds any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
