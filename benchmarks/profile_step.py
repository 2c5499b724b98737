"""Where does the time of a step go?

    python benchmarks/profile_step.py --shape sdar-8b --concurrency 256 --mode focus@0.8

An engine that is kept full is profiled in its steady state: kernels by their time, in groups; the
share of the time in which the device is busy, and where it is not; what the host does per step. How
long a step takes, and the host's work in it, is measured before the profiler is there.
"""

from __future__ import annotations

import argparse
import datetime
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import cycle, islice
from pathlib import Path

import torch
from rich.console import Console

from focus_ray.benchmarks.expand import DEFAULT_SMALL, expand
from focus_ray.benchmarks.profile_kernels import Activity, activity_of, read_trace
from focus_ray.benchmarks.profile_tables import print_profile
from focus_ray.benchmarks.report_file import write_json
from focus_ray.benchmarks.run_facts import device_name
from focus_ray.benchmarks.settings import engine_fields
from focus_ray.benchmarks.workload import Lengths, bundled_prompts
from focus_ray.config import EngineConfig
from focus_ray.engine.assembly import assemble
from focus_ray.engine.engine import Engine
from focus_ray.errors import FocusRayError
from focus_ray.models.shapes import SHAPES
from focus_ray.sampling import SamplingParams

STEPS = 20
WARM_UP_STEPS = 100
PROMPT_LEN = Lengths(200, 0.5)


@dataclass(frozen=True)
class StepProfile:
    """Steady steps of an engine.

    Args:
        step_s: wall time of a step, without the profiler.
        host_s: what the host did in it, waiting not counted.
        num_tokens: processed in it.
        activity: of the device, under the profiler, which slows the host down.
    """

    device: str
    step_s: float
    host_s: float
    num_tokens: float
    activity: Activity

    @property
    def busy_share(self) -> float:
        """Share of a step's wall time in which the device is busy, both under the profiler."""
        return self.activity.busy_share

    @property
    def busy_of_unprofiled(self) -> float:
        """The same busy time over the wall time of a step without the profiler.

        Above 1 where the profiler slows the device down too.
        """
        return self.activity.busy_s / self.step_s

    def as_json(self) -> dict[str, object]:
        return {
            **asdict(self),
            "busy_share": self.busy_share,
            "busy_of_unprofiled": self.busy_of_unprofiled,
            "groups_s": self.activity.groups,
        }


def profile_engine(
    engine: Engine,
    keep_full: Callable[[], None],
    steps: int = STEPS,
    *,
    trace: Path | None = None,
) -> StepProfile:
    """Run ``engine`` for twice so many steps, half of them under the profiler.

    Args:
        engine: in its steady state.
        keep_full: called before each step, adds the requests that are missing.
        steps: at least 2.
        trace: where the profiler's trace is kept, as a JSON for chrome://tracing or Perfetto.

    Raises:
        ValueError: the engine ran out of requests, or the profiler saw no kernel.
    """
    on_gpu = torch.cuda.is_available() and engine.config.device != "cpu"

    def run(num_steps: int) -> None:
        for _ in range(num_steps):
            keep_full()
            if not engine.has_unfinished():
                raise ValueError("the engine ran out of requests while it was measured; add more")
            engine.step()
        if on_gpu:
            torch.cuda.synchronize()

    before, started = engine.load(), time.perf_counter()
    run(steps)
    step_s = (time.perf_counter() - started) / steps
    after = engine.load()
    kinds = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[kinds.CUDA if on_gpu else kinds.CPU]) as profiler:
        run(steps)
    with tempfile.TemporaryDirectory() as folder:
        path = trace or Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        activity = activity_of(read_trace(path), steps)
    processed = after.processed_tokens - before.processed_tokens
    prefilled = after.prefill_tokens - before.prefill_tokens
    return StepProfile(
        device=device_name(on_gpu),
        step_s=step_s,
        host_s=(after.host_s - before.host_s) / steps,
        num_tokens=(processed + prefilled) / steps,
        activity=activity,
    )


class Clients:
    """Keep so many requests running, over the bundled questions that throughput.py asks, too."""

    def __init__(self, engine: Engine, concurrency: int, max_tokens: int) -> None:
        assert engine.tokenizer is not None
        endless = bundled_prompts(engine.tokenizer, PROMPT_LEN, Lengths(max_tokens), seed=0)
        # Drawn now, so that drawing does not count as the host's work in a step.
        prompts = list(islice(endless, 2 * concurrency))
        self._engine = engine
        self._concurrency = concurrency
        self._params = SamplingParams(temperature=0.0)
        self._prompts = enumerate(cycle(prompts))

    def keep_full(self) -> None:
        """Replace the requests that have ended."""
        while len(self._engine.running_requests) < self._concurrency:
            number, prompt = next(self._prompts)
            self._engine.add(prompt.request(str(number), self._params))


def make_engine(shape: str, mode: str, concurrency: int, *, enforce_eager: bool = False) -> Engine:
    """An engine over ``sdar-tiny``, expanded to ``shape`` unless that is its own name.

    Raises:
        ValueError: shape or mode is unknown.
    """
    if shape != DEFAULT_SMALL and shape not in SHAPES:
        raise ValueError(f"--shape {shape} is none of {', '.join((DEFAULT_SMALL, *SHAPES))}")
    config = EngineConfig(
        model=DEFAULT_SMALL,
        max_num_seqs=concurrency,
        enforce_eager=enforce_eager,
        enable_prefix_caching=False,  # as in throughput.py
        **engine_fields(mode),
    )
    if shape == DEFAULT_SMALL:
        return Engine(config)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return Engine(config, assemble(config, expand(DEFAULT_SMALL, SHAPES[shape], device=device)))


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--shape", default="sdar-8b", help=f"{DEFAULT_SMALL}, {', '.join(SHAPES)}; default sdar-8b"
    )
    parser.add_argument("--mode", default="focus@0.8", help="as block@0.9 or focus@0.8,alpha=1.2")
    parser.add_argument("--concurrency", type=int, default=256)
    parser.add_argument("--max-tokens", type=int, default=512, help="of an answer, at most")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--warm-up", type=int, default=WARM_UP_STEPS, help="steps before")
    parser.add_argument("--enforce-eager", action="store_true", help="without CUDA graphs")
    parser.add_argument("--trace", type=Path, help="where the profiler's trace is kept")
    parser.add_argument("--json", type=Path, help="where the numbers are written")
    args = parser.parse_args(arguments)
    for name, least in {"steps": 2, "concurrency": 1, "max_tokens": 1, "warm_up": 0}.items():
        if (value := getattr(args, name)) < least:
            flag = "--" + name.replace("_", "-")
            parser.error(f"{flag} must be at least {least}, got {value}")
    return args


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse_arguments(arguments)
    console = Console(width=None if sys.stdout.isatty() else 120)
    try:
        engine = make_engine(
            args.shape, args.mode, args.concurrency, enforce_eager=args.enforce_eager
        )
        clients = Clients(engine, args.concurrency, args.max_tokens)
        for _ in range(args.warm_up):
            clients.keep_full()
            engine.step()
        profile = profile_engine(engine, clients.keep_full, args.steps, trace=args.trace)
    except (FocusRayError, OSError, ValueError) as error:
        raise SystemExit(str(error)) from error
    print_profile(console, f"{args.shape}, {args.mode}, {args.concurrency} at once", profile)
    if args.json:
        command = sys.argv[1:] if arguments is None else list(arguments)
        found = {
            "command": shlex.join(["python", "benchmarks/profile_step.py", *command]),
            "date": datetime.date.today().isoformat(),
            "torch": torch.__version__,
            "shape": args.shape,
            "mode": args.mode,
            "concurrency": args.concurrency,
            **profile.as_json(),
        }
        write_json(args.json, found)
        console.print(f"written to {args.json}")


if __name__ == "__main__":
    main()
