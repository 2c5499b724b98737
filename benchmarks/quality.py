"""How good are the answers, and what do they cost, under each way of decoding?

    python benchmarks/quality.py                                       # the settings of the docs
    python benchmarks/quality.py --setting focus,threshold=0.8,alpha=1.5,policy=leftmost ...

Every setting answers the same problems, greedily, in one engine of its own. A setting is a decoding
mode and, after commas, what differs from the defaults, by the names of ``settings.py``; few
``num_pages``, for example, let sequences be preempted and their KV be computed again.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from focus_ray import LLM, SamplingParams
from focus_ray.benchmarks.decoding_steps import (
    Decoding,
    Signal,
    decoding_of,
    in_full_blocks,
    placed_steps,
    signal_of,
)
from focus_ray.benchmarks.report_file import write_json
from focus_ray.benchmarks.run_facts import run_facts
from focus_ray.benchmarks.scores import Score, scores_of
from focus_ray.benchmarks.settings import engine_fields
from focus_ray.engine.outputs import DecodingCounts
from focus_ray.models.checkpoint import resolve_checkpoint
from focus_ray.models.spec import read_spec
from focus_ray.tasks import Task, evaluation_set

# An alpha of 1000 evicts nothing: decoding is that of the delayed cache, and the importance deltas
# are there to be compared with what was decoded.
DEFAULT_SETTINGS = (
    "block,threshold=0.9",
    "block,threshold=0.8",
    "delayed,threshold=0.8",
    "focus,threshold=0.8,alpha=1000,adaptive=off",
    *(
        f"focus,threshold=0.8,alpha={alpha},policy={policy},adaptive=off,recall_every=16"
        for policy in ("delta", "leftmost")
        for alpha in (1.2, 1.5, 1.8)
    ),
)


@dataclass(frozen=True)
class Result:
    """What one setting did."""

    setting: str
    scores: dict[str, Score]
    counts: dict[str, int]
    all_blocks: Decoding
    full_blocks: Decoding | None
    signal: Signal | None
    recall: float | None
    num_preemptions: int
    seconds: float

    def as_json(self) -> dict[str, Any]:
        scores = {name: score.as_json() for name, score in self.scores.items()}
        return asdict(self) | {"scores": scores, "seconds": round(self.seconds, 1)}


def measure(setting: str, tasks: Sequence[Task], args: argparse.Namespace) -> Result:
    """Answer all tasks under one setting."""
    fields = engine_fields(setting)
    spec = read_spec(resolve_checkpoint(args.model), block_length=fields.get("block_length"))
    started = time.perf_counter()
    with LLM(
        model=args.model,
        device=args.device,
        dtype=args.dtype,
        kv_cache_memory_bytes=args.kv_cache_memory_bytes,
        record_trace=True,
        **fields,
    ) as llm:
        params = SamplingParams(max_tokens=args.max_tokens, temperature=0.0)
        outputs = llm.chat([task.messages for task in tasks], params)
    seconds = time.perf_counter() - started
    steps = [
        placed
        for output in outputs
        for placed in placed_steps(output, spec.block_length, spec.mask_token_id)
    ]
    full = in_full_blocks(steps, spec.block_length, frozenset(spec.stop_token_ids))
    counts = sum((output.stats for output in outputs), start=DecodingCounts())
    all_blocks = decoding_of(steps)
    assert all_blocks is not None
    return Result(
        setting=setting,
        scores=scores_of(
            (task, output.outputs[0].text) for task, output in zip(tasks, outputs, strict=True)
        ),
        counts=asdict(counts),
        all_blocks=all_blocks,
        full_blocks=decoding_of(full),
        # what is evicted cannot be decoded: the signal would confirm whatever evicted
        signal=None if counts.evicted_tokens else signal_of(full),
        recall=counts.eviction_recall,
        num_preemptions=sum(output.stats.preemptions for output in outputs),
        seconds=seconds,
    )


def print_tasks(console: Console, result: Result) -> None:
    table = Table(title=f"Exact match, {result.setting}")
    for column in ("task", "right", "of", "exact match", "95 % interval"):
        table.add_column(column, justify="left" if column == "task" else "right")
    for name, score in result.scores.items():
        low, high = score.interval
        counts = (str(score.num_right), str(score.num_problems))
        table.add_row(name, *counts, f"{score.share:.1%}", f"{low:.1%} to {high:.1%}")
    console.print(table)


def print_summary(console: Console, results: Sequence[Result]) -> None:
    """One line per setting; tokens per step and work are of full blocks of answer text."""
    table = Table(
        title="Full blocks of answer text: tokens per step; processed and retained per decoded"
    )
    columns = ("word problems", "all", "steps", "tok/step", "processed", "retained", "recall")
    table.add_column("setting", overflow="fold")
    for column in columns:
        table.add_column(column, justify="right")
    for result in results:
        words, full = result.scores.get("word_problem"), result.full_blocks
        table.add_row(
            result.setting,
            *(
                f"{score.num_right}/{score.num_problems}" if score else "-"
                for score in (words, result.scores["all"])
            ),
            str(result.counts["denoising_steps"]),
            *(
                f"{value:.2f}"
                for value in (
                    (full.tokens_per_step, full.processed_per_decoded, full.retained_per_decoded)
                    if full
                    else ()
                )
            ),
            *(() if full else "---"),
            "-" if result.recall is None else f"{result.recall:.0%}",
        )
    console.print(table)
    for result in results:
        if result.signal is not None:
            console.print(
                f"{result.setting}: over {result.signal.num_steps} steps of full answer blocks, "
                f"AUC of the importance delta {result.signal.auc_importance_delta:.3f}, of "
                f"leftness {result.signal.auc_leftness:.3f}"
            )


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="sdar-tiny")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--setting", action="append", help="may be repeated")
    parser.add_argument("--block-length", type=int, action="append", help="cross with the settings")
    parser.add_argument("--word-problems", type=int, default=300)
    parser.add_argument("--others", type=int, default=30, help="problems of every other kind")
    parser.add_argument("--max-tokens", type=int, default=1024)
    parser.add_argument("--kv-cache-memory-bytes", type=int, help="to share a GPU")
    parser.add_argument("--json", type=Path, help="written after every setting")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    console = Console(width=None if sys.stdout.isatty() else 150)
    settings = list(args.setting or DEFAULT_SETTINGS)
    if args.block_length:
        settings = [f"{s},block_length={b}" for b in args.block_length for s in settings]
    for setting in settings:  # a mistake in the last shall not cost the time of the others
        try:
            engine_fields(setting)
        except ValueError as error:
            sys.exit(f"--setting {setting}: {error}")
    tasks = evaluation_set(args.word_problems, args.others)
    results = []
    for setting in settings:
        results.append(measure(setting, tasks, args))
        print_tasks(console, results[-1])
        if args.json:
            write_report(args, results)
    print_summary(console, results)


def write_report(args: argparse.Namespace, results: Sequence[Result]) -> None:
    report = {
        "command": shlex.join(["python", *sys.argv]),
        "model": args.model,
        **run_facts(args.device != "cpu" and torch.cuda.is_available()),
        "settings": [result.as_json() for result in results],
    }
    write_json(args.json, report)


if __name__ == "__main__":
    main()
