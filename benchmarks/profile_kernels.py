"""What a device did between two moments, read from a profiler's trace.

Kernels may overlap: on several streams, or because one begins while its predecessor ends. Times in
sums are therefore *own* times: what a kernel adds to the time in which the device is busy. They
add up to that time, and of an overlap whoever began first has it.

Where a trace has no device, on a CPU, operations of PyTorch take the kernels' place; one that calls
others is cut into the pieces between them.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any

ON_DEVICE = {"kernel", "gpu_memcpy", "gpu_memset"}
ON_HOST = "cpu_op"

STEP_END = "advance_blocks"
"""The name of a kernel that runs once a step, near its end, holds this."""

# The first group with a part of the lower-case name has it.
GROUPS = (
    ("attention", ("attend", "attention", "add_splits")),
    ("norm, rotary", ("rms_norm", "norm_rotary", "rotary")),
    ("fill", ("fill_kv",)),
    ("activation", ("swiglu", "silu")),
    ("eviction", ("importance", "retain", "compact")),
    ("experts", ("expert_product",)),
    ("routing", ("route_", "place_pairs", "combine_experts")),
    ("confidence", ("confidence",)),
    ("plan", ("place_rows", "plan_rows")),
    ("advance", ("advance_blocks",)),
    ("GEMM", ("gemm", "gemv", "nvjet", "cutlass", "xmma", "cublas", "splitk", "linear")),
    ("GEMM", ("addmm", "aten::mm", "aten::bmm")),
    ("copies", ("memcpy", "memset", "copy", "fill", "zero_")),
)
OTHER = "other"
LONGEST_NAME = 56


@dataclass(frozen=True)
class Kernel:
    """One run of a kernel, seconds on the trace's clock; ``is_rest`` marks its further pieces."""

    name: str
    start_s: float
    end_s: float
    is_rest: bool = False


@dataclass(frozen=True)
class KernelRow:
    """All runs of one kernel, per step; ``share`` is of the busy time."""

    name: str
    group: str
    calls: float
    own_s: float
    mean_s: float
    share: float


@dataclass(frozen=True)
class Gap:
    """Time per step in which the device is idle between two kernels that follow each other."""

    after: str
    before: str
    count: float
    total_s: float
    largest_s: float


@dataclass(frozen=True)
class Activity:
    """Whole steps of a device. Seconds are per step, unless they are one gap's."""

    num_steps: int
    step_s: float
    busy_s: float
    kernels: tuple[KernelRow, ...]
    gaps: tuple[Gap, ...]

    @property
    def busy_share(self) -> float:
        return self.busy_s / self.step_s

    @property
    def groups(self) -> dict[str, float]:
        """Own seconds by group, largest first."""
        sums: dict[str, float] = defaultdict(float)
        for row in self.kernels:
            sums[row.group] += row.own_s
        return dict(sorted(sums.items(), key=lambda item: -item[1]))


def read_trace(path: Path) -> list[Kernel]:
    """Kernels of a trace as the profiler exports it, in the order in which they began.

    Raises:
        ValueError: the trace shows nothing that ran.
    """
    events = json.loads(path.read_text())["traceEvents"]
    timed = [event for event in events if event.get("ph") == "X" and "dur" in event]
    # Seconds since some epoch would not leave a float room for parts of a microsecond.
    first = min((event["ts"] for event in timed), default=0.0)
    shown = [_kernel(event, first) for event in timed if event.get("cat") in ON_DEVICE]
    if not shown:
        by_thread: dict[object, list[Kernel]] = defaultdict(list)
        for event in timed:
            if event.get("cat") == ON_HOST:
                by_thread[event.get("tid")].append(_kernel(event, first))
        shown = [piece for nested in by_thread.values() for piece in unnested(nested)]
    if not shown:
        raise ValueError("the profiler saw no kernel; is another profiler attached to the device?")
    return sorted(shown, key=attrgetter("start_s", "end_s"))


def unnested(kernels: Iterable[Kernel]) -> list[Kernel]:
    """The pieces of nested operations of one thread in which none of them calls another."""
    pieces: list[Kernel] = []
    running: list[Kernel] = []
    begun = 0  # of ``running``, how many have a piece already
    reached_s = 0.0

    def run_until(moment_s: float) -> None:
        nonlocal begun, reached_s
        current = running[-1]
        is_rest = begun == len(running)
        if moment_s > reached_s or not is_rest:
            pieces.append(Kernel(current.name, reached_s, moment_s, is_rest))
        begun, reached_s = len(running), moment_s

    def end_top() -> None:
        nonlocal begun
        run_until(max(reached_s, running[-1].end_s))
        running.pop()
        begun = len(running)

    for kernel in sorted(kernels, key=lambda kernel: (kernel.start_s, -kernel.end_s)):
        while running and running[-1].end_s <= kernel.start_s:
            end_top()
        if running:
            run_until(kernel.start_s)
        running.append(kernel)
        reached_s = kernel.start_s
    while running:
        end_top()
    return pieces


def activity_of(kernels: Sequence[Kernel], num_steps: int) -> Activity:
    """Add up what happened in whole steps.

    The first step, which began on an empty device, does not count. Without a kernel that ends a
    step everything counts, as ``num_steps`` of them.
    """
    ends = sorted(kernel.end_s for kernel in kernels if STEP_END in kernel.name)
    if len(ends) > 2:
        first_s, last_s, num_steps = ends[0], ends[-1], len(ends) - 1
    else:
        first_s = min(kernel.start_s for kernel in kernels)
        last_s = max(kernel.end_s for kernel in kernels)
    runs: dict[str, list[tuple[Kernel, float]]] = defaultdict(list)
    gaps: dict[tuple[str, str], list[float]] = defaultdict(list)
    reached_s, last_name = first_s, "the step before"
    for kernel in kernels:
        if kernel.end_s <= first_s or kernel.start_s >= last_s:
            continue
        name, end_s = short_name(kernel.name), min(kernel.end_s, last_s)
        if kernel.start_s > reached_s:
            gaps[last_name, name].append(kernel.start_s - reached_s)
        runs[name].append((kernel, max(0.0, end_s - max(kernel.start_s, reached_s))))
        if end_s >= reached_s:
            reached_s, last_name = end_s, name
    busy_s = sum(own_s for each in runs.values() for _, own_s in each)
    rows = (_row(name, each, num_steps, busy_s) for name, each in runs.items())
    idle = (
        Gap(*between, len(seconds) / num_steps, sum(seconds) / num_steps, max(seconds))
        for between, seconds in gaps.items()
    )
    return Activity(
        num_steps=num_steps,
        step_s=(last_s - first_s) / num_steps,
        busy_s=busy_s / num_steps,
        kernels=tuple(sorted(rows, key=lambda row: -row.own_s)),
        gaps=tuple(sorted(idle, key=lambda gap: -gap.total_s)),
    )


def group_of(name: str) -> str:
    """What part of a step a kernel belongs to."""
    lower = name.lower()
    return next((group for group, parts in GROUPS if any(p in lower for p in parts)), OTHER)


def short_name(name: str) -> str:
    """Without return type, namespaces, arguments and templates; a functor's name stays."""
    functor = re.search(r"\w*(?:Functor|functor)\w*", name)
    for noise in ("void ", "(anonymous namespace)", "->"):
        name = name.replace(noise, "")
    plain, depth = "", 0
    for character in name:
        depth += (character in "<(") - (character in ">)")
        if not depth and character not in ">)":
            plain += character
    # Operations of PyTorch keep their namespace, by which they are known.
    short = plain.strip() if plain.startswith("aten::") else plain.strip().split("::")[-1]
    if functor and functor[0] not in short:
        short += f" {functor[0]}"
    return short[:LONGEST_NAME]


def _row(
    name: str, runs: Sequence[tuple[Kernel, float]], num_steps: int, busy_s: float
) -> KernelRow:
    own_s = sum(own for _, own in runs)
    calls = sum(not kernel.is_rest for kernel, _ in runs)
    whole_s = sum(kernel.end_s - kernel.start_s for kernel, _ in runs)
    return KernelRow(
        name=name,
        group=group_of(runs[0][0].name),
        calls=calls / num_steps,
        own_s=own_s / num_steps,
        mean_s=whole_s / max(calls, 1),
        share=own_s / busy_s,
    )


def _kernel(event: Mapping[str, Any], first: float) -> Kernel:
    start = event["ts"] - first  # in microseconds, as durations
    return Kernel(event["name"], start / 1e6, (start + event["dur"]) / 1e6)
