"""A job from its files to the last record: passes of the pipeline until no line is without one."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray

from focus_ray.batch.commit_pace import CommitPace
from focus_ray.batch.inputs import InputFile, Piece, find_inputs
from focus_ray.batch.ledger import Ledger, Place
from focus_ray.batch.pipeline import cut, records
from focus_ray.batch.pool import EnginePool
from focus_ray.batch.records import Record
from focus_ray.batch.storage import Folder
from focus_ray.batch.worker import ENGINE_ENDED, NOT_STARTED, WorkerSettings
from focus_ray.cluster.engine_start import start_engine
from focus_ray.config import EngineConfig
from focus_ray.errors import FocusRayError
from focus_ray.openai.text_engine import EngineFactory

SUMMARY = "summary.json"
# Lines, or seconds unless commits take long: what a job that dies loses.
COMMIT_EVERY, COMMIT_EVERY_S = 10_000, 5.0
# Lines before an engine for each of its places: those that wait fill what others leave.
LINES_PER_PLACE = 3
# An engine that ends so often without a record in between will not do any better.
MAX_ENDS = 3
# What may differ when a job goes on: it decides how fast texts come, not which.
FREE_FIELDS = frozenset(
    {
        *("model", "device", "tensor_parallel_size", "max_num_seqs", "max_num_batched_tokens"),
        *("gpu_memory_utilization", "kv_cache_memory_bytes", "enforce_eager", "page_size"),
        *("rank_timeout_s", "check_ranks_every", "enable_prefix_caching", "max_occupancy"),
        *("max_num_waiting", "num_pages", "saturation_tokens", "record_trace"),
    }
)


class JobFailed(FocusRayError):
    """The job ended before its lines did; what was committed stays."""


@dataclass(frozen=True)
class BatchJob:
    """What is to be done.

    Args:
        inputs: paths, folders, patterns or URLs.
        output: folder or URL.
        model: as the user calls it; ``engine.model`` is where it was found.
        served_names: by which lines may call the model; none: ``model``.
        defaults: fields of bodies that lines leave out.
        num_replicas: engines; None: as many as the cluster has GPUs for.
        max_errors: the job ends with more; None: never.
    """

    inputs: tuple[str, ...]
    output: str
    engine: EngineConfig
    model: str
    served_names: tuple[str, ...] = ()
    defaults: Mapping[str, Any] = field(default_factory=dict)
    output_format: str = "jsonl"
    num_replicas: int | None = None
    longest_first: bool = False
    max_errors: int | None = None

    @property
    def names(self) -> tuple[str, ...]:
        return self.served_names or (self.model,)

    def arguments(self, files: Sequence[InputFile]) -> dict[str, Any]:
        """All that decides what the records are."""
        settings = self.engine.model_dump(
            mode="json", exclude_defaults=True, exclude=set(FREE_FIELDS)
        )
        return {
            "inputs": [file.identity() for file in files],
            "model": self.engine.model,
            "served_names": list(self.names),
            "engine": settings,
            "defaults": dict(self.defaults),
            "output_format": self.output_format,
        }


@dataclass(frozen=True)
class Progress:
    """How far a job is; counts are of this start and of all before it, ``here`` of this one."""

    num_lines: int
    num_done: int
    num_errors: int
    num_done_here: int
    tokens_here: int
    elapsed_s: float


def run_job(
    job: BatchJob,
    tell: Callable[[str], None] = lambda stage: None,
    show: Callable[[Progress], None] = lambda progress: None,
    engine_factory: EngineFactory = start_engine,
) -> dict[str, Any]:
    """Run a job, or the rest of one, in the Ray that this process is connected to.

    Args:
        tell: is called with what is being waited for.
        show: is called as records come.
        engine_factory: another engine than the real one; goes to other processes.

    Returns:
        The summary, which is also written beside the records.

    Raises:
        ValueError: inputs or output are not what they should be.
        JobFailed: engines do not start or keep ending, or there are too many errors.
        LostOwnership: another job took the output over.
    """
    started_s = time.monotonic()
    tell("looking for the input")
    files = find_inputs(job.inputs)
    arguments = job.arguments(files)
    ledger = Ledger(Folder(job.output), arguments, job.output_format)
    name = hashlib.sha256(json.dumps(arguments, sort_keys=True).encode()).hexdigest()[:12]
    tell(f"counting the lines of {len(files)} file{'s' * (len(files) != 1)}")
    pieces = cut(files, _pool(job, name).num_replicas)
    run = _Run(job, ledger, sum(len(piece.lines) for piece in pieces), show, started_s)
    number = 0
    try:
        while left := _left(pieces, ledger):
            before = run.num_done
            number += 1
            lines = sum(len(piece.lines) for piece in left)
            pool = _pool(job, f"{name}-{started_s:.0f}-{number}")
            tell(f"{lines} lines, {pool.num_replicas} engines")
            if short := pool.missing(ray.cluster_resources()):  # type: ignore[no-untyped-call]
                tell(f"the cluster has not enough yet: {short}")
            settings = WorkerSettings(
                name,
                pool.config,
                tuple(file.name for file in files),
                job.names,
                job.defaults,
                LINES_PER_PLACE * pool.config.max_num_seqs,
            )
            with pool:
                made = records(files, left, pool, settings, engine_factory, job.longest_first)
                for table in made:
                    pool.note_result()
                    run.take(table.to_pylist())
            run.commit()
            if run.num_done == before:
                raise JobFailed(
                    f"{lines} lines were given to engines and none has a result"
                    + (f"; the last engine ended: {run.last_end}" if run.last_end else "")
                )
    finally:
        run.commit()
    run.check_errors()
    ledger.finish()
    return run.summarise()


class _Run:
    """What one start of a job has done."""

    def __init__(
        self,
        job: BatchJob,
        ledger: Ledger,
        num_lines: int,
        show: Callable[[Progress], None],
        started_s: float,
    ) -> None:
        self._job = job
        self._ledger = ledger
        self._num_lines = num_lines
        self._show = show
        self._started_s = started_s
        self._pace = CommitPace(COMMIT_EVERY_S)
        self._pending: dict[Place, Record] = {}
        self._num_before = self.num_done = ledger.num_results + ledger.num_errors
        self._num_errors = ledger.num_errors
        self._tokens_here = 0
        self._ends = 0
        self.last_end: str | None = None

    def take(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Records, or news of an engine."""
        for row in rows:
            if row["file"] == NOT_STARTED:
                raise JobFailed(f"an engine did not start: {row['text']}")
            if row["file"] == ENGINE_ENDED:
                self.last_end = row["text"]
                self._ends += 1
                if self._ends >= MAX_ENDS:
                    raise JobFailed(
                        f"{MAX_ENDS} engines ended and none had a result in between; the last one: "
                        f"{row['text']}"
                    )
                continue
            self._ends = 0
            place = (row["file"], row["line"])
            if place in self._pending or place[1] in self._ledger.done(place[0]):
                continue
            record = Record(row["text"], row["is_error"], json.loads(row["counts"]))
            self._pending[place] = record
            self.num_done += 1
            self._num_errors += record.is_error
            self._tokens_here += record.counts.get("completion_tokens", 0)
        if len(self._pending) >= COMMIT_EVERY or self._pace.is_due:
            self.commit()
        self._show(self._progress())
        self.check_errors()

    def check_errors(self) -> None:
        """Raises JobFailed where there are more than the user wants."""
        errors, most = self._num_errors, self._job.max_errors
        if most is not None and errors > most:
            raise JobFailed(f"{errors} lines have errors, more than --max-errors {most}")

    def commit(self) -> None:
        pending, self._pending = self._pending, {}
        with self._pace.committing():
            self._ledger.commit(pending)

    def summarise(self) -> dict[str, Any]:
        counts = self._ledger.counts
        here_s = time.monotonic() - self._started_s
        steps, decoded = counts.get("denoising_steps", 0), counts.get("decoded_tokens", 0)
        summary = {
            "requests": self._ledger.num_results + self._ledger.num_errors,
            "results": self._ledger.num_results,
            "errors": self._ledger.num_errors,
            **counts,
            "tokens_per_step": decoded / steps if steps else None,
            "processed_per_decoded": counts["processed_tokens"] / decoded if decoded else None,
            "wall_s": here_s,
            "output_tokens_per_s": self._tokens_here / here_s,
            "requests_of_earlier_starts": self._num_before,
        }
        Folder(self._job.output).write(SUMMARY, json.dumps(summary, indent=2).encode() + b"\n")
        return summary

    def _progress(self) -> Progress:
        return Progress(
            self._num_lines,
            self.num_done,
            self._num_errors,
            self.num_done - self._num_before,
            self._tokens_here,
            time.monotonic() - self._started_s,
        )


def _pool(job: BatchJob, name: str) -> EnginePool:
    cluster = ray.cluster_resources()  # type: ignore[no-untyped-call]
    return EnginePool(job.engine, job.num_replicas, cluster, f"focus-ray-batch-{name}")


def _left(pieces: Iterable[Piece], ledger: Ledger) -> list[Piece]:
    left = (piece.without(ledger.done(piece.file)) for piece in pieces)
    return [piece for piece in left if piece is not None]
